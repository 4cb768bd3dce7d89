"""Bias correction: the mean error that rounding leaves in each channel, taken out of the bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
section 4.2; the empirical form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.instrumentation import Instrumentation
from lightning_linger.core.logs import logger
from lightning_linger.core.progress import with_progress
from lightning_linger.core.sites import Site
from lightning_linger.core.table import Table
from lightning_linger.ops.folding import TINY_FACTOR, running_factor
from lightning_linger.stages.forwards import (
    ChannelMean,
    Forward,
    call_of,
    evaluating,
    float_result,
    forwards_of,
    layer_op,
    observe_floats,
    quantized_input,
    require_float_reference,
    require_quantized,
    result_of,
    why_not_quantized,
)
from lightning_linger.stages.ownership import Ownership
from lightning_linger.stages.selection import sites_within


@dataclass(frozen=True)
class BiasCorrectionRow:
    """What became of one layer.

    Args:
        site: Site key.
        bias: Which parameter took the correction, empty if none.
        error: Root mean square over the channels of the mean error that was found, as a share of
            that of the float means.
        why_not: Why nothing was corrected, empty if it was.
    """

    site: str
    bias: str = ""
    error: float = math.nan
    why_not: str = ""


class BiasCorrection(Table[BiasCorrectionRow]):
    """A list of :class:`BiasCorrectionRow` in execution order that prints as a table."""

    row_type = BiasCorrectionRow
    digits = 4


def correct_bias(
    model: nn.Module, loader: Iterable[Any], modules: Sequence[str] | None = None
) -> BiasCorrection:
    """Move biases so that each layer of the quantized model has the means of the float model.

    Layers are taken in execution order, each with those before it corrected. The means of a channel
    are those of the layer's result before any activation or rounding. Weights and ranges stay.

    The correction goes into the bias that the chip adds: beta of a folded batch norm, else the
    layer's own bias, else beta of a batch norm that alone reads the layer.

    Args:
        model: A quantized model that knows its ranges.
        loader: Some batches, as :func:`lightning_linger.calibrate` takes them; kept in memory.
        modules: Globs on dotted paths; None takes the whole model.

    Returns:
        A row for each layer with weights: what was corrected, or why nothing.

    Raises:
        NotReadyError: If the model is not quantized, or has seen no range.
        ConfigError: If the loader is empty, a glob matches nothing, or the weights or biases are
            no longer those of the float model, because of an earlier call or of
            :func:`lightning_linger.adaround`, which leaves little to correct.
    """
    return correct_bias_by(model, forwards_of(model, loader), modules)


def correct_bias_by(
    model: nn.Module, forwards: Sequence[Forward], modules: Sequence[str] | None = None
) -> BiasCorrection:
    """Correct biases by forwards of the model, or of parts of it; see :func:`correct_bias`."""
    instrumentation = require_quantized(model)
    require_float_reference(instrumentation, "correct_bias")
    chosen = sites_within(model, modules)
    ownership = Ownership(model, instrumentation.graph)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows: dict[str, BiasCorrectionRow] = {}
    places: dict[Site, _Place] = {}
    for site in chosen:
        if not site.has_parameters or site.op.kind == "batch_norm":
            continue
        place = _place(instrumentation, ownership, site)
        rows[site.key] = BiasCorrectionRow(site.key, why_not=str(place))
        if isinstance(place, _Place):
            places[site] = place
    with evaluating(model):
        wanted = _float_means(instrumentation, forwards, places)
        for site, place in with_progress(places.items(), "Correcting biases"):
            mean, own = wanted[site], _quantized_mean(instrumentation, site, forwards)
            if mean is None or own is None:
                why_not = "the calibration data does not reach it"
                rows[site.key] = BiasCorrectionRow(site.key, why_not=why_not)
                continue
            place.add(mean - own)
            instrumentation.thaw()
            error = (mean - own).square().mean().sqrt() / mean.square().mean().sqrt()
            rows[site.key] = BiasCorrectionRow(site.key, names[id(place.bias)], float(error))
    instrumentation.applied.append("correct_bias")
    done = sum(not row.why_not for row in rows.values())
    logger.info("corrected %d of %d biases of %s", done, len(rows), type(model).__name__)
    return BiasCorrection(list(rows.values()))


@dataclass(frozen=True)
class _Place:
    """Where a correction goes.

    Args:
        bias: The parameter.
        factor: ``[C]``, what a result of one is worth there; None for one.
    """

    bias: Tensor
    factor: Tensor | None = None

    def add(self, shift: Tensor) -> None:
        """Add to what the bias stands for."""
        moved = shift if self.factor is None else shift * self.factor
        self.bias.add_(moved.to(self.bias.dtype))


def _place(instrumentation: Instrumentation, ownership: Ownership, site: Site) -> _Place | str:
    """Return where a layer can be corrected, or why nowhere."""
    reason = why_not_quantized(site) or ownership.obstacle(site)
    if reason is not None:
        return reason
    follower = instrumentation.graph.sole_consumer(site.key)
    norm: Any = None
    if follower is not None and follower.op == "batch_norm" and follower.key in instrumentation:
        own = instrumentation.find(follower.key)
        if getattr(own.owner, "bias", None) is not None and ownership.obstacle(own) is None:
            norm = own.owner
    layer: Any = site.owner
    if site.active_fold is not None and norm is not None:
        return _Place(norm.bias)
    if layer.bias is not None:
        fold: Any = site.active_fold
        return _Place(layer.bias, None if fold is None else 1 / _safe(running_factor(fold)))
    if norm is not None and norm.running_var is not None:
        return _Place(norm.bias, running_factor(norm))
    return "has no bias, and no batch norm with a beta of its own reads it alone"


def _safe(factor: Tensor) -> Tensor:
    """Return a factor by which nothing moves where it is too small to divide by."""
    return torch.where(factor.abs() < TINY_FACTOR, torch.full_like(factor, torch.inf), factor)


def _float_means(
    instrumentation: Instrumentation, forwards: Sequence[Forward], sites: Iterable[Site]
) -> dict[Site, Tensor | None]:
    means = {site: ChannelMean(site) for site in sites}

    def see(site: Site, call: Any) -> None:
        if site in means:
            means[site].add(float_result(site, call))

    for forward in forwards:
        observe_floats(instrumentation, forward, see)
    return {site: mean.value() for site, mean in means.items()}


def _quantized_mean(
    instrumentation: Instrumentation, site: Site, forwards: Sequence[Forward]
) -> Tensor | None:
    mean = ChannelMean(site)
    for forward in forwards:
        call = call_of(instrumentation, site, forward, "fake")
        given = None if call is None else quantized_input(site, call)
        if given is not None:
            x, step = given
            parameters = layer_op(site).parameters_in_use(site, call, step)
            mean.add(result_of(site, call, x, parameters))
    return mean.value()
