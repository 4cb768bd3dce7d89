"""The results as a figure: accuracy over bits, one panel per task."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy.page import DOCS, planned, summary_of
from benchmarks.accuracy.recipes import BITS, FLOAT, PEERS, SCHEMES
from benchmarks.accuracy.results import Results
from benchmarks.accuracy.tasks import TASKS

FIGURE = DOCS / "images" / "accuracy.png"
# Below, a network is of no use, and how far below does not matter.
LOWEST = 60.0
COLUMNS = 3
TITLE_WIDTH = 34

COLORS = {name: f"C{index}" for index, name in enumerate((*SCHEMES, *PEERS))}
DASHES = {"PTQ": "--", "QAT": "-", "peer": "-."}


class Line(NamedTuple):
    """What is connected: the recipes of a scheme that differ in bits alone."""

    scheme: str
    flow: str
    method: str


# By task all of these that were run.
LINES: tuple[Line, ...] = (
    *(Line(name, "QAT", "lsq") for name in ("linger", "onnxruntime", "tflite")),
    *(Line(name, "PTQ", "mse") for name in ("linger", "onnxruntime")),
    Line("nics_fix", "QAT", "last_absmax"),
    *(Line(name, "peer", method) for name, method in PEERS.items()),
)


def draw(results: Results, path: Path) -> None:
    """Draw accuracy over bits into a PNG file, with a panel for each task that was run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = {name: summary_of(results, name, FLOAT) for name in TASKS}
    shown = {name: found for name, found in shown.items() if found is not None}
    columns, rows = min(len(shown), COLUMNS) or 1, math.ceil(len(shown) / COLUMNS) or 1
    size = (4 * columns, 3.8 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (name, reference) in zip(panels.flat, shown.items(), strict=False):
        axes.axhline(reference.mean, color="0.5", linestyle=":", label="float")
        for line in LINES:
            draw_line(axes, results, line, name)
        title = textwrap.fill(TASKS[name].title, TITLE_WIDTH)
        axes.set(title=title, xlabel="bits", xticks=sorted(BITS))
        axes.set_xlim(min(BITS) - 0.3, max(BITS) + 0.3)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], LOWEST))
        axes.legend(fontsize=7, loc="lower right")
    for axes in panels[:, 0]:
        axes.set_ylabel("test accuracy, %")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_line(axes: Any, results: Results, line: Line, task: str) -> None:
    """Draw mean and deviation of the recipes that were run."""
    recipes = [r for r in planned(task) if Line(r.scheme, r.flow, r.method) == line]
    points = {r.bits: found for r in recipes if (found := summary_of(results, task, r))}
    if not points:
        return
    bits = sorted(points)
    axes.errorbar(
        bits,
        [points[b].mean for b in bits],
        [points[b].deviation for b in bits],
        label=f"{line.scheme}, {'QAT' if line.flow == 'peer' else line.flow}",
        color=COLORS[line.scheme],
        linestyle=DASHES[line.flow],
        marker=".",
        capsize=2,
    )
