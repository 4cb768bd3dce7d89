"""Ranges that are learned by gradient: LSQ, TQT, PACT.

Every kind has one parameter per scale. The forward is the integer grid's own, at the step that the
parameter stands for; only the gradient differs. ``v = x / step`` is the value in codes, ``q`` its
code, and ``low`` and ``high`` are the end codes. A value is clipped where rounding alone would
leave the codes: ``v < low - 1/2`` or ``v >= high + 1/2``. In the papers of LSQ and PACT the end
codes clip already; of few codes, half of them idle behind a ReLU, that leaves hardly a gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.fake_quantize import Bound, Scalar, next_to, where_between
from lightning_linger.core.float32_state import Float32State
from lightning_linger.core.grid import MAX_EXPONENT, MIN_EXPONENT, Grid, ScaleKind

# What a step may not fall below, whatever an optimizer does.
SMALLEST_STEP = 2.0**MIN_EXPONENT

Interval = tuple[float, float]
EVERYTHING: Interval = (-math.inf, math.inf)


@dataclass(frozen=True)
class LearnedKind:
    """One way to learn a range.

    Args:
        start: Estimator of the first value for activations.
        weight_start: Estimator of the first value for weights; None where the kind is not for them.
        parameter: Returns the parameter of a half-range.
        step: Returns the step of a parameter.
        slope: Returns the derivatives of rounded values with respect to the parameter, at a step.
        about: What the parameter is, for the documentation.
        normalized: Whether the parameter's gradient is scaled as LSQ asks (section 2.2).
        either_sign: Whether a parameter and its negative stand for the same step. An optimizer may
            move a narrow range across zero; if the sign counted, it would have no width then.
        start_scale: For which scale the first value is measured; None for the grid's own.
    """

    start: str
    weight_start: str | None
    parameter: Callable[[Tensor, Grid], Tensor]
    step: Callable[[Tensor, Grid], Tensor]
    slope: Callable[[Clipping, Tensor], Tensor]
    about: str
    normalized: bool = False
    either_sign: bool = False
    start_scale: ScaleKind | None = None


def _half_range(half: Tensor, grid: Grid) -> Tensor:
    return half


def _lsq_parameter(half: Tensor, grid: Grid) -> Tensor:
    # From the power of two that covers a half-range, the next ones are equally far.
    return grid.step(half) * grid.qmax if _shifts(grid) else half


def _lsq_step(parameter: Tensor, grid: Grid) -> Tensor:
    step = (parameter.abs() / grid.qmax).clamp(min=SMALLEST_STEP)
    return _power_of_two(torch.round(torch.log2(step))) if _shifts(grid) else step


def _lsq_slope(at: Clipping, step: Tensor) -> Tensor:
    """LSQ, equation 3."""
    return at.q - at.unclipped(at.v)


def _tqt_parameter(half: Tensor, grid: Grid) -> Tensor:
    return torch.log2(half)


def _tqt_step(parameter: Tensor, grid: Grid) -> Tensor:
    return _power_of_two(torch.ceil(parameter) - (grid.bits - 1))


def _tqt_slope(at: Clipping, step: Tensor) -> Tensor:
    """TQT, equations 6 to 8, with respect to log2 of the threshold."""
    return _lsq_slope(at, step) * (step * math.log(2.0))


def _pact_step(parameter: Tensor, grid: Grid) -> Tensor:
    return grid.step(parameter.abs().clamp(min=SMALLEST_STEP * grid.qmax))


def _pact_slope(at: Clipping, step: Tensor) -> Tensor:
    """PACT, equation 3, on both sides of a signed grid."""
    sign = torch.sign(at.q)
    return sign - at.unclipped(sign)


LEARNED: dict[str, LearnedKind] = {
    "lsq": LearnedKind(
        "ema_mse",
        "mse",
        _lsq_parameter,
        _lsq_step,
        _lsq_slope,
        "the half-range, `qmax` steps; its sign does not count",
        normalized=True,
        either_sign=True,
    ),
    "tqt": LearnedKind(
        "ema_mse",
        "mse",
        _tqt_parameter,
        _tqt_step,
        _tqt_slope,
        "log2 of the threshold; the step is a power of two",
        start_scale="power_of_two",
    ),
    "pact": LearnedKind(
        "ema_absmax",
        None,
        _half_range,
        _pact_step,
        _pact_slope,
        "the clipping value; its sign does not count",
        either_sign=True,
    ),
}


class LearnedScale(Float32State):
    """A learned range of one tensor.

    The parameter is there from set-up, so that the user's optimizer has it, and has no gradient
    before the tensor is quantized: optimizers skip what has none, weight decay included. Until the
    first training step with gradients it follows the estimator.

    Args:
        kind: A name of ``LEARNED``.
        grid: The grid.
        channels: How many scales there are; None for a single one.

    Attributes:
        value: float32, 0-dim or ``[channels]``.
        started: Whether gradients have taken over from the estimator.
    """

    begun: Tensor

    def __init__(self, kind: str, grid: Grid, channels: int | None = None) -> None:
        super().__init__()
        self.name = kind
        self.kind = LEARNED[kind]
        self.grid = grid
        self.value = nn.Parameter(torch.ones(() if channels is None else channels))
        self.register_buffer("begun", torch.tensor(False))
        self.started = False

    @torch.no_grad()
    def follow(self, half_range: Tensor) -> None:
        """Take the value of a half-range; where gradients are on, they take over from here."""
        self.value.copy_(self._parameter(half_range))

    def follow_range(self, low: Tensor, high: Tensor) -> None:
        """Take the value of the half-range that two ends ask for."""
        self.follow(torch.maximum(-low, high))

    def start(self) -> None:
        """Let gradients take over."""
        self.started = True
        self.begun.fill_(True)

    @property
    def start_grid(self) -> Grid:
        """The grid for which the first value is measured."""
        scale_kind = self.kind.start_scale or self.grid.scale_kind
        return dataclasses.replace(self.grid, scale_kind=scale_kind)

    def change_grid(self, grid: Grid) -> None:
        """Go on with the same half-range on a grid of another width."""
        self.grid = grid

    def _parameter(self, half_range: Tensor) -> Tensor:
        half_range = torch.where(half_range > 0, half_range, 1.0).reshape(self.value.shape)
        return self.kind.parameter(half_range, self.grid)

    def step_of(self, half_range: Tensor) -> Tensor:
        """Return the step that a half-range stands for, of the shape of the parameter."""
        return self.kind.step(self._parameter(half_range), self.grid)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Return the step, of the shape of the parameter."""
        return self.kind.step(self.value, self.grid)

    def unsigned(self, parameter: Tensor) -> Tensor:
        """Return a parameter without its sign where that does not count, with its gradient."""
        return parameter.abs() if self.kind.either_sign else parameter

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
        """Return rounded values with the gradients of rounding, for values and parameter.

        Where the platform had to take a coarser step than the parameter asks for, a gradient that
        asks for a finer one still is dropped.

        Args:
            rounded: ``step * q``.
            real: What was rounded.
            step: The step in use, which broadcasts to ``real``.
            low: Smallest code of the grid.
            high: Largest code of the grid.
            parameter: The parameter in a shape that broadcasts to ``real``, if it has several
                values.
            window: What ``real`` was clamped into before it was rounded.
        """
        parameter = self.unsigned(self.value if parameter is None else parameter)
        own = self.kind.step(parameter.detach(), self.grid)
        coarser = torch.as_tensor(step, device=own.device) > own * (1 + 1e-6)
        scale = 1.0
        if self.kind.normalized:
            scale = lsq_scale(real.numel() / self.value.numel(), self.grid.qmax)
        out: Tensor = _Carry.apply(
            real, parameter, rounded.detach(), step, low, high, window, coarser, scale, self.name
        )
        return out

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.started = bool(self.begun.item())

    def extra_repr(self) -> str:
        """Show the kind and whether gradients have taken over."""
        return f"{self.name}, started={self.started}"


def lsq_scale(shared: float, codes: int) -> float:
    """Return what the slope of a half-range is multiplied with.

    LSQ divides the gradient of a step by ``sqrt(N * qmax)``. The parameter is ``qmax`` steps, so
    that Adam, which moves every parameter by about the learning rate, does not move a fine step by
    many times itself; with this factor plain gradient descent moves the step as in the paper.

    Args:
        shared: How many values share it.
        codes: ``qmax``.
    """
    return math.sqrt(codes / max(shared, 1.0))


@dataclass(frozen=True)
class Clipping:
    """Which values a window and a grid let through, in codes.

    Attributes:
        real: The values.
        window: What they were clamped into.
        v: The values behind the window.
        q: Their codes.
        edges: What ``v`` lies between where the grid does not clip.
    """

    real: Tensor
    window: Interval
    v: Tensor
    q: Tensor
    edges: tuple[Scalar, Scalar]

    @classmethod
    def of(
        cls,
        real: Tensor,
        rounded: Tensor,
        step: Tensor,
        low: Bound,
        high: Bound,
        window: Interval,
    ) -> Clipping:
        """Compare values with what they were rounded to (see :meth:`LearnedScale.carry`)."""
        values = real if window == EVERYTHING else real.clamp(*window)
        edges = (next_to(low - 0.5, -math.inf, real.dtype), high + 0.5)
        return cls(real, window, values / step, rounded / step, edges)

    def unclipped(self, x: Tensor) -> Tensor:
        """Return ``x`` where the grid does not clip, and zero elsewhere."""
        return where_between(x, self.v, *self.edges)

    def passed(self, grad: Tensor) -> Tensor:
        """Return the gradient of the values.

        At the edges themselves the window has no gradient, as ReLU has none at zero.
        """
        passed = self.unclipped(grad)
        if self.window == EVERYTHING:
            return passed
        return where_between(passed, self.real, *self.window)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        real: Tensor,
        parameter: Tensor,
        rounded: Tensor,
        step: Scalar,
        low: Bound,
        high: Bound,
        window: Interval,
        coarser: Tensor,
        scale: float,
        kind: str,
    ) -> Tensor:
        step = torch.as_tensor(step, dtype=real.dtype, device=real.device)
        ctx.save_for_backward(real, rounded, coarser, step)
        ctx.shape, ctx.scale, ctx.kind = parameter.shape, scale, kind
        ctx.low, ctx.high, ctx.window = low, high, window
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        real, rounded, coarser, step = ctx.saved_tensors
        at = Clipping.of(real, rounded, step, ctx.low, ctx.high, ctx.window)
        grad = grads[0]
        slope = LEARNED[ctx.kind].slope(at, step)
        total = (grad * slope).float().sum_to_size(ctx.shape) * ctx.scale
        total = torch.where(coarser, total.clamp(max=0.0), total)
        return at.passed(grad), total, None, None, None, None, None, None, None, None


def _shifts(grid: Grid) -> bool:
    return grid.scale_kind == "power_of_two"


def _power_of_two(exponent: Tensor) -> Tensor:
    exponent = exponent.clamp(MIN_EXPONENT, MAX_EXPONENT).to(torch.int32)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
