"""Results on disk: one JSON line per run, so that a run can be cut short and go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy.recipes import Recipe
from benchmarks.accuracy.tasks import TASKS, Task
from benchmarks.accuracy.training import Score
from lightning_linger.export.files import write_atomically

# How many seeds every recipe has; some have more, where a difference is close to its target.
SEEDS = 5
STORED = Path(__file__).parents[1] / "results" / "accuracy.jsonl"


class Key(NamedTuple):
    """What was run."""

    task: str
    seed: int
    recipe: str


def settings_of(task: Task, recipe: Recipe) -> str:
    """Return a short digest of what a result depends on: a changed setting makes it stale."""
    frozen_from = (recipe.statistics_frozen_from(task), recipe.ranges_frozen_from(task))
    numbers: tuple[float, ...] = (
        *(task.epochs, task.tuning_epochs, task.learning_rate, task.tuning_rate),
        *(epoch for epoch in frozen_from if epoch is not None),
    )
    fields = {name: recipe.fields[name] for name in sorted(recipe.fields)}
    return hashlib.sha256(repr((numbers, fields)).encode()).hexdigest()[:8]


class Results:
    """The scores of all runs, kept in a file.

    Args:
        path: JSON lines; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[Key, dict[str, object]] = {}
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            entry = json.loads(line)
            self._lines[Key(entry["task"], entry["seed"], entry["recipe"])] = entry

    def get(self, task: Task, seed: int, recipe: Recipe) -> Score | None:
        """Return a score, None where there is none for the present settings."""
        entry = self._lines.get(Key(task.name, seed, recipe.name))
        if entry is None or entry["settings"] != settings_of(task, recipe):
            return None
        fields: dict[str, Any] = {f.name: entry[f.name] for f in dataclasses.fields(Score)}
        return Score(**fields)

    def put(self, task: Task, seed: int, recipe: Recipe, score: Score) -> None:
        """Keep a score, in the file too."""
        key = Key(task.name, seed, recipe.name)
        settings = settings_of(task, recipe)
        entry = {**key._asdict(), "settings": settings, **dataclasses.asdict(score)}
        self._lines[key] = entry
        lines = (json.dumps(self._lines[key]) for key in sorted(self._lines))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, ("\n".join(lines) + "\n").encode())

    def seeds(self) -> list[int]:
        """Return the seeds there are results of."""
        return sorted({key.seed for key in self._lines})

    def accuracies(
        self, task: str, recipe: Recipe, seeds: Container[int] | None = None
    ) -> dict[int, float]:
        """Return the accuracies in percent by seed, of all seeds or of some."""
        chosen = [seed for seed in self.seeds() if seeds is None or seed in seeds]
        scores = {seed: self.get(TASKS[task], seed, recipe) for seed in chosen}
        return {seed: 100 * s.correct / s.count for seed, s in scores.items() if s is not None}


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over the seeds."""

    mean: float
    deviation: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary:
        """Summarize one value per seed."""
        values = list(values)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.mean(values), deviation, len(values))

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.deviation / math.sqrt(self.seeds)


def behind(accuracies: Mapping[int, float], reference: Mapping[int, float]) -> Summary | None:
    """Summarize the differences to a reference, seed by seed."""
    shared = sorted(accuracies.keys() & reference.keys())
    return Summary.of(accuracies[seed] - reference[seed] for seed in shared) if shared else None
