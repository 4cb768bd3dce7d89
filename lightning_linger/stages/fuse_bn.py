"""Folding batch norms into the layers before them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from lightning_linger.core.config import FuseConfig, FuseMode
from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.sites import Site
from lightning_linger.ops.weighted import WeightedOp
from lightning_linger.stages.journal import log_switch
from lightning_linger.stages.selection import covers


def fuse_bn(
    model: nn.Module, mode: FuseMode = "running", modules: Sequence[str] | None = None
) -> nn.Module:
    """Fold every batch norm that is the sole consumer of a layer into that layer, from now on.

    Range limits and weight quantization then act on the folded weights, as on the chip; training
    keeps the gradients and statistics of the separate layers.

    Args:
        model: A prepared model.
        mode: ``running``, ``batch`` or ``frozen``, see :class:`FuseConfig`.
        modules: Globs on dotted paths of layers; None folds all.

    Returns:
        The model.

    Raises:
        ConfigError: If a glob matches no layer, or the model is quantized already and other layers
            would be folded than those it was quantized with.
    """
    plan_fuse_bn(model, FuseConfig(mode), modules)
    return switch_fuse_bn(model, on=True)


def plan_fuse_bn(
    model: nn.Module, config: FuseConfig, modules: Sequence[str] | None = None
) -> nn.Module:
    """Find the pairs to fold without switching folding on."""
    instrumentation = instrumentation_of(model)
    layers = [site for site in instrumentation.sites if isinstance(site.op, WeightedOp)]
    for pattern in modules or ():
        _require_match(pattern, [site.node.owner for site in layers])
    followers: dict[str, Site] = {}
    for site in layers:
        chosen = modules is None or any(covers(pattern, site.node.owner) for pattern in modules)
        follower = _foldable(instrumentation, site) if chosen else None
        if follower is not None:
            followers[site.key] = follower
    if "quantize" in instrumentation.plans:
        _refuse_other_folds(layers, followers)
    instrumentation.switches.fuse_mode = config.mode
    for site in instrumentation.sites:
        site.completes_fold = site in followers.values()
    for site in layers:
        site.__dict__["fold"] = followers[site.key].owner if site.key in followers else None
    instrumentation.note_plan("fuse_bn", {**dataclasses.asdict(config), "modules": modules}, {})
    return model


def switch_fuse_bn(model: nn.Module, on: bool, mode: FuseMode | None = None) -> nn.Module:
    """Switch planned folding on or off, or change its mode."""
    instrumentation = instrumentation_of(model)
    before = instrumentation.switches.fuse
    instrumentation.switches.fuse = on
    if mode is not None:
        instrumentation.switches.fuse_mode = FuseConfig(mode).mode
    instrumentation.thaw()
    log_switch(model, "fuse_bn", before, on)
    return model


def _foldable(instrumentation: Instrumentation, site: Site) -> Site | None:
    """Return the batch norm that alone reads this layer's result, if it can be folded."""
    consumer = instrumentation.graph.sole_consumer(site.key)
    if consumer is None or consumer.op != "batch_norm" or consumer.key not in instrumentation:
        return None
    follower = instrumentation.find(consumer.key)
    if not isinstance(follower.owner, nn.modules.batchnorm._BatchNorm):
        return None
    if follower.op.obstacle(follower.op.bind(*follower.node.args, **follower.node.kwargs)):
        return None
    if site.op.kind == "linear" and len(site.node.outputs[0].shape) != 2:
        # The channels of a linear layer are its last dimension, those of a batch norm the second.
        return None
    return follower


def _refuse_other_folds(layers: Sequence[Site], followers: Mapping[str, Site]) -> None:
    """Refuse to fold, or not to, layers whose quantizers were made for what they are now."""
    folded = {site.key for site in layers if site.__dict__["fold"] is not None}
    other = [site.key for site in layers if site.key in folded ^ set(followers)]
    if other:
        msg = (
            f"`{other[0]}` is quantized already: what it gives would be another thing with its "
            "batch norm folded, or no longer folded. Call `linger.fuse_bn` before "
            "`linger.quantize` or `linger.calibrate`; `linger.strip(model)` starts over."
        )
        raise ConfigError(msg)


def _require_match(pattern: str, paths: list[str]) -> None:
    if not any(covers(pattern, path) for path in paths):
        msg = f"the pattern {pattern!r} matches no layer. Similar: {near_matches(pattern, paths)}."
        raise ConfigError(msg)
