"""Entering, leaving and changing the grid."""

from __future__ import annotations

import numpy as np

from lightning_linger.core.integer import dequantize, requantize
from lightning_linger.export.runner.step import (
    ROUNDING,
    Array,
    Kernel,
    Step,
    quantized,
    to_array,
    to_tensor,
)


def _quant(step: Step) -> Array:
    x = step.array(0)
    if not np.issubdtype(x.dtype, np.floating):
        return x  # codes were given in the place of real values
    bits = step.bits("x_bits")
    return to_array(quantized(to_tensor(x), step.step("scale_x"), bits, step.platform))


def _dequant(step: Step) -> Array:
    return to_array(dequantize(to_tensor(step.array(0)), step.step("scale_o"), step.platform))


def _requant(step: Step) -> Array:
    x = step.codes(0)
    step_x, step_o = step.step("scale_x"), step.step("scale_o")
    bits_x, bits_o = step.bits("x_bits"), step.bits("o_bits")
    if bits_o > bits_x and step_o <= step_x:
        # The engine widens by a plain shift, without saturation.
        shift = round(np.log2(step_x / step_o))
        wide = np.int16 if bits_o <= 16 else np.int32
        shifted: Array = np.left_shift(to_array(x).astype(wide), shift)
        return shifted
    return to_array(requantize(x, step_x, step_o, bits_x, bits_o, ROUNDING, step.platform))


KERNELS: dict[str, Kernel] = {
    "Quant": _quant,
    "Dequant": _dequant,
    "Requant": _requant,
}
