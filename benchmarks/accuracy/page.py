"""The results as tables of docs/accuracy.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.accuracy.recipes import (
    BITS,
    FLOAT,
    FROZEN,
    FROZEN_TASK,
    LEARNED,
    PEERS,
    PLAN,
    SCHEMES,
    STILL,
    Recipe,
    ours,
    peer,
)
from benchmarks.accuracy.results import SEEDS, Results, Summary, behind
from benchmarks.accuracy.tasks import TASKS, Task

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "accuracy.md"
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# What stands next to other libraries; the last has asymmetric activations as they do.
COMPARED = ("linger", "onnxruntime", "tflite")
# Bits, which methods count, and how far behind float they may be, in points.
TARGETS: tuple[tuple[int, tuple[str, ...], float], ...] = (
    (8, ("absmax", *LEARNED), 0.1),
    (4, LEARNED, 1.0),
)


def planned(task: str) -> list[Recipe]:
    """Return the recipes of a task's table in its order: by flow, scheme, method, bits."""
    found = {recipe.name: recipe for step in PLAN if task in step.tasks for recipe in step.recipes}
    flows, schemes = ("PTQ", "QAT", "peer"), [*SCHEMES, *PEERS]
    inner = [recipe for recipe in found.values() if recipe != FLOAT and recipe.still is None]
    return sorted(inner, key=lambda r: (flows.index(r.flow), schemes.index(r.scheme), r.method))


def cell(summary: Summary | None, seeds: int, sign: str = "") -> str:
    """Return ``mean ± deviation``, and of how many seeds where some are missing."""
    if summary is None:
        return ""
    text = f"{summary.mean:{sign}.2f} ± {summary.deviation:.2f}"
    return text if summary.seeds == seeds else f"{text} ({summary.seeds} of {seeds} seeds)"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def heading(task: Task) -> str:
    """Return the heading of a network's table."""
    return f"### {task.title[0].upper()}{task.title[1:]}"


def summary_of(results: Results, task: str, recipe: Recipe) -> Summary | None:
    """Return mean and deviation of a recipe's accuracies over the seeds that every recipe has."""
    accuracies = results.accuracies(task, recipe, range(SEEDS))
    return Summary.of(accuracies.values()) if accuracies else None


def accuracies(results: Results) -> str:
    """Return one table per task that has results."""
    parts = []
    for name, task in TASKS.items():
        reference = summary_of(results, name, FLOAT)
        if reference is None:
            continue
        rows = by_method(results, name, reference.seeds)
        count = f"{reference.seeds} seeds"
        parts += [heading(task), f"Float: {cell(reference, reference.seeds)} %, {count}."]
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


def verdict(difference: Summary, target: float) -> str:
    """Say whether a target is met; undecided if it is missed by less than the standard error."""
    if difference.mean >= target:
        return "met"
    return "undecided" if difference.mean + difference.error >= target else "missed"


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
                    what = (task.title, recipe.scheme, recipe.method, str(bits))
                    found = (str(difference.seeds), cell(difference, difference.seeds, "+"))
                    rows.append((*what, *found, f"{-margin:+.1f}", verdict(difference, -margin)))
    head = ("task", "scheme", "ranges", "bits", "seeds", "QAT - float", "target", "")
    return table(head, rows)


def peers(results: Results) -> str:
    """Return how this library compares with others, seed by seed, a table for each network."""
    return "\n\n".join(part for task in TASKS for part in compared(results, task, peers_of(task)))


def peers_of(task: str) -> list[str]:
    """Return the names of the libraries that train a task's network."""
    found = {recipe.scheme for recipe in planned(task) if recipe.flow == "peer"}
    return [name for name in PEERS if name in found]


def compared(results: Results, task: str, others: Sequence[str]) -> tuple[str, ...]:
    """Return a title and the table of one network, nothing where nobody else trains it."""
    rows = []
    for bits in BITS:
        own = [ours(scheme, "QAT", LEARNED[0], bits) for scheme in COMPARED]
        theirs = [peer(name, bits) for name in others]
        found = [results.accuracies(task, recipe) for recipe in (*own, *theirs)]
        if any(found[len(own) :]):
            seeds = set.intersection(*(set(one) for one in found if one))
            found = [{seed: one[seed] for seed in seeds & one.keys()} for one in found]
            means = [Summary.of(one.values()) if one else None for one in found]
            differences = [behind(found[len(own) - 1], one) for one in found[len(own) :]]
            cells = [cell(mean, len(seeds)) for mean in means]
            cells += [cell(difference, len(seeds), "+") for difference in differences]
            rows.append((str(bits), str(len(seeds)), *cells))
    if not rows:
        return ()
    schemes = [f"`{scheme}`, {LEARNED[0]}" for scheme in COMPARED]
    minus = [f"`{COMPARED[-1]}` - {name}" for name in others]
    return heading(TASKS[task]), table(("bits", "seeds", *schemes, *others, *minus), rows)


def frozen(results: Results) -> str:
    """Return what it is worth that statistics and ranges stand still in the last part of QAT."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for recipe in FROZEN:
        key = (recipe.scheme, recipe.method, str(recipe.bits))
        text = cell(summary_of(results, FROZEN_TASK, recipe), SEEDS)
        rows.setdefault(key, []).append(text)
    head = ("scheme", "ranges", "bits", *STILL)
    return table(head, [(*key, *cells) for key, cells in rows.items()])


TABLES: dict[str, Callable[[Results], str]] = {
    "accuracies": accuracies,
    "targets": targets,
    "frozen": frozen,
    "peers": peers,
}


def page(text: str, results: Results) -> str:
    """Return the page with its tables as the results are now."""
    return MARK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]](results)}\n\n{found[3]}", text)
