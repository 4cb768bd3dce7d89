"""Sums, products, joins, extremes and clamps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import code_limits, requantize
from lightning_linger.core.tags import Tag
from lightning_linger.export.runner.step import ROUNDING, Array, Kernel, Step, to_array
from lightning_linger.ops.activation import edge_code, integer_clamp
from lightning_linger.ops.add import integer_add
from lightning_linger.ops.cat import integer_cat
from lightning_linger.ops.mul import integer_mul
from lightning_linger.ops.selection import integer_maximum


def pair_arguments(step: Step) -> dict[str, Any]:
    """Return the arguments that ops with two operands share."""
    low, high = code_limits(step.bits("o_bits"))
    return {
        "x": step.codes(0),
        "y": step.codes(1, "scale_y", "y_bits"),
        "scale_x": step.step("scale_x"),
        "scale_y": step.step("scale_y"),
        "scale_o": step.step("scale_o"),
        "bits_o": step.bits("o_bits"),
        "low": low,
        "high": high,
        "rounding": ROUNDING,
        "platform": step.platform,
    }


def _add(sign: int) -> Callable[[Step], Array]:
    def run(step: Step) -> Array:
        return to_array(integer_add(sign=sign, round_operands=True, **pair_arguments(step)))

    return run


def _mul(step: Step) -> Array:
    return to_array(integer_mul(**pair_arguments(step)))


def _cat(step: Step) -> Array:
    parts = [
        step.codes(index, f"scale_x_{index}", f"x_{index}_bits")
        for index in range(len(step.inputs))
    ]
    steps = [step.step(f"scale_x_{index}") for index in range(len(parts))]
    y = integer_cat(
        parts,
        int(step.get("axis")),
        steps,
        step.step("scale_o"),
        step.bits("o_bits"),
        ROUNDING,
        step.platform,
    )
    return to_array(y)


def _at_result(step: Step, place: int, scale: str, bits: str) -> Tensor:
    """Return an operand at the scale of the result."""
    x = step.codes(place, scale, bits)
    step_x, step_o, bits_o = step.step(scale), step.step("scale_o"), step.bits("o_bits")
    width = 8 * x.element_size()
    return requantize(x, step_x, step_o, width, bits_o, ROUNDING, step.platform)


def _max(step: Step) -> Array:
    pair = (_at_result(step, 0, "scale_x", "x_bits"), _at_result(step, 1, "scale_y", "y_bits"))
    return to_array(integer_maximum(*pair, True, step.platform))


def _clamp(step: Step) -> Array:
    scale_o, bits_o = step.step("scale_o"), step.bits("o_bits")
    low, high = (
        edge_code(float(step.attributes.get(name, default)), Tag(scale_o, bits_o, "o"))
        for name, default in (("min", -math.inf), ("max", math.inf))
    )
    x = _at_result(step, 0, "scale_x", "x_bits")
    return to_array(integer_clamp(x, low, high, bits_o, step.platform))


def _relu(step: Step) -> Array:
    x = step.array(0)
    positive: Array = np.maximum(x, x.dtype.type(0))
    return positive


def _clip(step: Step) -> Array:
    x = step.array(0)
    edges = [*step.inputs[1:], None, None][:2]
    for place, name in enumerate(("min", "max")):  # earlier versions of the standard
        if name in step.attributes:
            edges[place] = np.asarray(step.attributes[name], np.float32)
    real = [edge for edge in edges if edge is not None and edge.dtype != x.dtype]
    if real and np.issubdtype(x.dtype, np.integer):
        msg = (
            f"{step.label}: the edges of codes have to be codes. Found {real[0].dtype} at "
            f"{x.dtype}; divide them by the step of the codes."
        )
        raise UnsupportedError(msg)
    low, high = edges
    return x if low is None and high is None else np.clip(x, low, high)


KERNELS: dict[str, Kernel] = {
    "QAdd": _add(1),
    "QSub": _add(-1),
    "QMul": _mul,
    "QCat": _cat,
    "iqMax": _max,
    "iqClamp": _clamp,
    "Relu": _relu,
    "Clip": _clip,
}
