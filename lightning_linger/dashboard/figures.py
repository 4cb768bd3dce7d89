"""The pictures as matplotlib figures, for loggers that take images."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.dashboard.records import (
    STAGES,
    Layer,
    LayerError,
    RunRecord,
    ValueHistogram,
)
from lightning_linger.dashboard.sensitivity import MeasuredSensitivities, spans_decades
from lightning_linger.dashboard.timeline import labelled_spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More columns than this show no numbers in their cells.
_NUMBERED = 12
_MOST_ROWS = 120
_DOTS_PER_INCH = 90
FLOAT_COLOUR, GRID_COLOUR, CLIP_COLOUR = "#7a7a7a", "#1f77b4", "#d62728"
STAGE_COLOURS = {"fuse_bn": "#8c6bb1", "normalize": "#2ca25f", "quantize": "#e6550d"}


def matplotlib_is_installed() -> bool:
    """Whether figures can be drawn."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that no global state of matplotlib knows, inches.

    Raises:
        UnsupportedError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = 'figures need matplotlib: `pip install "lightning-linger[plots]"`.'
        raise UnsupportedError(msg) from error
    return Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")


def pixels(figure: Figure) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a figure as ``[height, width, 3]``, 0 to 255."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def error_heat_map(record: RunRecord, title: str, value: Callable[[LayerError], float]) -> Figure:
    """Draw SQNR against float, in dB, by layer and epoch."""
    layers = record.measured_layers[:_MOST_ROWS]
    figure = new_figure(_map_width(record), _map_height(layers))
    axes = figure.subplots()
    # Both maps have one scale, so that they compare.
    both = [error for epoch in record.measured for error in epoch.layers]
    ratios = [x for e in both for x in (e.sqnr, e.isolated_sqnr) if math.isfinite(x)]
    limits = min(ratios, default=0.0), max(ratios, default=1.0)
    image = _heat_map(axes, _table(record, layers, value), title, "{:.0f}", "viridis", *limits)
    _name_axes(axes, record, layers)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05)
    bar.set_label("SQNR against float [dB]\n20 dB: 10 % noise, 40 dB: 1 %")
    return figure


def mismatch_heat_map(record: RunRecord) -> Figure:
    """Draw the share of integer codes that differ from fake-quant by layer and epoch."""
    layers = record.measured_layers[:_MOST_ROWS]
    figure = new_figure(_map_width(record), _map_height(layers))
    axes = figure.subplots()
    table = _table(record, layers, lambda e: e.mismatch_rate) * 1e6
    high = max(float(np.nanmax(table)) if np.isfinite(table).any() else 0.0, 1.0)
    title = "integer codes that differ\nfrom fake-quant"
    if not np.nansum(table):
        title += ": none"
    image = _heat_map(axes, table, "", "{:.0f}", "Reds", 0.0, high)
    _name_axes(axes, record, layers)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05).set_label("codes of a million")
    return figure


def stage_timeline(record: RunRecord) -> Figure:
    """Draw which stage is on at which step, above the user's metrics."""
    figure = new_figure(9, 3.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.6))
    for row, stage in enumerate(STAGES):
        for span in labelled_spans(record, stage):
            length, colour = span.end - span.start, STAGE_COLOURS[stage]
            bar = top.barh(row, length, 0.7, span.start, color=colour, edgecolor="white")
            top.bar_label(bar, [span.label], label_type="center", fontsize=7, color="white")
    top.set_yticks(range(len(STAGES)), STAGES)
    top.invert_yaxis()
    top.set_title("stages that are on", fontsize=10, loc="left")
    for name in sorted({name for epoch in record.epochs for name in epoch.metrics}):
        points = [(e.step, e.metrics[name]) for e in record.epochs if name in e.metrics]
        bottom.plot(*zip(*points, strict=True), marker=".", label=name)
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    if bottom.lines:
        bottom.legend(fontsize=8)
    return figure


def value_histograms(record: RunRecord, sites: Sequence[str]) -> Figure:
    """Draw how float and quantized values of some layers lie, with the clip limits."""
    histograms = [record.histograms[site] for site in sites if site in record.histograms]
    columns = min(len(histograms), 2) or 1
    rows = math.ceil(len(histograms) / columns) or 1
    figure = new_figure(6 * columns, 2.4 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(histograms) :]:
        axes.set_axis_off()
    for axes, histogram in zip(grid.flat, histograms, strict=False):
        _draw_histogram(axes, histogram, record.layer(histogram.site))
    if histograms:
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9)
    return figure


def sensitivity_bars(measured: MeasuredSensitivities) -> Figure:
    """Draw the drop of the metric by layer and width, the most sensitive layer first."""
    suggestion = measured.suggestion
    sites = list(suggestion)[:_MOST_ROWS]
    widths = measured.widths
    figure = new_figure(7.5, 1.4 + 0.16 * len(sites) * max(len(widths), 2))
    axes = figure.subplots()
    height = 0.8 / max(len(widths), 1)
    for number, bits in enumerate(widths):
        drops = [measured.drops(site)[number] or 0.0 for site in sites]
        places = [row + (number - (len(widths) - 1) / 2) * height for row in range(len(sites))]
        axes.barh(places, drops, height, label=f"{bits} bits")
    labels = [f"{site}  ({suggestion[site]} bits)" for site in sites]
    axes.set_yticks(range(len(sites)), labels, fontsize=8)
    axes.invert_yaxis()
    if spans_decades([row.drop for row in measured.rows]):
        axes.set_xscale("log")
    axes.set_xlabel("drop of the metric (suggested width in brackets)", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _draw_histogram(axes: Axes, histogram: ValueHistogram, layer: Layer) -> None:
    edges = histogram.edges
    axes.stairs(
        histogram.reference, edges, fill=True, color=FLOAT_COLOUR, alpha=0.45, label="float"
    )
    axes.stairs(histogram.quantized, edges, color=GRID_COLOUR, linewidth=1.4, label="quantized")
    axes.axvline(histogram.low, color=CLIP_COLOUR, linestyle="--", linewidth=1)
    axes.axvline(
        histogram.high, color=CLIP_COLOUR, linestyle="--", linewidth=1, label="clip limits"
    )
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_xlim(edges[0], edges[-1])
    limits = f"{histogram.low:.4g} to {histogram.high:.4g}, {histogram.clipped:.1%} clipped"
    axes.set_title(f"{layer.label}: {limits}", fontsize=9)
    axes.tick_params(labelsize=8)


def _heat_map(
    axes: Axes, table: Any, title: str, number: str, colours: str, low: float, high: float
) -> Any:
    # A flat table still needs a scale.
    high = max(high, low + 1.0)
    image = axes.imshow(table, aspect="auto", cmap=colours, vmin=low, vmax=high)
    axes.set_title(title, fontsize=10)
    if table.shape[1] <= _NUMBERED:
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                shade = (float(value) - low) / (high - low)
                dark = shade > 0.55 if colours == "Reds" else shade < 0.55
                axes.text(
                    *(column, row, number.format(value)),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
    return image


def _name_axes(axes: Axes, record: RunRecord, layers: Sequence[Layer]) -> None:
    epochs = [epoch.epoch for epoch in record.measured]
    every = math.ceil(len(epochs) / 20)
    axes.set_xticks(range(0, len(epochs), every), [str(e) for e in epochs[::every]], fontsize=8)
    axes.set_xlabel("epoch")
    axes.set_yticks(range(len(layers)), [layer.label for layer in layers], fontsize=8)


def _table(
    record: RunRecord, layers: Sequence[Layer], value: Callable[[LayerError], float | None]
) -> Any:
    """Return ``[layers, epochs]``, NaN where nothing was measured."""
    rows = {layer.site: row for row, layer in enumerate(layers)}
    table = np.full((len(layers), len(record.measured)), np.nan)
    for column, epoch in enumerate(record.measured):
        for error in epoch.layers:
            found = value(error)
            if error.site in rows and found is not None:
                table[rows[error.site], column] = found
    return table


def _map_width(record: RunRecord) -> float:
    return 3.2 + min(max(2.6, 0.34 * len(record.measured)), 7.0)


def _map_height(layers: Sequence[Layer]) -> float:
    return 1.2 + 0.22 * max(len(layers), 4)
