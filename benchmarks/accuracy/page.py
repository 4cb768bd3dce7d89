"""The results as tables of docs/accuracy.md and as a figure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.accuracy.recipes import (
    BITS,
    FLOAT,
    LEARNED,
    PEERS,
    PLAN,
    SCHEMES,
    Recipe,
    ours,
    peer,
)
from benchmarks.accuracy.results import Results, Summary, behind
from benchmarks.accuracy.tasks import TASKS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "accuracy.md"
FIGURE = DOCS / "images" / "accuracy.png"
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# What stands next to other libraries; the last has asymmetric activations as they do.
COMPARED = ("linger", "onnxruntime", "tflite")
# Bits, which methods count, and how far behind float they may be, in points.
TARGETS: tuple[tuple[int, tuple[str, ...], float], ...] = (
    (8, ("absmax", *LEARNED), 0.1),
    (4, LEARNED, 1.0),
)


def planned(task: str) -> list[Recipe]:
    """Return the recipes of a task in the order of its table: by flow, scheme, method, bits."""
    found = {recipe.name: recipe for step in PLAN if task in step.tasks for recipe in step.recipes}
    flows, schemes = ("PTQ", "QAT", "peer"), [*SCHEMES, *PEERS]
    inner = [recipe for recipe in found.values() if recipe != FLOAT]
    return sorted(inner, key=lambda r: (flows.index(r.flow), schemes.index(r.scheme), r.method))


def cell(summary: Summary | None, seeds: int | None = None) -> str:
    """Return ``mean ± deviation``, and of how many seeds where some are missing."""
    if summary is None:
        return ""
    text = f"{summary.mean:.2f} ± {summary.deviation:.2f}"
    return text if seeds in (None, summary.seeds) else f"{text} ({summary.seeds} of {seeds} seeds)"


def signed(summary: Summary | None) -> str:
    """Return a difference with its sign."""
    return "" if summary is None else f"{summary.mean:+.2f} ± {summary.deviation:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary_of(results: Results, task: str, recipe: Recipe) -> Summary | None:
    """Return mean and deviation of a recipe's accuracies."""
    accuracies = results.accuracies(task, recipe)
    return Summary.of(accuracies.values()) if accuracies else None


def accuracies(results: Results) -> str:
    """Return one table per task that has results."""
    parts = []
    for name, task in TASKS.items():
        reference = summary_of(results, name, FLOAT)
        if reference is None:
            continue
        rows = by_method(results, name, reference.seeds)
        title = f"### {task.title[0].upper()}{task.title[1:]}"
        parts += [title, f"Float: {cell(reference)} %, {reference.seeds} seeds."]
        parts.append(table(("", "scheme", "ranges", *(f"{bits} bits" for bits in BITS)), rows))
    return "\n\n".join(parts)


def by_method(results: Results, task: str, seeds: int) -> list[tuple[str, ...]]:
    """Return the rows of a task's table, those without any result left out."""
    rows: dict[tuple[str, str, str], dict[int, str]] = {}
    for recipe in planned(task):
        found = summary_of(results, task, recipe)
        if found is not None:
            flow = "QAT" if recipe.flow == "peer" else recipe.flow
            rows.setdefault((flow, recipe.scheme, recipe.method), {})[recipe.bits] = cell(
                found, seeds
            )
    return [(*key, *(cells.get(bits, "") for bits in BITS)) for key, cells in rows.items()]


def targets(results: Results) -> str:
    """Return how far behind float each recipe of a target is."""
    rows = []
    for name, task in TASKS.items():
        reference = results.accuracies(name, FLOAT)
        for recipe in planned(name):
            for bits, methods, margin in TARGETS:
                if recipe.flow != "QAT" or recipe.bits != bits or recipe.method not in methods:
                    continue
                difference = behind(results.accuracies(name, recipe), reference)
                if difference is not None:
                    verdict = "met" if difference.mean >= -margin else "missed"
                    what = (recipe.scheme, recipe.method, f"{bits}", signed(difference))
                    rows.append((task.title, *what, f"{-margin:+.1f}", verdict))
    head = ("task", "scheme", "ranges", "bits", "QAT - float", "target", "")
    return table(head, rows)


def peers(results: Results) -> str:
    """Return how this library compares with others, seed by seed, on the digits CNN."""
    rows = []
    for bits in BITS:
        by_scheme = {
            scheme: results.accuracies("digits", ours(scheme, "QAT", LEARNED[0], bits))
            for scheme in COMPARED
        }
        others = {name: results.accuracies("digits", peer(name, bits)) for name in PEERS}
        differences = [signed(behind(by_scheme[COMPARED[-1]], found)) for found in others.values()]
        found = [*by_scheme.values(), *others.values()]
        means = [cell(Summary.of(values.values())) if values else "" for values in found]
        rows.append((str(bits), *means, *differences))
    schemes = [f"`{scheme}`, {LEARNED[0]}" for scheme in COMPARED]
    return table(
        ("bits", *schemes, *PEERS, *(f"`{COMPARED[-1]}` - {name}" for name in PEERS)), rows
    )


TABLES: dict[str, Callable[[Results], str]] = {
    "accuracies": accuracies,
    "targets": targets,
    "peers": peers,
}


def page(text: str, results: Results) -> str:
    """Return the page with its tables as the results are now."""
    return MARK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]](results)}\n\n{found[3]}", text)


def draw(results: Results, path: Path) -> None:
    """Draw accuracy over bits, one panel per task."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(TASKS), figsize=(4 * len(TASKS), 3.6), squeeze=False)
    for axes, (name, task) in zip(panels[0], TASKS.items(), strict=True):
        reference = summary_of(results, name, FLOAT)
        if reference is not None:
            axes.axhline(reference.mean, color="0.5", linestyle=":", label="float")
        for label, (recipes, style) in _lines(name).items():
            found = [(recipe.bits, summary_of(results, name, recipe)) for recipe in recipes]
            points = [(b, s.mean, s.deviation) for b, s in found if s is not None]
            if points:
                bits, means, deviations = zip(*points, strict=True)
                axes.errorbar(bits, means, deviations, label=label, capsize=2, **style)
        axes.set(title=task.title, xlabel="bits", xticks=sorted(BITS))
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7, loc="lower right")
    panels[0][0].set_ylabel("test accuracy, %")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _lines(task: str) -> dict[str, tuple[list[Recipe], dict[str, str]]]:
    drawn = {"PTQ": ("mse", "--"), "QAT": ("lsq", "-"), "peer": (None, "-.")}
    colors = {name: f"C{index}" for index, name in enumerate((*SCHEMES, *PEERS))}
    lines: dict[str, tuple[list[Recipe], dict[str, str]]] = {}
    for recipe in planned(task):
        method, dashes = drawn[recipe.flow]
        if method in (None, recipe.method) or (recipe.scheme, recipe.flow) == ("nics_fix", "QAT"):
            label = f"{recipe.scheme}, {'QAT' if recipe.flow == 'peer' else recipe.flow}"
            style = {"color": colors[recipe.scheme], "linestyle": dashes, "marker": "."}
            lines.setdefault(label, ([], style))[0].append(recipe)
    return {label: (sorted(r, key=lambda x: x.bits), s) for label, (r, s) in lines.items()}
