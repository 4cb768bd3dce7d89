"""How much the model's metric loses per layer and width, as a table and as a suggestion."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_linger.core.errors import ConfigError

_COLUMNS = ("site", "bits", "drop")


@dataclass(frozen=True)
class SensitivityRow:
    """What one layer costs at one width, all others left as they were.

    Args:
        site: Site key, or dotted path of the layer.
        bits: Width of the layer.
        drop: By how much the metric is worse, in its own unit; negative if it is better.
    """

    site: str
    bits: int
    drop: float


def read_sensitivities(path: Path) -> list[SensitivityRow]:
    """Read a CSV file with the columns ``site``, ``bits`` and ``drop``.

    Raises:
        ConfigError: If the file cannot be read, lacks a column, or holds something else.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read {str(path)!r}: {error}."
        raise ConfigError(msg) from error
    if not lines or not set(_COLUMNS) <= set(lines[0]):
        msg = f"{str(path)!r} needs a header with the columns {', '.join(_COLUMNS)}, and rows."
        raise ConfigError(msg)
    return [_row(line, f"line {number} of {str(path)!r}") for number, line in enumerate(lines, 2)]


def _row(line: dict[str, str], place: str) -> SensitivityRow:
    try:
        row = SensitivityRow(line["site"], int(line["bits"]), float(line["drop"]))
    except (TypeError, ValueError) as error:
        msg = f"{place}: `bits` must be an integer and `drop` a number. Found: {line}."
        raise ConfigError(msg) from error
    if not row.site or row.bits < 1 or not math.isfinite(row.drop):
        msg = f"{place}: `site` must be named, `bits` positive and `drop` finite. Found: {line}."
        raise ConfigError(msg)
    return row


def suggest_bits(rows: Sequence[SensitivityRow], tolerance: float) -> dict[str, int]:
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
