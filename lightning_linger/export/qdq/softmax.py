"""Softmax and its logarithms as tables of whole numbers and one division."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnxscript import ir

from lightning_linger.export.dialect import shape_of
from lightning_linger.export.qdq.exact import DOUBLE, INT64, Steps
from lightning_linger.export.qdq.writer import Write, Writer
from lightning_linger.ops.arguments import reduced_count
from lightning_linger.ops.softmax import FRACTION, LOG_POINTS, exponentials, logarithms


def _sums(
    s: Steps, codes: ir.Value, dims: Sequence[int], largest: bool = True
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Return the extreme code, the distances to it, their exponentials and the sums of these."""
    call = s.w.call
    top = s.reduce("top", "ReduceMax" if largest else "ReduceMin", codes, dims)
    pair = [top, codes] if largest else [codes, top]
    distances = s.add("distance", "Sub", pair, shape_of(codes))
    table = exponentials(call.scale_x, call.bits_x)
    index = distances
    if len(table) < 1 << call.bits_x:
        last = s.number("last", len(table) - 1, np.int32)
        index = s.add("index", "Min", [distances, last])
    terms = s.gather("exponential", s.number("exponentials", table, np.int32), index)
    terms = s.cast("term", terms, DOUBLE)
    return top, distances, terms, s.reduce("sum", "ReduceSum", terms, dims)


def _probability(largest: bool) -> Write:
    def write(w: Writer) -> ir.Value:
        s, call = Steps(w), w.call
        _, _, terms, sums = _sums(s, s.codes(call.x), [call.dim], largest)
        divisor = s.add("divisor", "Mul", [sums, s.number("scale_o", call.scale_o)])
        real = s.add("probability", "Div", [terms, divisor])
        return s.rounded(real, call.bits_o, call.low, call.high)

    return write


def _log_of_sums(s: Steps, sums: ir.Value, count: int) -> ir.Value:
    """Write :func:`lightning_linger.ops.softmax.log_of_sums` for sums of ``count`` terms."""
    shape = shape_of(sums)
    octaves = range(math.floor(math.log2(count)) + 2)
    edges = s.number("edges", [2.0 ** (FRACTION + k) for k in octaves[1:]])
    last = s.number("last_axis", [-1], np.int64)
    spread = s.add("spread", "Unsqueeze", [sums, last], [*shape, 1])
    reached = s.add(
        "reached",
        "GreaterOrEqual",
        [spread, edges],
        [*shape, len(octaves) - 1],
        ir.DataType.BOOL,
    )
    octave = s.reduce("octave", "ReduceSum", s.cast("passed", reached, INT64), [-1], keep=False)
    units = s.number("units", [2.0 ** -(FRACTION + k) for k in octaves])
    mantissa = s.add("mantissa", "Mul", [sums, s.gather("unit", units, octave)])
    above = s.add("above", "Sub", [mantissa, s.number("one", 1.0)])
    position = s.add("position", "Mul", [above, s.number("points", 2.0**LOG_POINTS)])
    floor = s.add("floor", "Floor", [position])
    point = s.cast("point", floor, INT64)
    table = logarithms()
    low = s.gather("low", s.number("logarithms", table[:-1]), point)
    slope = s.gather("slope", s.number("slopes", table[1:] - table[:-1]), point)
    rest = s.add("rest", "Sub", [position, floor])
    line = s.add("line", "Add", [low, s.add("rise", "Mul", [rest, slope])])
    whole = s.gather(
        "octave_log", s.number("octave_logs", [k * math.log(2.0) for k in octaves]), octave
    )
    return s.add("logarithm", "Add", [line, whole])


def _log_softmax(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    _, distances, _, sums = _sums(s, s.codes(call.x), [call.dim])
    logarithm = _log_of_sums(s, sums, shape_of(call.x)[call.dim])
    far = s.cast("far", distances, DOUBLE)
    below = s.add("below", "Mul", [far, s.number("scale_x", call.scale_x)])
    negative = s.add("negative", "Neg", [s.add("total", "Add", [below, logarithm])])
    real = s.add("quotient", "Div", [negative, s.number("scale_o", call.scale_o)])
    return s.rounded(real, call.bits_o, call.low, call.high)


def _logsumexp(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    top, _, _, sums = _sums(s, s.codes(call.x), call.dim)
    logarithm = _log_of_sums(s, sums, reduced_count(shape_of(call.x), call.dim))
    base = s.add(
        "base", "Mul", [s.cast("whole_top", top, DOUBLE), s.number("scale_x", call.scale_x)]
    )
    total = s.add("total", "Add", [base, logarithm])
    real = s.add("quotient", "Div", [total, s.number("scale_o", call.scale_o)])
    codes = s.rounded(real, call.bits_o, call.low, call.high)
    return w.reshape(codes, shape_of(call.result), "shape")


TABLE: dict[str, Write] = {
    "softmax": _probability(largest=True),
    "softmin": _probability(largest=False),
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
}
