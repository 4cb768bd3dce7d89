"""Rounding to integers: named pure functions, the only place where a rounding rule is written."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["half_up", "half_even", "half_away", "floor", "ceil"]


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


# Stochastic rounding needs a generator and joins this table when gradients are quantized.
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "half_up": half_up,
    "half_even": half_even,
    "half_away": half_away,
    "floor": floor,
    "ceil": ceil,
}
