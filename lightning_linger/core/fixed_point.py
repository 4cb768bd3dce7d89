"""Fixed-point multiplication of integer kernels: a scale as a 32-bit multiplier and a shift.

Whole numbers live in int64 tensors and stay within 32 bits, as the kernels' do. The formulas are
those of gemmlowp's fixed-point library and of TFLite's reference kernels (Jacob et al. 2018,
https://arxiv.org/abs/1712.05877).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

MAX, MIN = 2**31 - 1, -(2**31)

# Round the product and the shift, or both at once (a build option of TFLite).
FixedPointRounding = Literal["double", "single"]


def quantize_multiplier(real: float) -> tuple[int, int]:
    """Return ``(m, shift)`` with ``real`` about ``m * 2^(shift - 31)``, ``2^30 <= m < 2^31``.

    Args:
        real: Not negative.
    """
    if real == 0.0:
        return 0, 0
    fraction, shift = math.frexp(real)
    m = math.floor(fraction * 2**31 + 0.5)
    if m == 2**31:
        m, shift = 2**30, shift + 1
    return (0, 0) if shift < -31 else (m, shift)


def quantize_multipliers(reals: Sequence[float], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`quantize_multiplier` of several numbers, on the device of a tensor."""
    found = torch.tensor([quantize_multiplier(real) for real in reals], device=like.device)
    return found[:, 0], found[:, 1]


def saturating_rounding_doubling_high_mul(a: Tensor, b: Tensor | int) -> Tensor:
    """Return ``a * b / 2^31``; halves go toward plus infinity."""
    return ((a * b + 2**30) >> 31).clamp_(max=MAX)  # -2^31 * -2^31


def rounding_divide_by_power_of_two(x: Tensor, exponent: Tensor | int) -> Tensor:
    """Return ``x / 2^exponent``; halves go away from zero."""
    mask = (torch.ones_like(x) << exponent) - 1
    threshold = (mask >> 1) + (x < 0).long()
    return (x >> exponent) + ((x & mask) > threshold).long()


def multiply_by_quantized_multiplier(
    x: Tensor,
    m: Tensor | int,
    shift: Tensor | int,
    rounding: FixedPointRounding = "double",
) -> Tensor:
    """Return ``x * m * 2^(shift - 31)``.

    Args:
        x: Whole numbers of 32 bits.
        m: Multiplier, or multipliers that broadcast to ``x``.
        shift: Of the same shape as ``m``.
        rounding: ``double`` rounds the high half of the product toward plus infinity and the
            right shift away from zero; ``single`` rounds once, toward plus infinity.
    """
    if rounding == "single":
        places = 31 - shift
        return (x * m + _power_of_two(places - 1)) >> places
    left, right = _parts(shift)
    high = saturating_rounding_doubling_high_mul(wrapped(x << left), m)
    return rounding_divide_by_power_of_two(high, right)


def multiply_wide(x: Tensor, m: Tensor | int, shift: Tensor | int) -> Tensor:
    """Return ``x * m * 2^(shift - 31)`` of 48-bit sums, with 16 bits of the multiplier.

    This is how kernels with 16-bit activations bring their 64-bit accumulators to the output.
    """
    reduced = torch.as_tensor((m + 2**15) >> 16, device=x.device).clamp(max=2**15 - 1)
    places = 15 - shift
    return (x * reduced + _power_of_two(places - 1)) >> places


def wrapped(x: Tensor) -> Tensor:
    """Return what is left of numbers in a 32-bit register."""
    return ((x + 2**31) & (2**32 - 1)) - 2**31


def _parts(shift: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    if isinstance(shift, Tensor):
        return shift.clamp(min=0), (-shift).clamp(min=0)
    return max(shift, 0), max(-shift, 0)


def _power_of_two(exponent: Tensor | int) -> Tensor | int:
    if isinstance(exponent, Tensor):
        return torch.ones_like(exponent) << exponent
    return 1 << exponent
