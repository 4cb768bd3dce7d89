"""Matrix products of two activations."""

from __future__ import annotations

from lightning_linger.core.integer import code_limits
from lightning_linger.export.runner.step import ROUNDING, Array, Kernel, Step, to_array
from lightning_linger.ops.matmul import integer_matmul


def _matmul(step: Step) -> Array:
    bits_o = step.bits("o_bits")
    y = integer_matmul(
        step.codes(0),
        step.codes(1, "scale_y", "y_bits"),
        step.step("scale_x"),
        step.step("scale_y"),
        step.step("scale_o"),
        step.bits("x_bits"),
        step.bits("y_bits"),
        bits_o,
        *code_limits(bits_o),
        ROUNDING,
        step.platform,
    )
    return to_array(y)


KERNELS: dict[str, Kernel] = {"QBmm": _matmul, "QMatmul": _matmul}
