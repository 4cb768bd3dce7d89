"""Rows of one kind that print as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar, overload

Row = TypeVar("Row")


class Table(Generic[Row]):
    """A list of rows, which are dataclasses, that prints as a table with a column per field.

    Args:
        rows: The rows.
    """

    row_type: ClassVar[Any]
    # Significant digits of numbers that are not whole; None shows all.
    digits: ClassVar[int | None] = None

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows in order."""
        return iter(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """Return a row or a list of rows."""
        return self._rows[index]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} rows>"

    def __str__(self) -> str:
        """Return a plain-text table."""
        columns = zip(*[self.titles(), *self.cells()], strict=True)
        lines = zip(*map(_justified, columns), strict=True)
        return "\n".join("  ".join(line).rstrip() for line in lines)

    def __rich__(self) -> Any:
        """Return a rich table."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(*self.titles())
        for cells in self.cells():
            table.add_row(*map(Text, cells))
        return table

    def titles(self) -> list[str]:
        """Return the titles of the columns."""
        return [field.name for field in dataclasses.fields(self.row_type)]

    def cells(self) -> list[list[str]]:
        """Return what the cells say, row by row."""
        return [[self._shown(getattr(row, title)) for title in self.titles()] for row in self]

    def _shown(self, cell: Any) -> str:
        if self.digits is not None and isinstance(cell, float):
            return f"{cell:.{self.digits}g}"
        return str(cell)


def _justified(column: Sequence[str]) -> list[str]:
    """Bring the cells of a column to one width; whole numbers stand at the right."""
    width = max(map(len, column))
    numbers = all(cell.replace(",", "").isdigit() for cell in column[1:])
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in column]
