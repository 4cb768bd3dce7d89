"""Range limits: clamp values into a bound, with a choice of gradient outside."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.capture import can_read
from lightning_linger.core.config import Limit, LimitGradient

PULL = 0.01


@dataclass(frozen=True)
class Limits:
    """The range limits of one site."""

    weight: Limit | None
    bias: Limit | None
    output: Limit | None
    gradient: LimitGradient


class _PullBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor) -> Tensor:
        ctx.save_for_backward(x, bound)
        return torch.minimum(torch.maximum(x, -bound), bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, bound = ctx.saved_tensors
        pull = (x > bound).to(x.dtype) - (x < -bound).to(x.dtype)
        return torch.where(pull == 0, grads[0], PULL * pull), None


def bound_of(x: Tensor, limit: Limit) -> Tensor:
    """Return the 0-dim bound that ``limit`` means for the values of ``x``."""
    values = x.detach().abs().float()
    if limit.kind == "static":
        return values.new_tensor(limit.value)
    if limit.kind == "mean":
        return values.mean() * limit.value
    rank = max(1, round(values.numel() * limit.value / 100.0))
    return values.flatten().kthvalue(rank).values


def apply_bound(x: Tensor, bound: Tensor, gradient: LimitGradient) -> Tensor:
    """Clamp ``x`` into ``[-bound, bound]``; outside the gradient is zero or a constant pull."""
    if gradient == "pull":
        out: Tensor = _PullBack.apply(x, bound)
        return out
    return torch.minimum(torch.maximum(x, -bound), bound)


def is_within(x: Tensor, bound: float) -> bool:
    """Whether all values are known to be within the bound, so that limiting them is a no-op.

    Finding that out costs less than clamping, and leaves nothing to do for backward.
    """
    if not can_read(x) or x.numel() == 0:
        return False
    low, high = torch.aminmax(x.detach())
    return bool(low.item() >= -bound and high.item() <= bound)


def limited(x: Tensor, limit: Limit | None, gradient: LimitGradient) -> Tensor:
    """Apply a limit to a weight or bias; None leaves it alone."""
    if limit is None:
        return x
    if limit.kind == "static" and is_within(x, limit.value):
        return x
    if limit.kind == "static" and gradient == "zero":
        return x.clamp(-limit.value, limit.value)
    return apply_bound(x, bound_of(x, limit).to(x.dtype), gradient)
