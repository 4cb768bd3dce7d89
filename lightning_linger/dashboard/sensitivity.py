"""Sensitivities as a table of layers and widths, with the widths that are suggested."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_linger.analysis.sensitivity import SensitivityRow, read_sensitivities
from lightning_linger.core.errors import ConfigError

# Names of the files in the folder of a run.
TABLE_NAME = "sensitivity.csv"
OVERRIDES_NAME = "mixed_precision.json"

Overrides = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class MeasuredSensitivities:
    """What is known of a run.

    Args:
        rows: Sensitivities.
        overrides: What was chosen under a budget; empty without one.
        tolerance: Without a choice, the drop of the metric that a suggested width may cost.
    """

    rows: Sequence[SensitivityRow] = ()
    overrides: Overrides = field(default_factory=dict)
    tolerance: float = 0.0

    @property
    def widths(self) -> list[int]:
        """The widths that were measured."""
        return sorted({row.bits for row in self.rows})

    @property
    def suggestion(self) -> dict[str, int]:
        """The suggested width of each layer, the most sensitive layer first."""
        suggested = suggest_bits(self.rows, self.tolerance)
        return {site: self._chosen(site, bits) for site, bits in suggested.items()}

    @property
    def reason(self) -> str:
        """Where the suggestion comes from."""
        if self.overrides:
            return "Suggested: the widths with the least sum of drops under the budget of the run."
        return (
            "Suggested: the narrowest width at which the metric drops by no more than "
            f"{self.tolerance:g}."
        )

    def drops(self, site: str) -> list[float | None]:
        """Return the drop of a layer at each of the widths."""
        found = {row.bits: row.drop for row in self.rows if row.site == site}
        return [found.get(bits) for bits in self.widths]

    def markdown(self) -> str:
        """Return a table of layers and widths."""
        titles = ["layer", *(f"{bits} bits" for bits in self.widths), "suggested"]
        lines = [
            [
                f"`{site}`",
                *("" if drop is None else f"{drop:.3g}" for drop in self.drops(site)),
                str(bits),
            ]
            for site, bits in self.suggestion.items()
        ]
        rows = [titles, ["---"] * len(titles), *lines]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
        return f"Drop of the metric by layer and width. {self.reason}\n\n{table}\n"

    def _chosen(self, site: str, bits: int) -> int:
        fields = self.overrides.get(site, {})
        return int(fields.get("weight_bits", fields.get("activation_bits", bits)))


def read_measured(folder: Path) -> MeasuredSensitivities:
    """Read what a run has left in its folder; nothing if it has measured no sensitivities.

    Raises:
        ConfigError: If a file is damaged.
    """
    table, overrides = folder / TABLE_NAME, folder / OVERRIDES_NAME
    if not table.is_file():
        return MeasuredSensitivities()
    rows = list(read_sensitivities(table))
    if not overrides.is_file():
        return MeasuredSensitivities(rows)
    try:
        chosen = json.loads(overrides.read_text(encoding="utf-8"))
        return MeasuredSensitivities(rows, {str(site): dict(x) for site, x in chosen.items()})
    except (ValueError, AttributeError, TypeError) as error:
        msg = f"{str(overrides)!r} holds no overrides: {error}."
        raise ConfigError(msg) from error


def suggest_bits(rows: Iterable[SensitivityRow], tolerance: float) -> dict[str, int]:
    """Return, by site, the narrowest width at which the metric drops by no more than ``tolerance``.

    A width counts only if every wider one that was measured is within the tolerance too. A site
    that is at no width gets its widest. The most sensitive site comes first.
    """
    by_site: dict[str, dict[int, float]] = {}
    for row in rows:
        by_site.setdefault(row.site, {})[row.bits] = row.drop
    found = {}
    for site in sorted(by_site, key=lambda site: -max(by_site[site].values())):
        widths = sorted(by_site[site], reverse=True)
        chosen = widths[0]
        for bits in widths:
            if by_site[site][bits] > tolerance:
                break
            chosen = bits
        found[site] = chosen
    return found


def spans_decades(drops: Sequence[float]) -> bool:
    """Whether drops are all positive and so different that only a logarithm shows them together."""
    return bool(drops) and min(drops) > 0 and max(drops) > 100 * min(drops)
