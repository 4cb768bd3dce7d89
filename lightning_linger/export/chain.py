"""What the nodes of a file do: rows for reports, whatever the dialect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lightning_linger.core.table import Table

# What a node does.
ENTERS, LEAVES, INTEGER, MOVES, REAL = "enters", "leaves", "integer", "moves", "float"


@dataclass(frozen=True)
class NodeRow:
    """One node.

    Args:
        node: Its name.
        op: Its op type.
        does: ``enters`` or ``leaves`` integers, computes in them (``integer``), ``moves`` codes, or
            works on real values, places and sizes (``float``).
        reads: The codes of its operands.
        gives: The codes of its results.
    """

    node: str
    op: str
    does: str
    reads: str
    gives: str


class Chain(Table[NodeRow]):
    """The nodes in their order."""

    row_type = NodeRow


class Walk(Protocol):
    """A pass through a graph that notes what its nodes do."""

    @property
    def rows(self) -> Sequence[NodeRow]:
        """The nodes in their order."""
        ...

    @property
    def left(self) -> Mapping[str, object]:
        """Real values that were codes, and which codes."""
        ...

    @property
    def problems(self) -> list[str]:
        """What contradicts itself."""
        ...

    def run(self) -> None:
        """Go through the nodes."""
        ...


def listed(states: Iterable[object]) -> str:
    """Return what is known of several values."""
    return ", ".join(str(state) for state in states if state is not None)
