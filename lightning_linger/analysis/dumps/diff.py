"""Where two dumps differ first, and which ops are furthest from their reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lightning_linger.analysis.dumps.dumper import ARGUMENT, FLOAT, INTEGER, RESULT
from lightning_linger.analysis.dumps.reader import (
    Dump,
    DumpedOp,
    DumpedTensor,
    DumpedValue,
    read_dump,
)
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.table import Table


@dataclass(frozen=True)
class DumpDifference:
    """A value that is not the same on both sides.

    Args:
        op: Folder of the op within the dump.
        module: The module that called it.
        value: File name of the value, empty if a whole op is on one side only.
        found: What differs: ``values``, ``type``, ``shape``, ``scale``, ``content``, ``only in the
            first`` or ``only in the second``.
        mismatches: How many of the dumped numbers differ.
        elements: Of how many.
        max_error: Largest difference, infinite where only one side is finite.
        mean_error: Mean of the differences that are finite.
    """

    op: str
    module: str
    value: str
    found: str
    mismatches: int = 0
    elements: int = 0
    max_error: float = 0.0
    mean_error: float = 0.0


class DumpDifferences(Table[DumpDifference]):
    """The differences in execution order: arguments, what an op calls, its result."""

    row_type = DumpDifference
    digits = 4

    @property
    def first(self) -> DumpDifference | None:
        """The first difference, None if there is none."""
        return self[0] if len(self) else None

    def ranked(self) -> DumpDifferences:
        """Return them by their largest error, then by their mean error, worst first."""
        return DumpDifferences(sorted(self, key=lambda row: (-row.max_error, -row.mean_error)))


def diff_dumps(
    first: str | os.PathLike[str] | Dump, second: str | os.PathLike[str] | Dump
) -> DumpDifferences:
    """Compare two dumps op by op.

    Two tensors are equal if all dumped numbers are; NaN equals NaN, strides do not matter. What a
    site of a prepared model does inside is compared only if it takes or gives something else.

    Returns:
        What differs, in execution order; empty if nothing does.

    Raises:
        ConfigError: If a folder is no dump, or the dumps have different levels.
    """
    a = first if isinstance(first, Dump) else read_dump(first)
    b = second if isinstance(second, Dump) else read_dump(second)
    if a.level != b.level:
        msg = (
            f"{str(a.folder)!r} has level {a.level}, {str(b.folder)!r} has level {b.level}. Make "
            "both with the same level."
        )
        raise ConfigError(msg)
    return DumpDifferences(list(_compare_ops(a.ops, b.ops)))


def compare_references(dump: str | os.PathLike[str] | Dump) -> DumpDifferences:
    """Compare each result of a dump made with ``compare=True`` with its references.

    Returns:
        What differs, in execution order. ``value`` names the reference.

    Raises:
        ConfigError: If the folder is no dump.
    """
    found = []
    for op in (dump if isinstance(dump, Dump) else read_dump(dump)).walk():
        result = op.values.get(RESULT)
        for name in (FLOAT, INTEGER):
            reference = op.values.get(name)
            if result is None or reference is None:
                continue
            for x, y in zip(result.tensors, reference.tensors, strict=False):
                difference = _compare_numbers(op, name, x, y)
                if difference is not None:
                    found.append(difference)
    return DumpDifferences(found)


def _compare_ops(a: tuple[DumpedOp, ...], b: tuple[DumpedOp, ...]) -> Iterator[DumpDifference]:
    by_path = ({op.path: op for op in a}, {op.path: op for op in b})
    both = {op.path: op for op in (*a, *b)}
    for path in sorted(both, key=lambda path: both[path].number):
        if path not in by_path[0] or path not in by_path[1]:
            side = "second" if path not in by_path[0] else "first"
            yield DumpDifference(path, _module(both[path]), "", f"only in the {side}")
            continue
        x, y = by_path[0][path], by_path[1][path]
        names = sorted({*x.values, *y.values})
        arguments = [name for name in names if name.startswith(ARGUMENT)]
        before = list(_compare_values(x, y, arguments))
        after = list(_compare_values(x, y, [name for name in names if name not in arguments]))
        yield from before
        # A site does less inside once it has its weights on the grid: no difference by itself.
        if before or after or "site" not in x.info or "site" not in y.info:
            yield from _compare_ops(x.children, y.children)
        yield from after


def _compare_values(a: DumpedOp, b: DumpedOp, names: list[str]) -> Iterator[DumpDifference]:
    for name in names:
        x, y = a.values.get(name), b.values.get(name)
        if x is None or y is None:
            side = "second" if x is None else "first"
            yield DumpDifference(a.path, _module(a), name, f"only in the {side}")
        else:
            found = _compare_value(a, name, x, y)
            if found is not None:
                yield found


def _compare_value(
    op: DumpedOp, name: str, a: DumpedValue, b: DumpedValue
) -> DumpDifference | None:
    if a.layout != b.layout:
        return DumpDifference(op.path, _module(op), name, "content")
    for x, y in zip(a.tensors, b.tensors, strict=True):
        for found, differs in (
            ("type", x.type != y.type),
            ("shape", x.shape != y.shape),
            ("scale", (x.scale, x.zero_point, x.bits) != (y.scale, y.zero_point, y.bits)),
        ):
            if differs:
                return DumpDifference(op.path, _module(op), name, found)
        difference = _compare_numbers(op, name, x, y)
        if difference is not None:
            return difference
    return None


def _compare_numbers(
    op: DumpedOp, name: str, a: DumpedTensor, b: DumpedTensor
) -> DumpDifference | None:
    x, y = a.values, b.values
    if x is None or y is None:
        return None
    if x.shape != y.shape:
        return DumpDifference(op.path, _module(op), name, "shape")
    # Integers are compared as they are: double precision does not hold all 64 bits.
    equal = (x == y) | ((x != x) & (y != y))
    if bool(equal.all()):
        return None
    wide = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
    error = torch.where(equal, 0.0, (x.to(wide) - y.to(wide)).abs())
    finite = error[error.isfinite()]
    return DumpDifference(
        op.path,
        _module(op),
        name,
        "values",
        mismatches=int((~equal).sum()),
        elements=equal.numel(),
        max_error=float(error.nan_to_num(nan=torch.inf, posinf=torch.inf).max()),
        mean_error=float(finite.sum() / max(finite.numel(), 1)),
    )


def _module(op: DumpedOp) -> str:
    return str(op.info.get("site") or op.info.get("module") or "")
