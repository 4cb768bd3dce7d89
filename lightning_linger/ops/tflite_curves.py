"""What TFLite fixes about functions of one number: their output parameters, and their kernels.

The kernels work on codes, of which there are 256: they are tables whose entries the fixed-point
arithmetic of :mod:`lightning_linger.ops.tflite` has computed, or float32 arithmetic where the
platform says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.fixed_point import FixedPointRounding
from lightning_linger.core.grid import AFFINE_CODE_BITS
from lightning_linger.core.platform import Platform, fixed_point_of
from lightning_linger.core.rounding import half_away
from lightning_linger.ops import tflite
from lightning_linger.ops.table import Tabulation

# Ends of the results in steps of `1 / 2^bits`, in units of which they are fixed: the first code and
# the unit. The codes behind the first one follow.
_FIRST_AND_UNIT: dict[str, tuple[float, float]] = {
    "sigmoid": (0.0, 1.0),
    "softmax": (0.0, 1.0),
    "tanh": (-1.0, 2.0),
    "normalize": (-1.0, 2.0),
    "log_softmax": (-16.0, 16.0),
}
WIDE = 16
# Those without a kernel of 16 bits.
_NARROW = ("log_softmax", "normalize")


def fixed_range(kind: str, config: QuantConfig, platform: Platform) -> tuple[float, float] | None:
    """Return the range of a function whose output parameters TFLite fixes, None for others.

    Of 8 bits: scale 1/256 and zero point -128 for a sigmoid and a softmax, 1/128 and 0 for tanh
    and an L2 normalization, 1/16 and 127 for a log-softmax. Of 16 bits: 1/32768, symmetric, but
    for the last two, which have no such kernel.
    """
    bits = config.output_bits
    if not platform.fixed_point or kind not in _FIRST_AND_UNIT or bits is None or bits > WIDE:
        return None
    if bits > 8:
        limit = 1.0 - 2.0 ** (1 - bits)
        return None if kind in _NARROW else (-limit, limit)
    first, unit = _FIRST_AND_UNIT[kind]
    step = unit / 2**bits
    if kind == "log_softmax":
        return first + step, 0.0
    return first, first + unit - step


def narrow_engine(
    kind: str, platform: str, scale_o: float, bits_x: int, bits_o: int
) -> Platform | None:
    """Return the target that an integer op names if it has a kernel of a function of this kind.

    Kernels take codes of 8 bits, here without their zero points, and their results are on the grid
    that :func:`fixed_range` asks for.
    """
    engine = fixed_point_of(platform)
    narrow = bits_x <= AFFINE_CODE_BITS and bits_o == AFFINE_CODE_BITS
    return engine if narrow and scale_o == _fixed_step(kind) else None


def _fixed_step(kind: str) -> float:
    _, unit = _FIRST_AND_UNIT[kind]
    return unit * 2.0**-8


@dataclass(frozen=True)
class TFLiteKernel:
    """A kernel of TFLite as a table.

    Args:
        kind: Canonical op name.
        numbers: Its further arguments.
        in_float: Whether it computes in floating point.
        rounding: Of fixed-point products.
    """

    kind: str
    numbers: tuple[float | int | bool | str, ...]
    in_float: bool
    rounding: FixedPointRounding

    @property
    def name(self) -> str:
        """What it computes, for messages."""
        return self.kind

    def __call__(self, x: Tensor) -> Tensor:
        """Return real values of the function."""
        return _REAL[self.kind](x, *self.numbers)

    def entries(self, codes: Tensor, asked: Tabulation) -> Tensor:
        """Return the code of the result, without zero point, for each code without zero point."""
        if self.in_float and self.kind in _IN_FLOAT:
            real = self(codes.float() * asked.step_x)
            return half_away(real * (1.0 / asked.step_o)).long()
        scales = (asked.step_x, asked.step_o)
        if self.kind == "sigmoid":
            return tflite.logistic(codes, asked.step_x, 0).long() - tflite.LOW
        if self.kind == "tanh":
            return tflite.tanh(codes, asked.step_x, 0).long()
        if self.kind == "hardswish":
            return tflite.centred_hard_swish(codes, scales)
        (slope,) = self.numbers
        return tflite.leaky_relu(codes, float(slope), scales, self.rounding)


_REAL: dict[str, Callable[..., Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": torch.nn.functional.hardswish,
    "leaky_relu": torch.nn.functional.leaky_relu,
}
# Those that desktop builds take from tables of floats.
_IN_FLOAT = ("sigmoid", "tanh")


def kernel_of(
    kind: str,
    numbers: tuple[float | int | bool | str, ...],
    platform: Platform | None,
    asked: Tabulation,
) -> TFLiteKernel | None:
    """Return TFLite's kernel of a function, None where it has none for these grids."""
    if platform is None or not platform.fixed_point or kind not in _REAL:
        return None
    narrow = asked.bits_x <= asked.entry_bits and asked.bits_o == AFFINE_CODE_BITS
    if not narrow or (kind in _FIRST_AND_UNIT and asked.step_o != _fixed_step(kind)):
        return None
    return TFLiteKernel(
        kind, numbers, platform.curves == "tflite_float", platform.multiplier_rounding
    )
