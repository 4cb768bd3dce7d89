"""Rounding to integers: named pure functions, the only place where a rounding rule is written."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["half_up", "half_even", "half_away", "floor", "ceil"]
# What training may round with: a rule, or by chance, which no engine does.
TrainingRounding = Rounding | Literal["stochastic"]
STOCHASTIC = "stochastic"
Rounder = Callable[[Tensor], Tensor]


def half_up(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties upwards: ``floor(x + 0.5)`` (LUNA engines)."""
    return torch.floor(x + 0.5)


def half_even(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties to the even one (IEEE 754, ONNX ``QuantizeLinear``)."""
    return torch.round(x)


def half_away(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties away from zero (C ``round``, TFLite reference kernels)."""
    magnitude = torch.floor(torch.abs(x) + 0.5)
    return torch.copysign(magnitude, x)


def floor(x: Tensor) -> Tensor:
    """Round towards minus infinity (a plain arithmetic right shift)."""
    return torch.floor(x)


def ceil(x: Tensor) -> Tensor:
    """Round towards plus infinity."""
    return torch.ceil(x)


def stochastic(x: Tensor, uniform: Tensor) -> Tensor:
    """Round up with the probability of the fraction, so that the mean of the result is ``x``.

    This is ``floor(x + u)``, written so that no sum is rounded: whole numbers stay what they are.

    Args:
        x: Any numbers.
        uniform: Numbers from [0, 1) of the shape of ``x``, e.g. from
            :class:`lightning_linger.core.noise.Noise`.
    """
    low = torch.floor(x)
    return low + (uniform < x - low)


def rounder(rule: str | Rounder) -> Rounder:
    """Return the function of a rule's name, a function as it is."""
    return ROUNDINGS[rule] if isinstance(rule, str) else rule


def round_value(x: float, rounding: Rounding | str) -> int:
    """Round one number as the tensor function of that name does, without a tensor."""
    low = math.floor(x)
    rest = x - low
    if rounding == "floor":
        return low
    if rounding == "ceil":
        return math.ceil(x)
    if rest != 0.5:
        return low + (rest > 0.5)
    if rounding == "half_even":
        return low + low % 2
    return low + (rounding == "half_up" or x > 0)


ROUNDINGS: dict[str, Rounder] = {
    "half_up": half_up,
    "half_even": half_even,
    "half_away": half_away,
    "floor": floor,
    "ceil": ceil,
}
