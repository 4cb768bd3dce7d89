"""Quantization-aware training: quantizers at the sites, planned once, then switched on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.stages.journal import log_switch
from lightning_linger.stages.planner import Planner
from lightning_linger.stages.selection import QUANT_MARK, Fields, Selection


def quantize(
    model: nn.Module,
    config: QuantConfig | None = None,
    types: Sequence[type[nn.Module] | str] | None = None,
    modules: Sequence[str] | None = None,
    overrides: Mapping[str, Fields] | None = None,
) -> nn.Module:
    """Quantize a prepared model from now on; training forwards move the ranges.

    Args:
        model: A prepared model.
        config: How; None is the default of the default platform.
        types: Allow-list of module types or op kinds.
        modules: Globs on dotted paths.
        overrides: Fields per glob or ``type:Name``, or None to leave a layer in float.

    Returns:
        The model.
    """
    plan_quantize(model, config or QuantConfig(), types, modules, overrides)
    return switch_quantize(model, on=True)


def switch_quantize(model: nn.Module, on: bool) -> nn.Module:
    """Switch planned quantizers on or off."""
    instrumentation = instrumentation_of(model)
    before = instrumentation.switches.quantize
    instrumentation.switches.quantize = on
    instrumentation.thaw()
    log_switch(model, "quantize", before, on)
    return model


def switch_watch(model: nn.Module, on: bool) -> nn.Module:
    """Let float forwards in training mode move planned ranges, ahead of quantization, or not."""
    instrumentation = instrumentation_of(model)
    before = instrumentation.switches.watch
    instrumentation.switches.watch = on
    log_switch(model, "observe", before, on)
    return model


def plan_quantize(
    model: nn.Module,
    config: QuantConfig,
    types: Sequence[type[nn.Module] | str] | None = None,
    modules: Sequence[str] | None = None,
    overrides: Mapping[str, Fields] | None = None,
) -> nn.Module:
    """Create every quantizer without switching them on.

    Folding has to be planned before, because a folded layer quantizes behind its batch norm.
    """
    instrumentation = instrumentation_of(model)
    selection = Selection(types, modules, overrides, QUANT_MARK)
    selection.validate(model, instrumentation.sites)
    Planner(model, instrumentation, config, selection).run()
    if not any(site.quantized for site in instrumentation.sites):
        reasons = {site.why_float for site in instrumentation.sites}
        msg = (
            f"no site of {type(model).__name__} would be quantized "
            f"({'; '.join(map(str, reasons))}). Widen `types`, `modules` or `overrides`."
        )
        raise UnsupportedError(msg)
    plan = {**dataclasses.asdict(config), **selection.describe()}
    instrumentation.note_plan("quantize", plan, selection.marks(model))
    return model
