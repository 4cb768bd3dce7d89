"""Functions of one number as tables over stored codes, in whole numbers from end to end."""

from __future__ import annotations

import numpy as np
import torch
from onnxscript import ir

from lightning_linger.core.integer import code_limits
from lightning_linger.export.dialect import shape_of
from lightning_linger.export.qdq.writer import INT32, Write, Writer, array_of, mark, width_of
from lightning_linger.ops.slopes import factors
from lightning_linger.ops.table import CELL_BITS, knot_fraction


def _whole(w: Writer, x: ir.Value, zero: int) -> ir.Value:
    """Return codes as int32 numbers, the code ``-zero`` as 0."""
    shape = shape_of(x)
    stored = w.node("Cast", [x], shape, {"to": INT32}, "whole", INT32)
    offset = zero - w.storages[width_of(x)].zero
    return stored if offset == 0 else _op(w, "Add", stored, offset, "offset")


def _op(w: Writer, op_type: str, x: ir.Value, y: ir.Value | int, suffix: str) -> ir.Value:
    """Add an int32 operation."""
    if isinstance(y, int):
        y = w.constant(np.int32(y), f"{suffix}/number")
    return w.node(op_type, [x, y], shape_of(x), suffix=suffix, dtype=INT32)


def _entries(w: Writer, table: np.ndarray, index: ir.Value, suffix: str) -> ir.Value:
    """Read an int32 table."""
    entries = w.constant(table.astype(np.int32), f"{suffix}/table")
    return w.node("Gather", [entries, index], shape_of(index), suffix=suffix, dtype=INT32)


def _lookup(w: Writer) -> ir.Value:
    call = w.call
    table, storage = array_of(call.table), w.storage(call.bits_o)
    # One entry per stored byte, also where codes are narrower.
    codes = np.arange(-128, 128).clip(*code_limits(call.bits_x))
    entries = storage.store(table[codes + (1 << (call.bits_x - 1))])
    inputs = [w.constant(entries, "table"), _whole(w, call.x, 128)]
    return mark(w.node("Gather", inputs, shape_of(call.result), dtype=storage.dtype))


def _interpolate(w: Writer) -> ir.Value:
    call = w.call
    knots, offsets, shifts = (array_of(v) for v in (call.knots, call.offsets, call.shifts))
    size, fraction = 1 << (call.bits_x - CELL_BITS), knot_fraction(call.bits_o)
    stored = _whole(w, call.x, 1 << (call.bits_x - 1))
    cell = _op(w, "Div", stored, size, "cell")
    within = _op(w, "Sub", stored, _op(w, "Mul", cell, size, "cell/start"), "within")
    length = _entries(w, 1 << shifts, cell, "length")
    segment = _op(w, "Div", within, length, "segment")
    part = _op(w, "Sub", within, _op(w, "Mul", segment, length, "segment/start"), "part")
    first = _op(w, "Add", _entries(w, offsets, cell, "first"), segment, "knot")
    left = _entries(w, knots, first, "left")
    right = _entries(w, knots, _op(w, "Add", first, 1, "knot/next"), "right")
    # All numbers are whole, not negative and below 2^31: a division rounds down.
    left = _op(w, "Mul", left, _op(w, "Sub", length, part, "rest"), "left/part")
    right = _op(w, "Mul", right, part, "right/part")
    line = _op(w, "Add", left, right, "line")
    half = _op(w, "Mul", length, 1 << (fraction - 1), "half")
    unit = _op(w, "Mul", length, 1 << fraction, "unit")
    code = _op(w, "Div", _op(w, "Add", line, half, "line/half"), unit, "code")
    storage = w.storage(call.bits_o)
    offset = storage.zero - (1 << (call.bits_o - 1))
    if offset:
        code = _op(w, "Add", code, offset, "code/stored")
    attributes = {"to": storage.dtype}
    return mark(w.node("Cast", [code], shape_of(call.result), attributes, dtype=storage.dtype))


def _sign(op_type: str) -> Write:
    def write(w: Writer) -> ir.Value:
        call = w.call
        value = w.node(op_type, [w.real(call.x, 1.0, "x")], shape_of(call.result))
        return w.result(value, 1.0, call.bits, *code_limits(call.bits), fused=False)

    return write


def _prelu(w: Writer) -> ir.Value:
    """Multiply what is positive and what is negative of each code by numbers of their own."""
    call, shape = w.call, shape_of(w.call.result)
    slopes = torch.from_numpy(array_of(call.slopes).copy())
    positive, negative = factors(slopes, call.scale_x, call.scale_w, call.scale_o)
    spread = [-1, *[1] * (len(shape) - 2)] if slopes.numel() > 1 else []
    codes, zero = w.real(call.x, 1.0, "x"), w.number(0.0, "zero")
    parts = [
        w.node(
            "Mul",
            [
                w.node(choice, [codes, zero], shape, suffix=name),
                w.number(factor.numpy(), f"{name}/factor"),
            ],
            shape,
            suffix=f"{name}/scaled",
        )
        for choice, name, factor in (
            ("Max", "positive", positive),
            ("Min", "negative", negative.reshape(spread)),
        )
    ]
    value = w.node("Add", parts, shape)
    return w.result(value, 1.0, call.bits_o, call.low, call.high, fused=False)


TABLE: dict[str, Write] = {
    "lookup": _lookup,
    "interpolate": _interpolate,
    "neg": _sign("Neg"),
    "abs": _sign("Abs"),
    "prelu": _prelu,
}
