"""Sensitivities as a table, and as a file that is read back."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_linger.analysis.saving import save_table
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.table import Table

Part = Literal["weights", "activations", "both"]

PARTS: tuple[Part, ...] = ("weights", "activations", "both")

_COLUMNS = ("site", "bits", "drop")


@dataclass(frozen=True)
class SensitivityRow:
    """What one layer costs at one width.

    Args:
        site: Site key, or dotted path of the layer: a pattern of ``overrides`` that matches it.
        bits: Width of the layer.
        drop: By how much the metric is worse, in its own unit; negative if it is better.
        part: What had this width: ``weights``, ``activations`` (inputs and outputs), or ``both``.
    """

    site: str
    bits: int
    drop: float
    part: str = "both"


class Sensitivities(Table[SensitivityRow]):
    """One row per layer and width, in the order of the model."""

    row_type = SensitivityRow
    digits = 4

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table: as CSV or JSON if the name ends so, else as text.

        Returns:
            The path.

        Raises:
            ConfigError: If it cannot be written.
        """
        return save_table(self, path)


def read_sensitivities(path: Path) -> Sensitivities:
    """Read a CSV file with the columns ``site``, ``bits``, ``drop``, and perhaps ``part``.

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
    places = (f"line {number} of {str(path)!r}" for number in range(2, len(lines) + 2))
    return Sensitivities([_row(line, place) for line, place in zip(lines, places, strict=True)])


def _row(line: dict[str, str], place: str) -> SensitivityRow:
    try:
        part = line.get("part") or "both"
        row = SensitivityRow(line["site"], int(line["bits"]), float(line["drop"]), part)
    except (TypeError, ValueError) as error:
        msg = f"{place}: `bits` must be an integer and `drop` a number. Found: {line}."
        raise ConfigError(msg) from error
    if not row.site or row.bits < 1 or not math.isfinite(row.drop) or row.part not in PARTS:
        msg = (
            f"{place}: `site` must be named, `bits` positive, `drop` finite, and `part` one of "
            f"{PARTS}. Found: {line}."
        )
        raise ConfigError(msg)
    return row
