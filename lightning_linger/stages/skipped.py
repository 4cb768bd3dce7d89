"""Layers that could be quantized and are not, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.sites import Site
from lightning_linger.core.table import Table
from lightning_linger.ops.weighted import WeightedOp
from lightning_linger.stages.selection import CHOICES

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class SkippedLayer:
    """One layer that stays float.

    Args:
        layer: Site key, or the dotted path of a module that no call was seen of.
        type: Class of the module.
        why: The reason.
        chosen: Whether somebody chose so, by name, type or mark.
    """

    layer: str
    type: str
    why: str
    chosen: bool


class SkippedLayers(Table[SkippedLayer]):
    """A list of :class:`SkippedLayer` that prints as a table."""

    row_type = SkippedLayer


def skipped_layers(model: nn.Module) -> SkippedLayers:
    """Return the convolutions and linear layers of a quantized model that stay float.

    Args:
        model: A prepared model.

    Returns:
        Calls that are not quantized, then modules that were never called, unless a quantized
        function reads their weight.
    """
    sites = [site for site in instrumentation_of(model).sites if isinstance(site.op, WeightedOp)]
    rows = [
        SkippedLayer(
            layer=site.key,
            type=type(site.owner).__name__,
            why=site.why_float or "not planned",
            chosen=(site.why_float or "").startswith(CHOICES),
        )
        for site in sites
        if not site.quantized
    ]
    called = {site.node.owner for site in sites}
    for path, module in model.named_modules():
        if isinstance(module, LAYERS) and path not in called:
            reader = _reader(model, path, module.weight)
            if reader is not None and reader.quantized:
                continue
            why = "the example inputs did not reach it"
            if reader is not None:
                why = f"part of `{reader.key}`: {reader.why_float}"
            chosen = reader is not None and (reader.why_float or "").startswith(CHOICES)
            rows.append(SkippedLayer(path, type(module).__name__, why, chosen))
    return SkippedLayers(rows)


def _reader(model: nn.Module, path: str, weight: Tensor) -> Site | None:
    """Find the call of the module around a layer that reads its weight (attention does so)."""
    owner = path.rpartition(".")[0]
    for site in instrumentation_of(model).sites:
        read = [spec.shape for spec in site.node.inputs if spec.constant]
        if path and site.node.owner == owner and tuple(weight.shape) in read:
            return site
    return None
