"""Embeddings."""

from __future__ import annotations

from onnxscript import ir

from lightning_linger.export.dialect import shape_of
from lightning_linger.export.qdq.writer import Write, Writer, array_of, mark


def _embedding(w: Writer) -> ir.Value:
    """Take rows of stored codes."""
    call = w.call
    storage = w.storage(call.bits)
    table = w.constant(storage.store(array_of(call.weight)), "weight")
    shape = shape_of(call.result)
    return mark(w.node("Gather", [table, call.indices], shape, {"axis": 0}, "", storage.dtype))


TABLE: dict[str, Write] = {"embedding": _embedding}
