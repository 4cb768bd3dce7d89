"""Quotients of codes in float64."""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from lightning_linger.export.dialect import shape_of
from lightning_linger.export.qdq.exact import DOUBLE, Steps
from lightning_linger.export.qdq.writer import Write, Writer, array_of
from lightning_linger.ops.div import ZERO_DIVISOR, div_ratio

BOOL = ir.DataType.BOOL


def _div(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    x, y = _operand(s, call.x, "x"), _operand(s, call.y, "y")
    ratio = s.number("ratio", div_ratio(call.scale_x, call.scale_y, call.scale_o))
    zero = s.add("zero", "Equal", [y, s.number("nothing", 0.0)], dtype=BOOL)
    tiny = s.number("tiny", ZERO_DIVISOR)
    divisor = s.add("divisor", "Where", [zero, tiny, y], shape_of(y), DOUBLE)
    scaled = s.add("scaled", "Mul", [x, ratio])
    quotient = s.add("quotient", "Div", [scaled, divisor], shape_of(call.result), DOUBLE)
    limits = [
        s.number(name, float(code)) for name, code in (("low", call.low), ("high", call.high))
    ]
    return s.rounded(
        s.add("saturated", "Clip", [quotient, *limits]), call.bits_o, call.low, call.high
    )


def _operand(s: Steps, value: ir.Value, name: str) -> ir.Value:
    """Return codes in float64; a number is a constant of its own."""
    if value.const_value is not None:
        return s.number(f"{name}/number", array_of(value).astype(np.float64))
    return s.codes(value, DOUBLE, name)


TABLE: dict[str, Write] = {"div": _div}
