"""Other widths for a model that is quantized, or planned to be, without a new plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from lightning_linger.core.errors import ConfigError, NotReadyError
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.logs import logger
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import WIDEST_OPERAND
from lightning_linger.core.widths import NAMES, Widths, changed_config, widths_of
from lightning_linger.stages.selection import Selection, sites_within

# A mark that no module has: what the stage was planned with has been taken into account.
_NO_MARK = "_linger_no_mark"


def change_bits(model: nn.Module, overrides: Mapping[str, Mapping[str, int]]) -> nn.Module:
    """Give layers other widths, in place: every quantizer and every learned range stays the same.

    Ranges are kept, and steps follow from the new width. Checkpoints hold the widths in force.

    Args:
        model: A model with a plan of the quantize stage, on or off.
        overrides: ``weight_bits``, ``activation_bits`` and ``output_bits`` per glob on dotted paths
            or site keys, or per ``type:Name``; the most specific one counts. Others are ignored, so
            that what :func:`lightning_linger.choose_bits` returns can be used. Layers that none
            matches, and layers that stay in float, keep what they have.

    Returns:
        The model.

    Raises:
        ConfigError: If a pattern matches nothing, a width is not allowed, or weights are rounded as
            :func:`lightning_linger.adaround` has learned for the width they have.
        NotReadyError: If the model has no plan.
    """
    instrumentation = _planned(model)
    selection = Selection(None, None, overrides, _NO_MARK)
    selection.validate(model, instrumentation.sites)
    widths = {}
    for site in _changeable(instrumentation.sites):
        fields, _ = selection.resolve(model, site)
        wanted = {name: bits for name, bits in (fields or {}).items() if name in NAMES}
        if wanted:
            widths[site.key] = dataclasses.replace(widths_of(site), **wanted)
    _apply(model, instrumentation, widths)
    return model


def change_model_bits(
    model: nn.Module, fields: Mapping[str, int], modules: Sequence[str] | None = None
) -> nn.Module:
    """Give a model other widths than it was planned with, in place; see :func:`change_bits`.

    A layer keeps a width that an override or a mark gives it, if that differs from the model's, and
    an output that is not rounded to codes stays so.

    Args:
        model: A model with a plan of the quantize stage, on or off.
        fields: ``weight_bits``, ``activation_bits`` and ``output_bits``, or some of them.
        modules: Globs on dotted paths; None takes the whole model.

    Raises:
        ConfigError: If a glob matches nothing, a name is none, a width is not allowed, or weights
            are rounded as :func:`lightning_linger.adaround` has learned for the width they have.
        NotReadyError: If the model has no plan.
    """
    _apply(model, _planned(model), _model_widths(model, fields, modules))
    return model


def check_model_bits(
    model: nn.Module, fields: Mapping[str, int], modules: Sequence[str] | None = None
) -> None:
    """Raise what :func:`change_model_bits` would raise; nothing is changed."""
    _check(_planned(model), _model_widths(model, fields, modules))


def _model_widths(
    model: nn.Module, fields: Mapping[str, int], modules: Sequence[str] | None
) -> dict[str, Widths]:
    instrumentation = _planned(model)
    unknown = sorted(set(fields) - set(NAMES))
    if unknown:
        msg = f"widths are named {NAMES}. Found: {unknown}."
        raise ConfigError(msg)
    own = instrumentation.plans["quantize"]
    widths = {}
    for site in _changeable(sites_within(model, modules)):
        planned = instrumentation.planned_widths(site)
        wanted = {
            name: bits
            for name, bits in fields.items()
            if getattr(planned, name) == own[name] and _has_codes(name, planned)
        }
        widths[site.key] = dataclasses.replace(widths_of(site), **wanted)
    return widths


def _planned(model: nn.Module) -> Instrumentation:
    instrumentation = instrumentation_of(model)
    if "quantize" not in instrumentation.plans:
        msg = (
            f"{type(model).__name__} has no quantizers yet. Call `linger.quantize` first, or add "
            "QuantizeCallback to the Trainer."
        )
        raise NotReadyError(msg)
    return instrumentation


def _changeable(sites: Sequence[Site]) -> list[Site]:
    """Return the quantized sites with widths of their own."""
    return [site for site in sites if site.quantized and not site.completes_fold]


def _has_codes(name: str, widths: Widths) -> bool:
    narrow = widths.output_bits is not None and widths.output_bits <= WIDEST_OPERAND
    return name != "output_bits" or narrow


def _apply(model: nn.Module, instrumentation: Instrumentation, widths: dict[str, Widths]) -> None:
    changed = {
        key: new for key, new in widths.items() if new != widths_of(instrumentation.find(key))
    }
    if not changed:
        return
    _check(instrumentation, changed)
    for key, new in dict(changed).items():
        # A batch norm that a layer has taken in is described as the layer is.
        site = instrumentation.find(key)
        follower = instrumentation.graph.sole_consumer(key) if site.fold is not None else None
        if follower is not None and follower.key in instrumentation:
            changed[follower.key] = new
    instrumentation.change_widths(changed)
    instrumentation.thaw()
    logger.info("%d sites of %s have other widths", len(widths), type(model).__name__)


def _check(instrumentation: Instrumentation, widths: Mapping[str, Widths]) -> None:
    """Refuse before anything is changed."""
    for key, new in widths.items():
        site = instrumentation.find(key)
        changed_config(site, new)
        learned = "adaround" in instrumentation.applied and "weights" in site.frozen
        if learned and new.weight_bits != site.weights.bits:
            msg = (
                f"`{key}`: its weights are rounded as `adaround` has learned for "
                f"{site.weights.bits} bits, which {new.weight_bits} would undo. Change widths "
                "first. To give up what was learned, let the ranges of weights move again: "
                "`linger.freeze_ranges(model, frozen=False, parts=['weights'])`."
            )
            raise ConfigError(msg)
