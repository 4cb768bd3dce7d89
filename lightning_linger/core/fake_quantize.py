"""Fused fake-quantize: round to a grid and come back to float, with a clipping-aware gradient."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_linger.core.rounding import ROUNDINGS, Rounder, rounder

Scalar = float | Tensor
Bound = int | Tensor

# From this many codes on, the gradient mask is taken from the output (see `fake_quantize`).
OUTPUT_MASK_CODES = 128


def quantize_codes(
    x: Tensor,
    step: Scalar,
    low: Bound,
    high: Bound,
    rounding: str | Rounder,
    overwrite: bool = False,
) -> Tensor:
    """Return ``clamp(round(x / step), low, high)`` as a float tensor of whole numbers.

    With a power-of-two step the division is exact, so the float result is the integer result
    whenever ``|x / step| < 2^23`` in float32.
    """
    if rounding == "half_up" and _is_power_of_two(step):
        half = x.new_full((), 0.5)
        out = x if overwrite else None
        codes = torch.add(half, x, alpha=1.0 / float(step), out=out).floor_()
    else:
        codes = rounder(rounding)(x / step)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = torch.as_tensor(low, device=x.device), torch.as_tensor(high, device=x.device)
        return torch.minimum(torch.maximum(codes, low), high)
    return codes.clamp_(low, high)


def _is_power_of_two(step: Scalar) -> bool:
    # `alpha=` multiplies by the reciprocal, which equals the division for powers of two only.
    return isinstance(step, float) and (step.hex().startswith("0x1.0000000000000p"))


def where_between(x: Tensor, value: Tensor, low: Scalar, high: Scalar) -> Tensor:
    """Return ``x`` where ``low < value < high``, and zero elsewhere.

    With numbers for bounds it is one vectorized kernel; on a CPU a mask takes many times as long.
    """
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return x * ((value > low) & (value < high))
    found: Tensor = torch.ops.aten.hardtanh_backward(x, value, low, high)
    return found


def next_to(edge: Scalar, end: float, dtype: torch.dtype) -> Scalar:
    """Return the next number of a dtype in the direction of an end: it makes ``<=`` of ``<``."""
    if isinstance(edge, Tensor):
        edge = edge.to(dtype)
        return torch.nextafter(edge, torch.full_like(edge, end))
    number = np.float64 if dtype == torch.float64 else np.float32
    return float(np.nextafter(number(edge), number(end)))


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Scalar,
        low: Bound,
        high: Bound,
        rounding: str | Rounder,
        from_output: bool,
        overwrite: bool,
    ) -> Tensor:
        y = quantize_codes(x, step, low, high, rounding, overwrite).mul_(step)
        if y is x:
            ctx.mark_dirty(x)
        slack = 0.0 if from_output else 0.5
        edges = ((low - slack) * step, (high + slack) * step)
        value = y if from_output else x
        if isinstance(edges[0], Tensor):
            ctx.edges = None
            ctx.save_for_backward(value, *edges)
        else:
            ctx.edges = edges
            ctx.save_for_backward(value)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value, *saved = ctx.saved_tensors
        masked = where_between(grads[0], value, *(ctx.edges or saved))
        return masked, None, None, None, None, None, None


def fake_quantize(
    x: Tensor,
    step: Scalar,
    low: Bound,
    high: Bound,
    rounding: str | Rounder = "half_up",
    overwrite: bool = False,
    keeps_input: bool = False,
) -> Tensor:
    """Return ``step * clamp(round(x / step), low, high)``.

    The gradient is the straight-through one inside the clipping range and zero outside. For grids
    of 128 codes and more the mask is taken from the *output*, whose two end codes count as clipped:
    the output is what the next layer saves anyway, so nothing extra is kept for backward (LISTENAI
    linger's CUDA kernels use this rule). Coarser grids keep the input, where losing two codes of
    four would hurt.

    Args:
        x: Floating tensor of any shape.
        step: Positive step, ``real = step * code``: a float, or a tensor that broadcasts to ``x``.
        low: Smallest code, e.g. -128, or 0 where a ReLU follows.
        high: Largest code, e.g. 127. A bound that depends on a tensor step (ReLU6) is a tensor too.
        rounding: A name from :mod:`lightning_linger.core.rounding`, or a function.
        overwrite: Whether the memory of ``x`` may be used, because nothing else reads it.
        keeps_input: Whether ``x`` is kept whatever the width, e.g. because it is a parameter: the
            end codes then have a gradient.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        wide = isinstance(low, Tensor) or isinstance(high, Tensor)
        from_output = not keeps_input and (wide or high - low >= OUTPUT_MASK_CODES - 1)
        out: Tensor = _FakeQuantize.apply(
            x, step, low, high, rounding, from_output, overwrite and from_output
        )
        return out
    return quantize_codes(x, step, low, high, rounding, overwrite).mul_(step)


class _RoundToCoarser(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float, rounding: str) -> Tensor:
        if rounding == "half_up":
            codes = torch.add(x.new_full((), 0.5), x, alpha=1.0 / step).floor_()
        else:
            codes = ROUNDINGS[rounding](x / step)
        return codes.mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


def round_to_coarser(x: Tensor, step: float, rounding: str) -> Tensor:
    """Round grid values to a power-of-two step coarser than theirs, into new memory.

    Half the codes or fewer remain, so nothing saturates and the gradient is the identity.
    """
    out: Tensor = _RoundToCoarser.apply(x, step, rounding)
    return out


class _StraightThroughWithin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor, low: Scalar, high: Scalar) -> Tensor:
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            ctx.edges = None
            ctx.save_for_backward(carrier, *map(torch.as_tensor, (low, high)))
        else:
            ctx.edges = (low, high)
            ctx.save_for_backward(carrier)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        carrier, *saved = ctx.saved_tensors
        grad = grads[0].to(carrier.dtype)
        return None, where_between(grad, carrier, *(ctx.edges or saved)), None, None


def straight_through_within(value: Tensor, carrier: Tensor, low: Scalar, high: Scalar) -> Tensor:
    """Return ``value`` exactly, with the gradient of ``carrier.clamp(low, high)``."""
    if torch.is_grad_enabled() and carrier.requires_grad:
        below = next_to(low, -math.inf, carrier.dtype)
        above = next_to(high, math.inf, carrier.dtype)
        out: Tensor = _StraightThroughWithin.apply(value.detach(), carrier, below, above)
        return out
    return value


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, grads[0]


def straight_through(value: Tensor, carrier: Tensor) -> Tensor:
    """Return ``value`` exactly, with the gradient of ``carrier`` (same shape)."""
    if torch.is_grad_enabled() and carrier.requires_grad:
        out: Tensor = _StraightThrough.apply(value.detach(), carrier)
        return out
    return value
