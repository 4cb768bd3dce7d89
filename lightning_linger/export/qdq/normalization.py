"""Norms of layers and of vectors: integer sums, one root and one quotient in float64."""

from __future__ import annotations

import math

import numpy as np
from onnxscript import ir

from lightning_linger.export.dialect import shape_of
from lightning_linger.export.qdq.exact import DOUBLE, INT64, Steps
from lightning_linger.export.qdq.writer import Write, Writer, array_of
from lightning_linger.ops.normalization import FRACTION, epsilon_of_sums
from lightning_linger.ops.unit_length import shortest


def _layer_norm(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    weight, bias = array_of(call.weight), array_of(call.bias)
    groups, channels = weight.shape
    count = channels * call.spread
    rows = math.prod(shape_of(call.x)) // (groups * count)
    x = w.reshape(call.x, [rows, groups, channels, call.spread], "groups")
    codes = s.codes(x, INT64)
    number = s.number("count", count, np.int64)
    summed = s.reduce("sum_of_squares", "ReduceSum", s.add("square", "Mul", [codes, codes]), [2, 3])
    squares = s.add("squares", "Mul", [summed, number])
    numerator = s.add("multiple", "Mul", [codes, number])
    if call.centered:
        sums = s.reduce("sum", "ReduceSum", codes, [2, 3])
        squares = s.add("spread", "Sub", [squares, s.add("squared_sum", "Mul", [sums, sums])])
        numerator = s.add("centered", "Sub", [numerator, sums])
    epsilon = s.number("epsilon", epsilon_of_sums(call.eps, count, call.scale_x))
    variance = s.add("variance", "Add", [s.cast("variance/sums", squares, DOUBLE), epsilon])
    deviation = s.add("deviation", "Sqrt", [variance])
    normal = s.add("normal", "Div", [s.cast("numerator", numerator, DOUBLE), deviation])
    shape = (1, groups, channels, 1)
    scaled = s.add("scaled", "Mul", [normal, s.number("weight", weight.reshape(shape))])
    offset = bias.reshape(shape).astype(np.float64) * 2.0**-FRACTION
    shifted = s.add("shifted", "Add", [scaled, s.number("bias", offset)])
    ratio = s.number("ratio", call.scale_w / call.scale_o)
    result = s.rounded(s.add("rescale", "Mul", [shifted, ratio]), call.bits_o, call.low, call.high)
    return w.reshape(result, shape_of(call.result), "shape")


def _normalize(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    codes = s.codes(call.x, INT64)
    squares = s.add("square", "Mul", [codes, codes])
    sums = s.cast("sums", s.reduce("sum", "ReduceSum", squares, [call.dim]), DOUBLE)
    norm = s.add("norm", "Sqrt", [sums])
    least = s.number("shortest", shortest(call.eps, call.scale_x))
    divisor = s.add(
        "divisor",
        "Mul",
        [s.add("length", "Max", [norm, least]), s.number("scale_o", call.scale_o)],
    )
    real = s.add("quotient", "Div", [s.cast("numerator", codes, DOUBLE), divisor])
    return s.rounded(real, call.bits_o, call.low, call.high)


TABLE: dict[str, Write] = {"layer_norm": _layer_norm, "normalize": _normalize}
