"""How an op from outside the library is written to ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx.defs import OpSchema

from lightning_linger.export.dialect import Translation
from lightning_linger.export.linger import LINGER
from lightning_linger.export.qdq import QDQ, add_write, drop_write
from lightning_linger.export.qdq.writer import Write
from lightning_linger.export.runner.interpreter import KERNELS
from lightning_linger.export.runner.step import Kernel
from lightning_linger.export.schemas import register_schemas


def register_export(
    integer_op: str,
    *,
    qdq: Write | None = None,
    linger: Translation | None = None,
    schemas: Sequence[OpSchema] = (),
    kernels: Mapping[str, Kernel] | None = None,
) -> None:
    """Say how an integer op is written in the dialects.

    A dialect that gets no row refuses models with the op, and names the site.

    Args:
        integer_op: Name without the namespace: ``squash`` of ``linger::squash``.
        qdq: Writes it in standard ONNX; gets a :class:`lightning_linger.export.qdq.writer.Writer`.
        linger: Writes it for an engine; gets a builder and the call, see
            :mod:`lightning_linger.export.dialect`.
        schemas: Of the nodes that ``linger`` writes, if they are new.
        kernels: How :class:`OnnxIntegerRunner` runs those nodes, by op type.

    Raises:
        ValueError: If a dialect has a row for the op already, or the runner a kernel.
    """
    rows = ((LINGER, linger), (QDQ, qdq))
    taken = [dialect.name for dialect, row in rows if row and integer_op in dialect.table]
    taken += [f"{op_type} (runner)" for op_type in kernels or {} if op_type in KERNELS]
    if taken:
        msg = f"the integer op {integer_op!r} has a translation already: {taken}."
        raise ValueError(msg)
    register_schemas(schemas)
    if linger is not None:
        LINGER.table[integer_op] = linger
    if qdq is not None:
        add_write(integer_op, qdq)
    KERNELS.update(kernels or {})


def unregister_export(integer_op: str, op_types: Sequence[str] = ()) -> None:
    """Forget how an integer op is written, e.g. at the end of a test.

    Args:
        integer_op: As it was registered.
        op_types: Nodes whose runner kernels came with it.
    """
    LINGER.table.pop(integer_op, None)
    drop_write(integer_op)
    for op_type in op_types:
        KERNELS.pop(op_type, None)
