"""Softmax and its logarithm."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_linger.core.integer import code_limits
from lightning_linger.export.runner.step import ROUNDING, Array, Kernel, Step, to_array
from lightning_linger.ops.softmax import integer_log_softmax, integer_softmax


def _along_last_axis(function: Callable[..., Tensor]) -> Kernel:
    def run(step: Step) -> Array:
        x = step.codes(0)
        axis = int(step.attributes.get("axis", -1)) % x.dim()
        # The engine takes everything from the axis on together.
        rows = x.flatten(axis)
        bits_o = step.bits("o_bits")
        y = function(
            rows,
            axis,
            step.step("scale_x"),
            step.bits("x_bits"),
            step.step("scale_o"),
            bits_o,
            *code_limits(bits_o),
            ROUNDING,
            step.platform,
        )
        return to_array(y.reshape(x.shape))

    return run


KERNELS: dict[str, Kernel] = {
    "QSoftmax": _along_last_axis(integer_softmax),
    "LogSoftmaxInt": _along_last_axis(integer_log_softmax),
}
