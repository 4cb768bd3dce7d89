"""Gradients on an integer grid: the identity forward, rounding backward (NICS-fix)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.capture import can_read, capturing
from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.fake_quantize import fake_quantize
from lightning_linger.core.grid import Grid, ScaleKind
from lightning_linger.core.noise import Noise
from lightning_linger.core.ranges import RangeEstimator
from lightning_linger.core.rounding import Rounder, Rounding
from lightning_linger.core.switches import Switches

# Gradients are often far smaller than any activation.
EXPONENTS = (-100, 60)


class GradientQuantizer(nn.Module):
    """Rounds the gradient of one tensor, behind it: what is before receives grid values.

    Behind a quantizer this is before the mask of clipped values, which then acts on the rounded
    gradient. The grid is closed: a gradient that is a power of two keeps its value at any width.

    Args:
        name: The site and role, for messages.
        bits: Width, 2 to 16.
        scale_kind: Kind of the scale.
        rounding: Rule.
        range: Range estimator, e.g. ``last_absmax``, or a fixed absolute maximum.
        switches: What is on in the model: a range stays where ranges do not move.

    Attributes:
        frozen: Whether the range stays what it is.
        active: Whether gradients are rounded; if not, they pass in float.
    """

    def __init__(
        self,
        name: str,
        bits: int,
        scale_kind: ScaleKind,
        rounding: Rounding,
        range: str | float,
        switches: Switches,
    ) -> None:
        super().__init__()
        self.name = name
        self.grid = Grid(bits, scale_kind, rounding, closed=True, exponents=EXPONENTS)
        self.estimator = RangeEstimator(range, name, self.grid)
        self.switches = switches
        self.frozen = False
        self.active = True
        # Kept out of `_modules`: the model has one, and its state is saved once.
        self.__dict__["noise"] = None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, whose gradient is rounded in training."""
        if not (self.active and self.training and x.requires_grad and torch.is_grad_enabled()):
            return x
        if capturing():
            msg = (
                f"`{self.name}`: a compiled graph cannot round gradients, whose range moves in "
                "backward. Train this model eagerly, or leave `gradient_bits` out."
            )
            raise UnsupportedError(msg)
        out: Tensor = _RoundGradient.apply(x, self)
        return out

    @property
    def rounding(self) -> str | Rounder:
        """How gradients are rounded now."""
        noise: Noise | None = self.__dict__["noise"]
        return self.grid.rounding if noise is None else noise.rounder(f"{self.name}:gradient")

    @torch.no_grad()
    def rounded(self, gradient: Tensor) -> Tensor:
        """Move the range by a gradient and return it on the grid, once there is a range."""
        values = gradient.float()
        if self.switches.observing and not self.frozen:
            self.estimator.observe(values)
        if not self.estimator.known:
            return gradient
        absmax = self.estimator.absmax()
        step = self.grid.step_value(absmax.item()) if can_read(absmax) else self.grid.step(absmax)
        low, high = self.grid.qmin, self.grid.qmax
        return fake_quantize(values, step, low, high, self.rounding).to(gradient.dtype)

    def extra_repr(self) -> str:
        """Show the grid."""
        return str(self.grid)


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: GradientQuantizer) -> Tensor:
        ctx.quantizer = quantizer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.quantizer.rounded(grads[0]), None
