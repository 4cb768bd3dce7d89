"""AdaRound: which weights to round up and which down, learned from the layer's output.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_linger.core.config import Limit
from lightning_linger.core.logs import logger
from lightning_linger.core.progress import with_progress
from lightning_linger.core.sites import Site
from lightning_linger.core.table import Table
from lightning_linger.stages.adaround.config import AdaRoundConfig
from lightning_linger.stages.adaround.data import LayerData
from lightning_linger.stages.adaround.layer import AdaRoundRow, LayerRounding
from lightning_linger.stages.forwards import (
    Forward,
    evaluating,
    forwards_of,
    require_float_reference,
    require_quantized,
    why_not_quantized,
)
from lightning_linger.stages.ownership import Ownership
from lightning_linger.stages.selection import sites_within


class AdaRounding(Table[AdaRoundRow]):
    """A list of :class:`AdaRoundRow` in execution order that prints as a table."""

    row_type = AdaRoundRow
    digits = 4


def adaround(
    model: nn.Module,
    loader: Iterable[Any],
    config: AdaRoundConfig | None = None,
    modules: Sequence[str] | None = None,
) -> AdaRounding:
    """Learn for each weight whether it is rounded up or down, layer by layer.

    In execution order, each layer is given the inputs it has in the quantized model, and learns to
    give what it gives in the float model, behind the ReLU that follows if one does.

    A weight that is not rounded to nearest any more is moved into the middle of the interval of its
    code, by less than a step, and the steps of the layer's weights are frozen, as
    :func:`lightning_linger.freeze_ranges` freezes them. So the ordinary rounding gives the learned
    codes, in fake-quant, integers and exports alike. Biases and ranges of activations stay.

    Args:
        model: A quantized model that knows its ranges.
        loader: Some batches, as :func:`lightning_linger.calibrate` takes them; kept in memory.
        config: How rounding is learned.
        modules: Globs on dotted paths; None takes the whole model.

    Returns:
        A row for each layer with weights: what changed, or why nothing. Where the learned rounding
        is not better on the data than rounding to nearest, that stays.

    Raises:
        NotReadyError: If the model is not quantized, or has seen no range.
        ConfigError: If the loader is empty, a glob matches nothing, or the weights or biases are
            no longer those of the float model, because of an earlier call or of
            :func:`lightning_linger.correct_bias`.
    """
    return adaround_by(model, forwards_of(model, loader), config, modules)


def adaround_by(
    model: nn.Module,
    forwards: Sequence[Forward],
    config: AdaRoundConfig | None = None,
    modules: Sequence[str] | None = None,
) -> AdaRounding:
    """Learn rounding by forwards of the model, or of parts of it; see :func:`adaround`."""
    instrumentation = require_quantized(model)
    require_float_reference(instrumentation, "adaround")
    ownership = Ownership(model, instrumentation.graph)
    config = config or AdaRoundConfig()
    layers = [
        site
        for site in sites_within(model, modules)
        if site.has_parameters and site.op.kind != "batch_norm"
    ]
    rows: list[AdaRoundRow] = []
    originals: dict[Tensor, Tensor] = {}
    with evaluating(model):
        for site in with_progress(layers, "Learning to round"):
            reason = _obstacle(site, ownership)
            data = None if reason else LayerData.collect(instrumentation, site, forwards, originals)
            if data is None:
                why_not = reason or "the calibration data does not reach it"
                rows.append(AdaRoundRow(site.key, why_not=why_not))
                continue
            layer = LayerRounding(site, data)
            originals[layer.weight] = layer.weight.clone()
            rows.append(layer.learn(config))
            instrumentation.thaw()
    instrumentation.applied.append("adaround")
    changed = sum(row.changed for row in rows)
    logger.info(
        "%d of %d weights of %s are not rounded to nearest",
        *(changed, sum(row.weights for row in rows), type(model).__name__),
    )
    return AdaRounding(rows)


def _obstacle(site: Site, ownership: Ownership) -> str | None:
    reason = why_not_quantized(site) or ownership.obstacle(site, ("weight",))
    if reason is not None:
        return reason
    if "weights" in site.floating:
        return "its weight is not rounded"
    limits = site.active_limits
    limit: Limit | None = None if limits is None else limits.weight
    if limit is not None and limit.kind != "static":
        return "its range limit follows the weights"
    return None
