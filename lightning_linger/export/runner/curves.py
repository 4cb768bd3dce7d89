"""Functions of one number, and gated units."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_linger.core.integer import code_limits
from lightning_linger.export.runner.step import Array, Kernel, Step, to_array
from lightning_linger.ops.curves import integer_curve
from lightning_linger.ops.glu import integer_glu

# The venus kernels take a coarser operand for one of this step.
_VENUS_STEP = 2.0**-11


def _curve(function: str, bounded: bool) -> Callable[[Step], Array]:
    def run(step: Step) -> Array:
        x = step.codes(0)
        scale_x, bits_o = step.step("scale_x"), step.bits("o_bits")
        if bounded and step.platform == "venus" and x.dtype == torch.int16:
            scale_x = min(scale_x, _VENUS_STEP)
        # The engine ignores `scale_o` where the range of the result is known.
        scale_o = 2.0 ** (1 - bits_o) if bounded else step.step("scale_o")
        y = integer_curve(
            x,
            function,
            scale_x,
            scale_o,
            8 * x.element_size(),
            bits_o,
            *code_limits(bits_o),
            step.platform,
        )
        return to_array(y)

    return run


def _glu(step: Step) -> Array:
    x, bits_o = step.codes(0), step.bits("o_bits")
    y = integer_glu(
        x,
        int(step.get("axis")),
        step.step("scale_x"),
        step.step("scale_o"),
        8 * x.element_size(),
        bits_o,
        *code_limits(bits_o),
        step.platform,
    )
    return to_array(y)


KERNELS: dict[str, Kernel] = {
    "QSigmoid": _curve("sigmoid", bounded=True),
    "QTanh": _curve("tanh", bounded=True),
    "QGelu": _curve("gelu", bounded=False),
    "QSwish": _curve("silu", bounded=False),
    "QGLU": _glu,
}
