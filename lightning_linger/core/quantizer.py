"""The activation quantizer: a grid, a range estimator, and the window its follower lets through."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_linger.core.capture import can_read
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.fake_quantize import (
    Bound,
    Scalar,
    fake_quantize,
    straight_through_within,
)
from lightning_linger.core.gradients import GradientQuantizer
from lightning_linger.core.grid import Grid
from lightning_linger.core.noise import Noise
from lightning_linger.core.ranges import LearnedRange, LearnedScale, RangeEstimator
from lightning_linger.core.rounding import Rounder, half_away, round_value
from lightning_linger.core.tags import Tag, with_tag


@dataclass(frozen=True)
class Window:
    """The part of a value that matters to what follows.

    Args:
        low: Codes below are clamped (0 when a ReLU follows).
        high: Codes above are clamped (6 when a ReLU6 follows).
        cap: The observed range is cut here, codes are not clamped (a range limit of the float
            stage, or 8 before a sigmoid).
    """

    low: float = -math.inf
    high: float = math.inf
    cap: float = math.inf

    def __and__(self, other: "Window") -> "Window":
        """Return the intersection of two windows."""
        return Window(
            max(self.low, other.low), min(self.high, other.high), min(self.cap, other.cap)
        )


class Quantizer(nn.Module):
    """Rounds one activation tensor of the model to its grid.

    A call that learns moves the range first and then rounds with it. In evaluation mode the step is
    frozen at the first call.

    Args:
        name: The site and role, e.g. ``layer1.0.conv1/conv2d/0``; used in messages and tags.
        grid: Bits, scale kind and rounding.
        range: Name of the range estimator, a fixed absolute maximum, or the two ends of a fixed
            range.
        window: What the follower lets through.
        factor: What the range that a batch asks for is multiplied with.
        learns: Whether a range that can be learned is; otherwise it stays with its estimator.

    Attributes:
        learned: The learned range, None for one that is only observed.
        gradient: Rounds the gradient of what is rounded here, None to leave it as it is.
        rounds: Whether values are rounded; if not, they pass in float, clamped into the window.
    """

    def __init__(
        self,
        name: str,
        grid: Grid,
        range: str | float | tuple[float, float],
        window: Window | None = None,
        learns: bool = True,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.name = name
        self.grid = grid
        self.window = window or Window()
        self.estimator = RangeEstimator(range, name, grid, factor)
        kind = self.estimator.rule.learned
        self.learned = _learned(kind, grid, name) if kind is not None and learns else None
        self.estimator.grid = self.measured_grid
        # For reports: a platform may have made the step coarser than the range asks for.
        self.latest_step: float | None = None
        self._frozen_step: float | None = None
        self._frozen_reach: float | None = None
        self._frozen_zero: int | None = None
        self.gradient: GradientQuantizer | None = None
        self.rounds = True
        # Kept out of `_modules`: the model has one, and its state is saved once.
        self.__dict__["noise"] = None

    @property
    def known(self) -> bool:
        """Whether a range has been seen, so that the quantizer can be used."""
        return self.estimator.known

    @property
    def measured_grid(self) -> Grid:
        """The grid that the estimator measures for."""
        return self.grid if self.learned is None else self.learned.start_grid

    @property
    def settled(self) -> bool:
        """Whether the step at hand can be used before this batch is observed."""
        return self.known and (self.learned is None or self.learned.started)

    def observe(self, x: Tensor, cap: float = math.inf) -> None:
        """Move the range by one batch, as far as the window and a range limit let through."""
        if self.learned is not None and self.learned.started:
            return
        cap = min(self.window.cap, cap)
        self.estimator.observe(x, max(self.window.low, -cap), min(self.window.high, cap))
        if self.learned is not None and self.known:
            self.learned.follow_range(*self.estimator.range.unbind())
            if torch.is_grad_enabled():
                self.learned.start()

    def assume(self, absmax: float) -> None:
        """Take a range that comes from no batch."""
        self.estimator.adopt(-absmax, absmax)
        self.thaw()

    def watch(self, x: Tensor, cap: float = math.inf) -> None:
        """Move the range by a batch that is not rounded; gradients do not take over from here."""
        with torch.no_grad():
            self.observe(x.detach().float(), cap)

    def wanted_step(self) -> Tensor:
        """Return the step that the range asks for, where the platform has no say."""
        if self.learned is not None:
            return self.learned.step()
        return self.grid.step_of_range(*self.estimator.range.unbind())

    def step(self, minimum: Scalar | None = None) -> Scalar:
        """Return the step in use.

        Args:
            minimum: The finest step the platform can reach here (``step_x * step_w`` behind a
                convolution whose accumulator can only be shifted right).

        Returns:
            A float where values can be read, a 0-dim tensor on a GPU or in a graph capture; once
            frozen, in evaluation, always a float.
        """
        self._thaw_in_training()
        if self._frozen_step is not None:
            return self._frozen_step
        if not can_read(self.estimator.range):
            step = self.wanted_step()
            if minimum is None:
                return step
            floor = torch.as_tensor(minimum, dtype=step.dtype, device=step.device)
            return torch.maximum(step, floor)
        if self.learned is not None:
            value = float(self.learned.step())
        else:
            value = self.grid.step_value_of_range(*self.estimator.range.tolist())
        if minimum is not None:
            value = max(value, float(minimum))
        if not self.training:
            self._frozen_step = value
        return value

    def zero_point(self, step: Scalar) -> Bound | None:
        """Return what stands for zero in an engine's memory; None on a symmetric grid.

        Args:
            step: The step in use.

        Returns:
            A number where values can be read, else a 0-dim tensor.
        """
        if not self.grid.affine:
            return None
        self._thaw_in_training()
        if self._frozen_zero is not None:
            return self._frozen_zero
        learned = self.learned
        low = learned.offset if isinstance(learned, LearnedRange) else self.estimator.range[0]
        if isinstance(step, Tensor) or not can_read(low):
            step = torch.as_tensor(step, dtype=torch.float32, device=low.device)
            return self.grid.zero_point_of_range(low.detach(), step)
        value = self.grid.zero_point_value_of_range(low.item(), step)
        if not self.training:
            self._frozen_zero = value
        return value

    def adopt_step(self, step: float) -> None:
        """Take a range that has a given step.

        Raises:
            ConfigError: If no range has it.
        """
        absmax = self.grid.absmax_of(step)
        self.estimator.adopt(-absmax, absmax)
        if self.learned is not None:
            self.learned.follow(self.estimator.absmax())
        self.thaw()
        if float(self.wanted_step()) != step:
            msg = f"`{self.name}`: its learned range has no step {step!r}."
            raise ConfigError(msg)

    def codes(self, step: Scalar) -> tuple[Bound, Bound]:
        """Return the smallest and largest code at this step."""
        zero_point = self.zero_point(step)
        if zero_point is None:
            return self.grid.qmin, self.grid.qmax
        return self.grid.qmin - zero_point, self.grid.qmax - zero_point

    def code_bounds(self, step: Scalar) -> tuple[Bound, Bound]:
        """Return the smallest and largest code at this step that the window lets through."""
        lowest, highest = self.codes(step)
        low, high = lowest, highest
        if self.window.low > -math.inf:
            low = _edge_code(self.window.low, step, lowest, highest, self.grid)
        if self.window.high < math.inf:
            high = _edge_code(self.window.high, step, lowest, highest, self.grid)
        return low, high

    def forward(
        self,
        x: Tensor,
        minimum: Scalar | None = None,
        learn: bool = False,
        cap: float = math.inf,
    ) -> Tensor:
        """Observe (if learning), round, tag.

        Args:
            x: Plain floating tensor.
            minimum: See :meth:`step`.
            learn: Whether the batch moves the range.
            cap: Range limit: what lies beyond is not covered by the range.

        Returns:
            The rounded tensor, tagged, of the dtype of ``x``.
        """
        values = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if learn:
            self.observe(values, cap)
        return self.round(values, self.step(minimum), x.dtype)

    def round(
        self, values: Tensor, step: Scalar, dtype: torch.dtype, overwrite: bool = False
    ) -> Tensor:
        """Round to the grid with a given step and tag the result.

        Args:
            values: Real values.
            step: The step.
            dtype: Of the result.
            overwrite: Whether the memory of ``values`` may be used.
        """
        if not self.rounds:
            return self.passed(values, step, dtype)
        usable = readable(step)
        if isinstance(usable, float):
            self.latest_step = usable
        low, high = self.code_bounds(usable)
        if self.learns_now:
            rounded = fake_quantize(values.detach(), usable, low, high, self.rounding)
            rounded = self._carried(rounded, values, usable)
        else:
            # A view cannot be overwritten under autograd without a copy of its base.
            overwrite = overwrite and isinstance(usable, float) and not values._is_view()
            rounded = fake_quantize(values, usable, low, high, self.rounding, overwrite)
        rounded = self.with_rounded_gradient(rounded.to(dtype))
        return with_tag(rounded, self.tag(step, dtype))

    def passed(self, values: Tensor, step: Scalar, dtype: torch.dtype) -> Tensor:
        """Return values as they are, clamped into the window, with a tag that says so."""
        window = self.window
        if window.low > -math.inf or window.high < math.inf:
            values = values.clamp(window.low, window.high)
        # A view: the tag must not appear on a tensor of the user's.
        passed = self.with_rounded_gradient(values.to(dtype).view_as(values))
        return with_tag(passed, dataclasses.replace(self.tag(step, dtype), rounded=False))

    def with_rounded_gradient(self, rounded: Tensor) -> Tensor:
        """Return a result of this quantizer with the gradient rounded, if it is to be."""
        return rounded if self.gradient is None else self.gradient(rounded)

    @property
    def learns_now(self) -> bool:
        """Whether the forward that runs now passes gradients to a learned range."""
        return self.learned is not None and self.training and torch.is_grad_enabled()

    def with_gradient(self, value: Tensor, real: Tensor, step: Scalar) -> Tensor:
        """Return a value on the grid with the gradient of having rounded ``real``.

        Args:
            value: On the grid, e.g. from an integer kernel.
            real: The real value it stands for, with gradients.
            step: The step in use.
        """
        return self.with_rounded_gradient(self._carried(value, real, step))

    def _carried(self, value: Tensor, real: Tensor, step: Scalar) -> Tensor:
        if self.learned is not None and self.learns_now:
            window = (self.window.low, self.window.high)
            return self.learned.carry(value, real, step, *self.codes(step), window=window)
        low, high = self.code_bounds(step)
        return straight_through_within(value, real, low * step, high * step)

    @property
    def rounding(self) -> str | Rounder:
        """How the forward that runs now rounds: by the grid's rule, in training maybe by chance."""
        noise: Noise | None = self.__dict__["noise"]
        if noise is None or not noise.training:
            return self.grid.rounding
        return noise.rounder(self.name)

    def tag(self, step: Scalar, dtype: torch.dtype) -> Tag:
        """Return the tag of a tensor rounded with ``step``."""
        grid = self.grid
        return Tag(
            step, grid.code_bits, self.name, dtype, self.zero_point(step), reach=self.reach()
        )

    def reach(self) -> Scalar:
        """Return the absolute maximum of the range."""
        self._thaw_in_training()
        if isinstance(self.learned, LearnedRange):
            span = self.learned.step() * (self.grid.qmax - self.grid.qmin)
            return float(span) if can_read(span) else span
        if self._frozen_reach is not None:
            return self._frozen_reach
        if not can_read(self.estimator.range):
            if self.learned is not None:
                return self.learned.step() * (self.grid.qmax + 1)
            return self.estimator.absmax()
        if self.learned is not None:
            reach = float(self.learned.step()) * (self.grid.qmax + 1)
        else:
            low, high = self.estimator.range.tolist()
            reach = max(-low, high)
        if not self.training:
            self._frozen_reach = reach
        return reach

    def _thaw_in_training(self) -> None:
        # Lightning goes back to training by setting `training`, without calling `train()`.
        if self.training and self._frozen_step is not None:
            self.thaw()

    def thaw(self) -> None:
        """Forget the frozen step."""
        self._frozen_step = self._frozen_reach = self._frozen_zero = None

    def train(self, mode: bool = True) -> "Quantizer":
        """Switch between moving (training) and frozen (evaluation) ranges."""
        self.thaw()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.thaw()

    def extra_repr(self) -> str:
        """Show the grid and the window."""
        return f"{self.grid}, {self.window}"


def _learned(kind: str, grid: Grid, name: str) -> LearnedScale:
    return LearnedRange(kind, grid, name) if grid.affine else LearnedScale(kind, grid)


def readable(step: Scalar) -> Scalar:
    """Return a step as a float where it can be read, which the fused kernel needs."""
    if isinstance(step, Tensor) and can_read(step):
        return float(step.item()) if step.numel() == 1 else step
    return step


def clamped(x: Tensor, low: Scalar, high: Scalar) -> Tensor:
    """Clamp between two numbers or tensors."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (torch.as_tensor(edge, dtype=x.dtype, device=x.device) for edge in (low, high))
        return torch.minimum(torch.maximum(x, low), high)
    return x.clamp(low, high)


def _edge_code(edge: float, step: Scalar, low: Bound, high: Bound, grid: Grid) -> Bound:
    """Return the code of an edge of a window; engines with a zero point round halves away."""
    if edge == 0.0:
        return 0
    if isinstance(step, Tensor) or isinstance(low, Tensor):
        place = torch.as_tensor(edge / step)
        return clamped(half_away(place) if grid.affine else torch.floor(place + 0.5), low, high)
    if grid.affine:
        code = round_value(float(np.float32(edge) / np.float32(step)), "half_away")
    else:
        code = math.floor(edge / step + 0.5)
    return max(low, min(int(high), code))
