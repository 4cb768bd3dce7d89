"""Matrix products of two activations."""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from lightning_linger.core.integer import multiplier
from lightning_linger.export.dialect import shape_of
from lightning_linger.export.qdq.exact import DOUBLE, Steps
from lightning_linger.export.qdq.writer import FLOAT, INT32, Write, Writer, width_of


def _matmul(w: Writer) -> ir.Value:
    """Multiply 8-bit codes as integers, wider ones in float64, which holds their sums."""
    call = w.call
    x, y = call.x, call.y
    rows, columns = len(shape_of(x)) == 1, len(shape_of(y)) == 1
    x = w.reshape(x, [1, *shape_of(x)], "x/row") if rows else x
    y = w.reshape(y, [*shape_of(y), 1], "y/column") if columns else y
    batch = np.broadcast_shapes(tuple(shape_of(x)[:-2]), tuple(shape_of(y)[:-2]))
    shape = [*batch, shape_of(x)[-2], shape_of(y)[-1]]
    s = Steps(w)
    if width_of(x) == 8 and width_of(y) == 8:
        zero = w.storage(8)
        zeros = [w.constant(zero.numpy(zero.zero), f"{name}/zero_point") for name in ("x", "y")]
        acc = s.add("", "MatMulInteger", [x, y, *zeros], shape, INT32)
    else:
        acc = s.add("", "MatMul", [s.codes(x, DOUBLE, "x"), s.codes(y, DOUBLE, "y")], shape)
    result = shape_of(call.result)
    quantized = call.scale_o != 0.0
    if quantized and call.bits_o == 32:
        codes = acc if acc.dtype == INT32 else s.cast("accumulator", acc, INT32)
        return w.reshape(codes, result, "shape")
    ratio = multiplier(call.scale_x, [call.scale_y], call.scale_o if quantized else 1.0).item()
    factor = w.number(ratio, "multiplier")
    value = s.add("rescale", "Mul", [s.cast("accumulator", acc, FLOAT), factor])
    if quantized:
        value = w.result(value, 1.0, call.bits_o, call.low, call.high, fused=False)
    return w.reshape(value, result, "shape")


TABLE: dict[str, Write] = {"matmul": _matmul}
