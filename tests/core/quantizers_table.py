"""Writes the tables of docs/quantizers.md from the registries.

Run ``python -m tests.core.quantizers_table`` after adding an estimator or a kind of learned range.
"""

from __future__ import annotations

import re
from pathlib import Path

from lightning_linger.core.ranges import ACCUMULATIONS, LEARNED, STATISTICS

PAGE = Path(__file__).parents[2] / "docs" / "quantizers.md"
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def ranges() -> str:
    """Return the table of statistics."""
    lines = ["| name | range | all batches together (no prefix) |", "| --- | --- | --- |"]
    for name, statistic in STATISTICS.items():
        together = "histogram" if statistic.pools else "the widest of the batches"
        lines.append(f"| `{name}` | {statistic.about} | {together} |")
    lines.append("| `99.9%` | a percentile of the magnitudes | histogram |")
    return "\n".join(lines)


def accumulations() -> str:
    """Return the table of prefixes."""
    lines = ["| prefix | batches |", "| --- | --- |"]
    for name, about in ACCUMULATIONS.items():
        lines.append(f"| {'none' if name == 'all' else f'`{name}_`'} | {about} |")
    return "\n".join(lines)


def learned() -> str:
    """Return the table of learned ranges."""
    lines = [
        "| name | parameter | starts from (activations) | starts from (weights) |",
        "| --- | --- | --- | --- |",
    ]
    for name, kind in LEARNED.items():
        weights = "not for weights" if kind.weight_start is None else f"`{kind.weight_start}`"
        lines.append(f"| `{name}` | {kind.about} | `{kind.start}` | {weights} |")
    return "\n".join(lines)


TABLES = {"ranges": ranges, "accumulations": accumulations, "learned": learned}


def page(text: str) -> str:
    """Return the page with its tables as they are now."""
    return MARK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
