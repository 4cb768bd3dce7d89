"""Tables as files."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from lightning_linger.core.table import Table
from lightning_linger.export.files import check_target, write_atomically


def save_table(table: Table[Any], path: str | os.PathLike[str]) -> Path:
    """Write a table: as CSV or JSON if the name ends so, else as text.

    Returns:
        The path.

    Raises:
        ConfigError: If it cannot be written.
    """
    target = check_target(path)
    ending = target.suffix.lower()
    rows = [dataclasses.asdict(row) for row in table]
    if ending == ".json":
        plain = [_without_infinity(row) for row in rows]
        text = json.dumps(plain, indent=1, allow_nan=False) + "\n"
    elif ending == ".csv":
        buffer = io.StringIO()
        names = [field.name for field in dataclasses.fields(table.row_type)]
        writer = csv.DictWriter(buffer, names)
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    else:
        text = f"{table}\n"
    write_atomically(target, text.encode())
    return target


def _without_infinity(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {name: None if value == math.inf else value for name, value in row.items()}
