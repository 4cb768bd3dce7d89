"""A learned range with two ends: LSQ+ (Bhalgat et al. 2020, https://arxiv.org/abs/2004.09576).

Beside the step, the lower end of the range is a parameter. It becomes the zero point, a whole
number, by rounding, through which gradients pass: a value that saturates at an end of the grid is
``offset`` or ``offset + (2^bits - 1) * step``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.errors import ConfigError
from lightning_linger.core.fake_quantize import Bound, Scalar
from lightning_linger.core.grid import Grid
from lightning_linger.core.ranges.learned import EVERYTHING, Clipping, Interval, LearnedScale

# What learns an offset too, where there is one.
AFFINE_KIND = "lsq"


class LearnedRange(LearnedScale):
    """The learned step and lower end of one activation on an affine grid.

    Args:
        kind: ``lsq``; the others have no offset.
        grid: An affine grid.
        name: The tensor, for messages.

    Attributes:
        offset: float32, 0-dim: the lower end of the range, 0 or below.

    Raises:
        ConfigError: If the kind is for symmetric grids.
    """

    def __init__(self, kind: str, grid: Grid, name: str) -> None:
        if kind != AFFINE_KIND:
            msg = (
                f"`{name}`: range={kind!r} is for grids without a zero point. Use "
                f"range={AFFINE_KIND!r}, an estimator, or symmetry='symmetric'."
            )
            raise ConfigError(msg)
        super().__init__(kind, grid)
        self.offset = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def follow_range(self, low: Tensor, high: Tensor) -> None:
        """Take the step and the lower end of a range."""
        self.value.copy_(self.grid.step_of_range(low, high) * self.grid.qmax)
        self.offset.copy_(low.clamp(max=0.0))

    @torch.no_grad()
    def zero_point(self, step: Tensor) -> Tensor:
        """Return the code of zero at a step, as a whole number in float32."""
        return self.grid.zero_point_of_range(self.offset.detach(), step)

    def carry(
        self,
        rounded: Tensor,
        real: Tensor,
        step: Scalar,
        low: Bound,
        high: Bound,
        parameter: Tensor | None = None,
        window: Interval = EVERYTHING,
    ) -> Tensor:
        """Return rounded values with gradients for values, step and offset (see the base class)."""
        codes = float(self.grid.qmax - self.grid.qmin)
        scale = 1.0 / math.sqrt(max(real.numel(), 1) * codes)
        scales = (scale * self.grid.qmax, scale)
        out: Tensor = _CarryOffset.apply(
            *(real, self.unsigned(self.value), self.offset, rounded.detach(), step, low, high),
            *(window, scales),
        )
        return out


class _CarryOffset(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        real: Tensor,
        value: Tensor,
        offset: Tensor,
        rounded: Tensor,
        step: Scalar,
        low: Bound,
        high: Bound,
        window: Interval,
        scales: tuple[float, float],
    ) -> Tensor:
        step = torch.as_tensor(step, dtype=real.dtype, device=real.device)
        ctx.save_for_backward(real, rounded, step)
        ctx.low, ctx.high, ctx.window, ctx.scales = low, high, window, scales
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        real, rounded, step = ctx.saved_tensors
        (grad,) = grads
        at = Clipping.of(real, rounded, step, ctx.low, ctx.high, ctx.window)
        # The upper end is the offset plus all steps, the lower end the offset alone.
        end = at.q - ctx.low
        slope = at.unclipped(at.q - at.v) + (end - at.unclipped(end))
        of_step = (grad * slope).float().sum() * ctx.scales[0]
        of_offset = (grad - at.unclipped(grad)).float().sum() * ctx.scales[1]
        return at.passed(grad), of_step, of_offset, None, None, None, None, None, None
