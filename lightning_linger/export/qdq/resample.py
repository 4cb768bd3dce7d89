"""Linear interpolation: whole numbers in float64, two neighbours per dimension."""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from lightning_linger.core.integer import code_limits
from lightning_linger.export.dialect import shape_of
from lightning_linger.export.qdq.exact import DOUBLE, Steps
from lightning_linger.export.qdq.writer import Write, Writer
from lightning_linger.ops.resample import WEIGHT_BITS, linear_taps


def _resize_linear(w: Writer) -> ir.Value:
    s, call = Steps(w), w.call
    mixed = s.codes(call.x, DOUBLE)
    for dim, (target, factor) in enumerate(zip(call.size, call.factors, strict=True), start=2):
        shape = shape_of(mixed)
        taps = linear_taps(shape[dim], target, factor, call.align_corners)
        shape[dim] = target
        far = np.array(taps[2], np.float64).reshape(-1, *[1] * (len(shape) - dim - 1))
        sides = []
        for name, places, weights in (
            ("near", taps[0], 2.0**WEIGHT_BITS - far),
            ("far", taps[1], far),
        ):
            label = f"{name}{dim}"
            index = s.number(f"{label}/index", places, np.int64)
            taken = s.add(f"{label}/value", "Gather", [mixed, index], shape, axis=dim)
            sides.append(s.add(label, "Mul", [taken, s.number(f"{label}/weight", weights)]))
        mixed = s.add(f"mixed{dim}", "Add", sides)
    share = s.number("share", 2.0 ** (-WEIGHT_BITS * len(call.size)))
    scaled = s.add("scaled", "Mul", [mixed, share])
    return s.rounded(scaled, call.bits, *code_limits(call.bits))


TABLE: dict[str, Write] = {"resize_linear": _resize_linear}
