"""What dashboards know of a model: its layers, how they are connected, how their values lie."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.graph import Graph
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.switches import Switches
from lightning_linger.dashboard.records import STAGES, Layer, ValueHistogram, WidthSwitch
from lightning_linger.simulate.samples import ValueSamples
from lightning_linger.stages.summary import summary

BINS = 80
# Around the clip limits there is room for what lies beyond them.
_MARGIN = 0.25


def planned_layers(model: nn.Module) -> list[Layer]:
    """Return the sites of a prepared model, in execution order."""
    instrumentation = instrumentation_of(model)
    inputs = _inputs(instrumentation.graph, {site.key for site in instrumentation.sites})
    layers = []
    for row in summary(model):
        if row.site not in instrumentation:
            continue
        output = instrumentation.find(row.site).output
        layers.append(
            Layer(
                row.site,
                row.op,
                row.bits,
                output.grid.bits if output is not None else None,
                row.why_float,
                inputs[row.site],
            )
        )
    return layers


def widths_in_force(model: nn.Module, epoch: int, step: int) -> WidthSwitch:
    """Return the widths that the layers of a prepared model have from a step."""
    layers = planned_layers(model)
    return WidthSwitch(
        epoch,
        step,
        {layer.site: layer.bits for layer in layers if layer.bits},
        {layer.site: layer.output_bits for layer in layers if layer.output_bits is not None},
    )


def bits_per_weight(model: nn.Module) -> float | None:
    """Return the mean width of all weights that are quantized; None if there are none."""
    weights = bits = 0
    counted: set[int] = set()
    for site in instrumentation_of(model).sites:
        if not site.quantized or site.weights.grid is None:
            continue
        for spec in site.op.parameters(site.recorded_call):
            # Calls of one module have their weights in common.
            if spec.value not in counted:
                counted.add(spec.value)
                weights += math.prod(spec.shape)
                bits += math.prod(spec.shape) * site.weights.grid.bits
    return bits / weights if weights else None


def charted_sites(model: nn.Module) -> list[str]:
    """Return the keys of the sites that may have values of their own, in execution order.

    A folded batch norm and an activation inside the quantizer before it have none.
    """
    return [
        site.key
        for site in instrumentation_of(model).sites
        if site.quantized and not site.merged and not site.completes_fold
    ]


def planned_target(model: nn.Module) -> tuple[str, bool]:
    """Return the platform of a model, empty without one, and whether its scales are exact."""
    sites = [site for site in instrumentation_of(model).sites if site.config is not None]
    if not sites:
        return "", True
    platform = next((site.platform for site in sites if site.platform is not None), None)
    grids = [quantizer.grid for site in sites for quantizer in site.quantizers()]
    exact = all(grid.scale_kind == "power_of_two" for grid in grids)
    return platform.name if platform is not None else "", exact


def stages_on(switches: Switches) -> tuple[str, ...]:
    """Return the names of the stages that are on."""
    states = (switches.fuse, switches.normalize, switches.quantize)
    return tuple(name for name, on in zip(STAGES, states, strict=True) if on)


def value_histograms(samples: ValueSamples, sites: Iterable[str]) -> dict[str, ValueHistogram]:
    """Count the values of some sites in bins that reach beyond the clip limits.

    What lies beyond the outermost bins is counted in them.
    """
    return {site: _histogram(site, samples) for site in sites if site in samples}


def _histogram(site: str, samples: ValueSamples) -> ValueHistogram:
    sample = samples[site]
    low, high = float(sample.low), float(sample.high)
    room = _MARGIN * (high - low)
    edges = torch.linspace(low - room, high + room, BINS + 1, dtype=torch.float64)
    return ValueHistogram(
        site,
        tuple(edges.tolist()),
        _counts(sample.reference, edges),
        _counts(sample.quantized, edges),
        low,
        high,
    )


def _counts(values: Tensor, edges: Tensor) -> tuple[int, ...]:
    inside = values.double().cpu().clamp(float(edges[0]), float(edges[-1]))
    return tuple(int(count) for count in torch.histogram(inside, edges).hist.tolist())


def _inputs(graph: Graph, sites: set[str]) -> dict[str, tuple[str, ...]]:
    """Return, by site, the sites whose results it takes, through calls that are no sites."""
    found: dict[str, dict[str, None]] = {site: {} for site in sites}
    for run in graph.runs:
        makers: dict[int, dict[str, None]] = {}
        for node in run.nodes:
            sources: dict[str, None] = {}
            for spec in node.inputs:
                sources.update(makers.get(spec.value, {}))
            if node.key in sites:
                found[node.key].update(sources)
                sources = {node.key: None}
            for spec in node.outputs:
                makers[spec.value] = sources
    return {site: tuple(sources) for site, sources in found.items()}


def settings_of(plans: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return what the stages were planned with, ``stage.argument`` to value, without defaults."""
    return {
        f"{stage}.{name}": str(value)
        for stage, arguments in plans.items()
        for name, value in arguments.items()
        if value is not None
    }
