"""Printing tables."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from lightning_linger.core.table import Table


def print_table(table: Table[Any]) -> None:
    """Print a table: drawn on a terminal, else as plain lines, which no width cuts off."""
    if sys.stdout.isatty():
        Console().print(table)
    else:
        print(table)
