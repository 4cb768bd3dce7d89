"""Dumps: every op of a run in a folder of its own, and what reads them back."""

from lightning_linger.analysis.dumps.diff import (
    DumpDifference,
    DumpDifferences,
    compare_references,
    diff_dumps,
)
from lightning_linger.analysis.dumps.dumper import Dumper
from lightning_linger.analysis.dumps.reader import (
    Dump,
    DumpedOp,
    DumpedTensor,
    DumpedValue,
    read_dump,
)

__all__ = [
    "Dump",
    "DumpDifference",
    "DumpDifferences",
    "DumpedOp",
    "DumpedTensor",
    "DumpedValue",
    "Dumper",
    "compare_references",
    "diff_dumps",
    "read_dump",
]
