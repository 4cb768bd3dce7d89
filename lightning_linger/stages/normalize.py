"""Range limits on weights, biases and outputs: the constrained float stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_linger.core.config import Limit, LimitGradient, NormalizeConfig
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.limits import Limits
from lightning_linger.core.sites import Site
from lightning_linger.stages.journal import log_switch
from lightning_linger.stages.selection import NORMALIZE_MARK, Fields, Selection


def normalize(
    model: nn.Module,
    weight: float | str | None = 8.0,
    bias: float | str | None = None,
    output: float | str | None = 8.0,
    gradient: LimitGradient = "zero",
    types: Sequence[type[nn.Module] | str] | None = None,
    modules: Sequence[str] | None = None,
    overrides: Mapping[str, Fields] | None = None,
) -> nn.Module:
    """Limit weights, biases and outputs of layers from now on, in training and evaluation alike.

    The limits stay when quantization starts: weights are limited before they are quantized, outputs
    before their range is observed.

    Args:
        model: A prepared model.
        weight: See :class:`NormalizeConfig`, like the next three.
        bias: Limit of (folded) biases.
        output: Limit of outputs.
        gradient: Outside a limit.
        types: Allow-list of module types or op kinds.
        modules: Globs on dotted paths.
        overrides: Fields per glob or ``type:Name``, or None to leave a layer out.

    Returns:
        The model.
    """
    config = NormalizeConfig(weight, bias, output, gradient)
    plan_normalize(model, config, types, modules, overrides)
    return switch_normalize(model, on=True)


def plan_normalize(
    model: nn.Module,
    config: NormalizeConfig,
    types: Sequence[type[nn.Module] | str] | None = None,
    modules: Sequence[str] | None = None,
    overrides: Mapping[str, Fields] | None = None,
) -> nn.Module:
    """Attach limits to the layers without switching them on."""
    instrumentation = instrumentation_of(model)
    selection = Selection(types, modules, overrides, NORMALIZE_MARK)
    selection.validate(model, instrumentation.sites)
    for site in instrumentation.sites:
        site.limits = None
        if site.has_parameters:
            fields, _ = selection.resolve(model, site)
            if fields is not None:
                _attach(site, config.override(dict(fields)))
    plan = {**dataclasses.asdict(config), **selection.describe()}
    instrumentation.note_plan("normalize", plan, selection.marks(model))
    return model


def switch_normalize(model: nn.Module, on: bool) -> nn.Module:
    """Switch planned limits on or off."""
    instrumentation = instrumentation_of(model)
    before = instrumentation.switches.normalize
    instrumentation.switches.normalize = on
    instrumentation.thaw()
    log_switch(model, "normalize", before, on)
    return model


def _attach(site: Site, config: NormalizeConfig) -> None:
    site.limits = Limits(
        _parsed(config.weight), _parsed(config.bias), _parsed(config.output), config.gradient
    )
    output = site.limits.output
    if output is not None and output.kind != "static" and "output_bound" not in site._buffers:
        device = next((t.device for t in site.buffers()), torch.device("cpu"))
        site.register_buffer("output_bound", torch.zeros((), device=device))


def _parsed(spec: Any) -> Limit | None:
    return None if spec is None else Limit.parse(spec)
