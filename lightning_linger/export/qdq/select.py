"""Choosing by a mask, on codes as whole numbers in float32."""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from lightning_linger.core.integer import code_limits
from lightning_linger.export.dialect import shape_of
from lightning_linger.export.qdq.exact import Steps
from lightning_linger.export.qdq.writer import FLOAT, Write, Writer
from lightning_linger.ops.select import INFINITE

BOOL = ir.DataType.BOOL


def _brought_to(s: Steps, value: ir.Value, scale: float, name: str) -> ir.Value:
    """Return the codes of an operand at the output scale, which is not finer than its own."""
    call = s.w.call
    codes = s.w.real(value, 1.0, name)
    if scale == call.scale_o:
        return codes
    ratio = s.number(f"{name}/ratio", scale / call.scale_o, np.float32)
    return s.add(f"{name}/round", "Round", [s.add(f"{name}/rescale", "Mul", [codes, ratio])])


def _where(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    sides = [
        _brought_to(s, call.x, call.scale_x, "x"),
        _brought_to(s, call.y, call.scale_y, "y"),
    ]
    chosen = s.add("", "Where", [call.mask, *sides], shape_of(call.result), sides[0].dtype)
    return s.stored(chosen, call.bits, *code_limits(call.bits))


def _masked_fill(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    kept = _brought_to(s, call.x, call.scale_x, "x")
    code = s.number("code", call.code, np.float32)
    filled = s.add("", "Where", [call.mask, code, kept], shape_of(call.result), kept.dtype)
    return s.stored(filled, call.bits, *code_limits(call.bits))


def _add_mask(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    low, high = (float(code) for code in code_limits(call.bits))
    edges = [s.number("low", low, np.float32), s.number("high", high, np.float32)]
    mask = call.mask if call.mask.dtype == FLOAT else s.cast("mask", call.mask, FLOAT)
    steps = s.add("steps", "Div", [mask, s.number("scale", call.scale, np.float32)])
    added = s.add("added", "Clip", [s.add("round", "Round", [steps]), *edges])
    shape = shape_of(call.result)
    total = s.add("total", "Add", [w.real(call.x, 1.0, "x"), added], shape)
    infinite = s.number("infinite", -INFINITE, np.float32)
    hidden = s.add("hidden", "LessOrEqual", [mask, infinite], dtype=BOOL)
    clipped = s.add("clip", "Clip", [total, *edges])
    chosen = s.add("", "Where", [hidden, edges[0], clipped], shape, FLOAT)
    return s.stored(chosen, call.bits, *code_limits(call.bits))


TABLE: dict[str, Write] = {"where": _where, "masked_fill": _masked_fill, "add_mask": _add_mask}
