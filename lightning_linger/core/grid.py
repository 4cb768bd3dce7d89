"""The integer grid a tensor is rounded to: bits, scale kind and rounding, without any state."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_linger.core.errors import ConfigError
from lightning_linger.core.rounding import ROUNDINGS, Rounding, half_away, round_value

ScaleKind = Literal["power_of_two", "free"]
Symmetry = Literal["symmetric", "affine"]

MIN_BITS, MAX_BITS = 2, 32
# Engines with zero points have them for codes of up to 8 bits, which are a bit wider without them.
WIDEST_AFFINE = 8
AFFINE_CODE_BITS = WIDEST_AFFINE + 1
# Exponents at which float32 products of two scales stay normal numbers, and shifts fit a register.
MIN_EXPONENT, MAX_EXPONENT = -31, 31
# Below, float32 loses bits.
SMALLEST_NORMAL = 2.0**-126


@dataclass(frozen=True)
class Grid:
    """Signed integers ``[-2^(bits-1), 2^(bits-1) - 1]`` times a positive step.

    On an affine grid the integers are those that an engine stores, and ``real = step * (stored -
    zero_point)``. What flows between ops are the *centred* codes ``stored - zero_point``, one bit
    wider: zero is the code 0 on every grid, and arithmetic needs no zero point.

    Args:
        bits: Width of the integer, 2 to 32.
        scale_kind: ``power_of_two`` (``step = 2^e``) or ``free`` (any positive float32).
        rounding: Name of a rule of :mod:`lightning_linger.core.rounding`.
        narrow: Leave out the most negative code, so that the grid is symmetric around zero.
        strict: A power-of-two step puts the range's end within the codes, so that nothing of the
            range saturates. Without, a range that is itself a power of two keeps every bit, and its
            very end saturates to the top code.
        closed: Add the code ``2^(bits-1)``, which no hardware of this width stores: for what is
            rounded in simulation only (NICS-fix's fixed-point numbers).
        exponents: Smallest and largest exponent of a power-of-two step.
        symmetry: ``symmetric`` around zero, or ``affine``: the range has two ends of its own, and
            a whole number, the zero point, stands for zero.
        exclusive: A range that is itself a power of two takes the next coarser power-of-two step:
            ``2^(floor(log2(absmax)) - (bits - 2))``, Cambricon's position.
    """

    bits: int = 8
    scale_kind: ScaleKind = "power_of_two"
    rounding: Rounding = "half_up"
    narrow: bool = False
    strict: bool = False
    closed: bool = False
    exponents: tuple[int, int] = (MIN_EXPONENT, MAX_EXPONENT)
    symmetry: Symmetry = "symmetric"
    exclusive: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not MIN_BITS <= self.bits <= MAX_BITS:
            msg = f"bits must be an integer from {MIN_BITS} to {MAX_BITS}. Found: {self.bits!r}."
            raise ConfigError(msg)
        if self.rounding not in ROUNDINGS:
            msg = f"rounding must be one of {sorted(ROUNDINGS)}. Found: {self.rounding!r}."
            raise ConfigError(msg)
        if self.scale_kind not in ("power_of_two", "free"):
            msg = f"scale kind must be 'power_of_two' or 'free'. Found: {self.scale_kind!r}."
            raise ConfigError(msg)

    @property
    def affine(self) -> bool:
        """Whether there is a zero point."""
        return self.symmetry == "affine"

    @property
    def code_bits(self) -> int:
        """Width of the codes that flow between ops, centred around zero."""
        return self.bits + int(self.affine)

    @property
    def qmin(self) -> int:
        """The smallest code (the smallest that is stored, on an affine grid)."""
        return -(1 << (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1 + int(self.closed)

    @property
    def steps_covered(self) -> int:
        """How many steps the widest half-range of a step has.

        With power-of-two scales it is ``2^(bits-1)``: a range that is itself a power of two (the
        usual range limit) keeps every bit, at the price of one code at the very top. Otherwise, and
        on a strict grid, the range ends with the codes.
        """
        within_codes = self.scale_kind == "free" or self.strict
        return self.qmax if within_codes else 1 << (self.bits - 1)

    def step(self, absmax: Tensor) -> Tensor:
        """Return the step that covers ``[-absmax, absmax]``, elementwise; zero gives a neutral one.

        A power-of-two step is the smallest ``2^e`` with ``absmax <= steps_covered * 2^e``, a free
        one ``absmax / qmax``.
        """
        absmax = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
        if self.scale_kind == "free":
            return absmax / self.qmax
        mantissa, exponent = torch.frexp(absmax)
        exponent = exponent - (self.bits - 1)
        if not self.exclusive:
            exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
        if self.strict:
            exponent = exponent + (absmax > torch.ldexp(self._top(absmax), exponent))
        exponent = exponent.clamp(*self.exponents)
        return torch.ldexp(torch.ones_like(absmax), exponent)

    def step_value(self, absmax: float) -> float:
        """Return what :meth:`step` returns for one float32 value, without tensor arithmetic."""
        if not absmax > 0:
            absmax = 1.0
        if self.scale_kind == "free":
            return float(np.float32(absmax) / np.float32(self.qmax))
        mantissa, exponent = math.frexp(absmax)
        exponent -= (mantissa == 0.5 and not self.exclusive) + self.bits - 1
        if self.strict:
            exponent += absmax > math.ldexp(self.qmax, exponent)
        low, high = self.exponents
        return math.ldexp(1.0, min(max(exponent, low), high))

    def absmax_of(self, step: float) -> float:
        """Return a half-range, in float32, whose step this is.

        Raises:
            ConfigError: If no half-range has this step.
        """
        near = np.float32(step * self.qmax)
        for candidate in (near, *(np.nextafter(near, np.float32(end)) for end in (0, np.inf))):
            if self.step_value(float(candidate)) == step:
                return float(candidate)
        msg = f"a grid of {self.bits} bits with {self.scale_kind!r} scales has no step {step!r}."
        raise ConfigError(msg)

    def _top(self, like: Tensor) -> Tensor:
        return torch.full_like(like, self.qmax)

    # --- two-sided ranges -----------------------------------------------------------------------

    def step_of_range(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the step that covers ``[low, high]`` and zero, 0-dim float32.

        On an affine grid it is ``(high - low) / (qmax - qmin)`` in float32, or the next power of
        two. An empty range, and one too small for a step of its own, have a neutral one.
        """
        if not self.affine:
            return self.step(torch.maximum(-low, high))
        step = (high.clamp(min=0.0) - low.clamp(max=0.0)) / (self.qmax - self.qmin)
        step = torch.where(step >= SMALLEST_NORMAL, step, torch.ones_like(step))
        if self.scale_kind == "free":
            return step
        mantissa, exponent = torch.frexp(step)
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
        return torch.ldexp(torch.ones_like(step), exponent.clamp(*self.exponents))

    def step_value_of_range(self, low: float, high: float) -> float:
        """Return what :meth:`step_of_range` returns for two float32 values."""
        if not self.affine:
            return self.step_value(max(-low, high))
        span = np.float32(max(high, 0.0)) - np.float32(min(low, 0.0))
        step = float(span / np.float32(self.qmax - self.qmin))
        if not step >= SMALLEST_NORMAL:
            step = 1.0
        if self.scale_kind == "free":
            return step
        mantissa, exponent = math.frexp(step)
        lowest, highest = self.exponents
        return math.ldexp(1.0, min(max(exponent - (mantissa == 0.5), lowest), highest))

    def zero_point_of_range(self, low: Tensor, step: Tensor) -> Tensor:
        """Return the code that stands for zero, a whole number in float32.

        ``qmin - low / step`` in float32, halves away from zero, within the codes (TFLite's
        converter); 0 on a symmetric grid.
        """
        if not self.affine:
            return torch.zeros_like(step)
        return half_away(self.qmin - low.clamp(max=0.0) / step).clamp(self.qmin, self.qmax)

    def zero_point_value_of_range(self, low: float, step: float) -> int:
        """Return what :meth:`zero_point_of_range` returns for two float32 values."""
        if not self.affine:
            return 0
        place = np.float32(self.qmin) - np.float32(min(low, 0.0)) / np.float32(step)
        return max(self.qmin, min(self.qmax, round_value(float(place), "half_away")))
