"""The pictures as plotly charts, for the report: plain data that plotly.js draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from lightning_linger.dashboard.figures import CLIP_COLOUR, FLOAT_COLOUR, GRID_COLOUR, STAGE_COLOURS
from lightning_linger.dashboard.groups import group_layers
from lightning_linger.dashboard.records import STAGES, LayerError, RunRecord, ValueHistogram
from lightning_linger.dashboard.sensitivity import MeasuredSensitivities, spans_decades
from lightning_linger.dashboard.timeline import Span, labelled_spans

Chart = dict[str, Any]

_REDS: list[list[Any]] = [[0.0, "#fff5f0"], [0.5, "#fb6a4a"], [1.0, "#67000d"]]
_NUMBERED = 16
_ROW_HEIGHT = 22
_LARGEST_MAP = 1600


def error_heat_map(record: RunRecord, title: str, value: Callable[[LayerError], float]) -> Chart:
    """Return SQNR in dB by layer and epoch."""
    accumulated = _table(record, lambda error: error.sqnr)
    isolated = _table(record, lambda error: error.isolated_sqnr)
    # One scale, so that the two maps compare.
    both = _numbers(accumulated) + _numbers(isolated)
    limits = (min(both, default=0.0), max(both, default=1.0))
    table = _table(record, value)
    return _heat_map(record, title, table, "dB", ".0f", "Viridis", limits)


def mismatch_heat_map(record: RunRecord) -> Chart:
    """Return the integer codes of a million that differ from fake-quant, by layer and epoch."""
    table = _table(record, lambda e: None if e.mismatch_rate is None else 1e6 * e.mismatch_rate)
    numbers = _numbers(table)
    title = "integer codes of a million that differ from fake-quant"
    return _heat_map(record, title, table, "", ".0f", _REDS, (0.0, max([1.0, *numbers])))


def stage_timeline(record: RunRecord) -> Chart:
    """Return which stage is on at which step, above the user's metrics."""
    bars = [
        {
            "type": "bar",
            "orientation": "h",
            "y": [stage] * len(spans),
            "base": [span.start for span in spans],
            "x": [span.end - span.start for span in spans],
            "text": [span.label for span in spans],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "customdata": [_hover(span) for span in spans],
            "hovertemplate": f"{stage}: %{{customdata}}<extra></extra>",
            "marker": {"color": STAGE_COLOURS[stage], "line": {"color": "white", "width": 1}},
            "showlegend": False,
        }
        for stage in STAGES
        if (spans := labelled_spans(record, stage))
    ]
    lines = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [epoch.step for epoch in record.epochs if name in epoch.metrics],
            "y": [epoch.metrics[name] for epoch in record.epochs if name in epoch.metrics],
            "yaxis": "y2",
        }
        for name in sorted({name for epoch in record.epochs for name in epoch.metrics})
    ]
    layout = {
        "height": 380,
        "barmode": "overlay",
        "xaxis": {"title": {"text": "step"}, "anchor": "y2", "rangemode": "tozero"},
        "yaxis": {
            "domain": [0.72, 1.0],
            "categoryorder": "array",
            "categoryarray": STAGES[::-1],
            "range": [-0.5, len(STAGES) - 0.5],
            "tickvals": list(STAGES),
        },
        "yaxis2": {"domain": [0.0, 0.64]},
        "legend": {"orientation": "h", "y": -0.22},
        "margin": {"l": 90, "r": 20, "t": 10, "b": 60},
    }
    return {"data": [*bars, *lines], "layout": layout}


def _hover(span: Span) -> str:
    steps = f"steps {span.start} to {span.end}"
    return f"{steps}, {span.label} bits (weight/input/output)" if span.label else steps


def group_lines(record: RunRecord) -> dict[str, Chart]:
    """Return the accumulated and isolated SQNR over time, one chart per group of layers."""
    charts = {}
    for group in group_layers([layer.site for layer in record.measured_layers]):
        data = []
        for number, site in enumerate(group.sites):
            label = record.layer(site).label
            for name, dash, measure in _LINES:
                points = [
                    (epoch.step, measure(error))
                    for epoch in record.measured
                    for error in epoch.layers
                    if error.site == site
                ]
                data.append(
                    {
                        "type": "scatter",
                        "mode": "lines+markers",
                        "name": label,
                        "legendgroup": site,
                        "showlegend": name == "accumulated",
                        "x": [step for step, _ in points],
                        "y": [rounded(y) for _, y in points],
                        "line": {"dash": dash, "color": _COLOURS[number % len(_COLOURS)]},
                        "hovertemplate": f"{label}, {name}: %{{y:.1f}} dB<extra></extra>",
                    }
                )
        charts[group.title] = {
            "data": data,
            "layout": {
                "height": 340,
                "xaxis": {"title": {"text": "step"}},
                "yaxis": {"title": {"text": "SQNR [dB], dotted: the layer alone"}},
                "legend": {"orientation": "h", "y": -0.25},
                "margin": {"l": 60, "r": 20, "t": 10, "b": 60},
            },
        }
    return charts


def value_histogram(histogram: ValueHistogram) -> Chart:
    """Return how float and quantized values of a layer lie, with the clip limits."""
    edges = histogram.edges
    middles = [rounded((left + right) / 2) for left, right in pairwise(edges)]
    title = (
        f"clip limits {histogram.low:.4g} and {histogram.high:.4g}"
        f"<br>{histogram.clipped:.1%} of the float values lie beyond"
    )
    limits = [
        {
            "type": "line",
            "x0": limit,
            "x1": limit,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "line": {"color": CLIP_COLOUR, "dash": "dash", "width": 1.5},
        }
        for limit in (histogram.low, histogram.high)
    ]
    return {
        "data": [
            {
                "type": "bar",
                "name": "float",
                "x": middles,
                "y": list(histogram.reference),
                "marker": {"color": FLOAT_COLOUR, "opacity": 0.5},
            },
            {
                "type": "bar",
                "name": "quantized",
                "x": middles,
                "y": list(histogram.quantized),
                "marker": {
                    "color": "rgba(31, 119, 180, 0.12)",
                    "line": {"color": GRID_COLOUR, "width": 1.2},
                },
            },
        ],
        "layout": {
            "height": 260,
            "bargap": 0,
            "barmode": "overlay",
            "shapes": limits,
            "yaxis": {"type": "log", "title": {"text": "values"}},
            "xaxis": {"title": {"text": title}},
            "legend": {"orientation": "h", "y": 1.15},
            "margin": {"l": 60, "r": 20, "t": 20, "b": 60},
        },
    }


def sensitivity_bars(measured: MeasuredSensitivities) -> Chart:
    """Return the drop of the metric by layer and width, the most sensitive layer first."""
    sites = list(measured.suggestion)
    drops = [measured.drops(site) for site in sites]
    data = [
        {"type": "bar", "orientation": "h", "name": f"{bits} bits", "y": sites, "x": list(column)}
        for bits, column in zip(measured.widths, zip(*drops, strict=True), strict=True)
    ]
    axis: Chart = {"title": {"text": "drop of the metric"}, "automargin": True}
    if spans_decades([row.drop for row in measured.rows]):
        axis |= {"type": "log", "dtick": 1, "exponentformat": "power"}
    layout = {
        "height": 120 + _ROW_HEIGHT * len(sites) * max(len(data), 1),
        "xaxis": axis,
        "yaxis": {"autorange": "reversed", "automargin": True},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom"},
        "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
    }
    return {"data": data, "layout": layout}


def _heat_map(
    record: RunRecord,
    title: str,
    table: list[list[float | None]],
    unit: str,
    digits: str,
    colours: str | list[list[Any]],
    limits: tuple[float, float],
) -> Chart:
    layers, epochs = record.measured_layers, record.measured
    data: Chart = {
        "type": "heatmap",
        "z": table,
        "x": [f"{number}: epoch {epoch.epoch}" for number, epoch in enumerate(epochs)],
        "y": [layer.label for layer in layers],
        "customdata": [[layer.site] * len(epochs) for layer in layers],
        "zmin": limits[0],
        "zmax": max(limits[1], limits[0] + 1.0),
        "colorscale": colours,
        "colorbar": {"title": {"text": unit}, "thickness": 12},
        "hovertemplate": f"%{{y}}<br>%{{x}}<br>%{{z:{digits}}} {unit}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }
    if len(epochs) <= _NUMBERED:
        data["texttemplate"] = f"%{{z:{digits}}}"
    every = max(1, math.ceil(len(epochs) / 20))
    layout = {
        "title": {"text": title, "font": {"size": 14}},
        "height": min(130 + _ROW_HEIGHT * max(len(layers), 3), _LARGEST_MAP),
        "xaxis": {
            "type": "category",
            "tickvals": data["x"][::every],
            "ticktext": [str(epoch.epoch) for epoch in epochs[::every]],
            "title": {"text": "epoch"},
        },
        "yaxis": {"autorange": "reversed", "automargin": True},
        "margin": {"l": 60, "r": 10, "t": 40, "b": 50},
    }
    return {"data": [data], "layout": layout}


def _table(
    record: RunRecord, value: Callable[[LayerError], float | None]
) -> list[list[float | None]]:
    """Return one row per layer and one column per epoch, None where nothing was measured."""
    columns = [{error.site: value(error) for error in epoch.layers} for epoch in record.measured]
    return [
        [rounded(column.get(layer.site)) for column in columns] for layer in record.measured_layers
    ]


def _numbers(table: list[list[float | None]]) -> list[float]:
    return [x for row in table for x in row if x is not None]


def rounded(x: float | None) -> float | None:
    """Return six significant digits, None for what JSON has no word for."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.6g}")


_LINES: tuple[tuple[str, str, Callable[[LayerError], float]], ...] = (
    ("accumulated", "solid", lambda error: error.sqnr),
    ("isolated", "dot", lambda error: error.isolated_sqnr),
)
_COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b"),
    *("#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#393b79", "#637939"),
)
