"""Sums, variances, extremes and order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxscript import ir

from lightning_linger.export.dialect import shape_of
from lightning_linger.export.qdq.exact import DOUBLE, INT64, Steps
from lightning_linger.export.qdq.writer import INT32, Write, Writer, width_of
from lightning_linger.ops.arguments import reduced_count

# --- sums -------------------------------------------------------------------------------------


def _rescaled(s: Steps, sums: ir.Value) -> ir.Value:
    """Bring sums of codes to the output scale."""
    call = s.w.call
    ratio = s.number("ratio", call.scale_x / call.scale_o)
    real = s.add("rescale", "Mul", [s.cast("total", sums, DOUBLE), ratio])
    return s.rounded(real, call.bits_o, call.low, call.high)


def _sum(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    codes = s.codes(call.x, INT64)
    return _rescaled(s, s.reduce("sum", "ReduceSum", codes, call.dim, call.keepdim))


def _cumsum(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    axis = s.number("axis", call.dim, np.int64)
    return _rescaled(s, s.add("sums", "CumSum", [s.codes(call.x, INT64), axis]))


def _var(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    codes = s.codes(call.x, INT64)
    count = reduced_count(shape_of(codes), call.dim)
    square = s.add("square", "Mul", [codes, codes])
    summed = s.reduce("sum_of_squares", "ReduceSum", square, call.dim, call.keepdim)
    squares = s.add("squares", "Mul", [summed, s.number("count", count, np.int64)])
    sums = s.reduce("sum", "ReduceSum", codes, call.dim, call.keepdim)
    spread = s.add("spread", "Sub", [squares, s.add("squared_sum", "Mul", [sums, sums])])
    divisor = s.number("divisor", float(count * (count - call.correction)))
    real = s.add("variance", "Div", [s.cast("numerator", spread, DOUBLE), divisor])
    ratio = call.scale_x**2 / call.scale_o
    if call.root:
        real, ratio = s.add("deviation", "Sqrt", [real]), call.scale_x / call.scale_o
    real = s.add("rescale", "Mul", [real, s.number("ratio", ratio)])
    return s.rounded(real, call.bits_o, call.low, call.high)


# --- selection --------------------------------------------------------------------------------


def _extreme(s: Steps, codes: ir.Value, dim: Sequence[int], keepdim: bool) -> ir.Value:
    call = s.w.call
    op_type = "ReduceMax" if call.largest else "ReduceMin"
    found = s.reduce("extreme", op_type, codes, dim, keepdim)
    return s.selected(found, width_of(call.x))


def _amax(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    return _extreme(s, s.codes(call.x), call.dim, call.keepdim)


def _place(s: Steps, codes: ir.Value, shape: Sequence[int], suffix: str) -> ir.Value:
    """Add the search for where an extreme stands first."""
    call = s.w.call
    return s.w.node(
        "ArgMax" if call.largest else "ArgMin",
        [codes],
        shape,
        {"axis": call.dim, "keepdims": int(call.keepdim)},
        suffix,
        INT64,
    )


def _max(w: Writer) -> list[ir.Value]:
    s, call = Steps(w), w.call
    codes = s.codes(call.x)
    index = _place(s, codes, shape_of(call.results[1]), "index")
    return [_extreme(s, codes, [call.dim], call.keepdim), index]


def _argmax(w: Writer) -> ir.Value:
    s = Steps(w)
    return _place(s, s.codes(w.call.x), shape_of(w.call.result), "")


def _maximum(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    op_type = "Max" if call.largest else "Min"
    pair = [s.codes(call.x, name="x"), s.codes(call.y, name="y")]
    found = s.add("extreme", op_type, pair, shape_of(call.result))
    return s.selected(found, width_of(call.x))


def _topk(w: Writer) -> list[ir.Value]:
    s, call = Steps(w), w.call
    codes = s.codes(call.x)
    shape = shape_of(call.result)
    values, indices = w.builder.nodes(
        "TopK",
        [codes, s.number("k", [call.k], np.int64)],
        [(INT32, shape), (INT64, shape)],
        {"axis": call.dim, "largest": int(call.largest), "sorted": 1},
        suffix="order",
    )
    return [s.selected(values, width_of(call.x)), indices]


TABLE: dict[str, Write] = {
    "sum": _sum,
    "cumsum": _cumsum,
    "var": _var,
    "amax": _amax,
    "max": _max,
    "argmax": _argmax,
    "maximum": _maximum,
    "topk": _topk,
}
