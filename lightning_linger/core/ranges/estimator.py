"""The range of an activation over training steps."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.capture import can_read
from lightning_linger.core.distributed import is_distributed, max_over_ranks, sum_over_ranks
from lightning_linger.core.errors import QuantizationWarning
from lightning_linger.core.float32_state import Float32State
from lightning_linger.core.grid import Grid
from lightning_linger.core.ranges.histogram import BINS, Histogram
from lightning_linger.core.ranges.rule import RangeRule

EMA_WEIGHT = 0.1
# How often a mean counts its first batch.
_FIRST_COUNTS = {"mean": 1, "catch": 2}


class RangeEstimator(Float32State):
    """Tracks the range of a tensor over training steps.

    The moving average starts from the first batch, never from zero: no warm-up is needed. In a
    distributed run a batch is that of all processes together, so that every one of them has the
    same range: extremes and histograms are those of the whole batch, of other statistics the
    widest range of a process counts.

    Args:
        kind: A name that :meth:`RangeRule.parse` reads; a positive number is a fixed absolute
            maximum, two numbers are the ends of a fixed range.
        name: The layer, for messages.
        grid: What the tensor is rounded to, for estimators that look at the error. For an affine
            grid the range has two ends: those of the values, as far as the estimator's half-range
            reaches.
        factor: What the range that a batch asks for is multiplied with.

    Attributes:
        range: float32 ``[2]``, the lower and upper end.
        batches: int64, how many batches were seen; 0 means that the range is not known.
        counts: int64 ``[2048]`` and
        top: 0-dim float32, a histogram of magnitudes, where the rule looks at all batches together.
        ends: float32 ``[2]``, the extremes of these batches, for an affine grid.
    """

    range: Tensor
    batches: Tensor
    counts: Tensor
    top: Tensor
    ends: Tensor

    def __init__(
        self,
        kind: str | float | tuple[float, float],
        name: str,
        grid: Grid | None = None,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.rule = RangeRule.parse(kind, f"`{name}`: range")
        self.kind = kind
        self.name = name
        self.grid = grid or Grid()
        self.factor = factor
        self._known = self.rule.fixed is not None
        self.register_buffer("range", torch.tensor(self.rule.fixed or (-0.0, 0.0)))
        self.register_buffer("batches", torch.tensor(int(self._known)))
        if self.rule.pools:
            self.register_buffer("counts", torch.zeros(BINS, dtype=torch.int64))
            self.register_buffer("top", torch.zeros(()))
            if self.grid.affine:
                self.register_buffer("ends", torch.zeros(2))

    @property
    def known(self) -> bool:
        """Whether the range was given or comes from data, so that it makes a scale."""
        return self._known

    @property
    def fixed(self) -> bool:
        """Whether the range was given as a number and never moves."""
        return self.rule.statistic is None

    @property
    def symmetric(self) -> bool:
        """Whether the range is kept symmetric around zero."""
        statistic = self.rule.statistic
        return statistic is not None and statistic.symmetric and not self.grid.affine

    @property
    def _from_extremes(self) -> bool:
        return self.rule.statistic is not None and self.rule.statistic.extremes

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known = bool(self.batches.item() > 0)

    def absmax(self) -> Tensor:
        """Return the 0-dim float32 absolute maximum of the range."""
        return torch.maximum(-self.range[0], self.range[1])

    @torch.no_grad()
    def adopt(self, low: float, high: float) -> None:
        """Take a range from elsewhere, as if it had been seen."""
        self.range.copy_(torch.tensor([low, high]))
        self.batches.clamp_(min=1)
        self._known = True

    @torch.no_grad()
    def observe(self, x: Tensor, low: float = -math.inf, high: float = math.inf) -> None:
        """Move the range by one batch.

        Args:
            x: The batch, any shape. Empty batches are ignored; a batch with NaN or infinity (on any
                process) is skipped with a warning, so that it cannot poison the scale.
            low: Values below are clipped before they are observed (0 where a ReLU follows).
            high: Values above are clipped before they are observed.
        """
        if self.fixed or (x.numel() == 0 and not is_distributed()):
            return
        batch = _extremes(x, self.range)
        if can_read(batch):
            self._observe_values(x, batch, low, high)
        else:
            self._observe_tensors(x, batch, low, high)

    def forget(self) -> None:
        """Start anew, as if no batch had been seen; a fixed range stays."""
        if not self.fixed:
            for buffer in self.buffers(recurse=False):
                buffer.zero_()
            self._known = False

    def _observe_values(self, x: Tensor, batch: Tensor, low: float, high: float) -> None:
        """Move the range with the values at hand: few operations, and a warning if needed."""
        lowest, highest = batch.tolist()
        if lowest > highest:  # no process has a value
            return
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            warnings.warn(
                f"`{self.name}`: a batch holds NaN or infinity and is left out of the range.",
                QuantizationWarning,
                stacklevel=3,
            )
            return
        if self._from_extremes:
            lowest, highest = (min(max(value, low), high) for value in (lowest, highest))
            if self.symmetric:
                highest = max(-lowest, highest)
                lowest = -highest
            batch = torch.tensor([lowest, highest], dtype=self.range.dtype)
        else:
            batch = self._measured(x, batch, low, high)
        self._move(batch * self.factor)

    def _move(self, batch: Tensor) -> None:
        accumulation = self.rule.accumulation
        if not self._known or accumulation == "last" or self.rule.pools:
            self.range.copy_(batch)
        elif accumulation == "ema":
            self.range.lerp_(batch, EMA_WEIGHT)
        elif accumulation in _FIRST_COUNTS:
            self.range.lerp_(batch, 1.0 / (int(self.batches) + _FIRST_COUNTS[accumulation]))
        else:
            torch.minimum(self.range[0], batch[0], out=self.range[0])
            torch.maximum(self.range[1], batch[1], out=self.range[1])
        self.batches.add_(1)
        self._known = True

    def _observe_tensors(self, x: Tensor, batch: Tensor, low: float, high: float) -> None:
        """Move the range without reading a value, on a GPU or in a graph capture."""
        finite = torch.isfinite(batch).all()
        if self._from_extremes:
            batch = batch.clamp(low, high)
            if self.symmetric:
                extreme = torch.maximum(-batch[0], batch[1])
                batch = torch.stack([-extreme, extreme])
        else:
            batch = self._measured(torch.where(finite, x, 0.0), batch, low, high, finite)
        batch = batch * self.factor
        accumulation = self.rule.accumulation
        if accumulation == "last" or self.rule.pools:
            moved = batch
        elif accumulation == "ema":
            moved = torch.lerp(self.range, batch, EMA_WEIGHT)
        elif accumulation in _FIRST_COUNTS:
            weight = 1.0 / (self.batches + _FIRST_COUNTS[accumulation])
            moved = torch.lerp(self.range, batch, weight)
        else:
            moved = torch.stack(
                [torch.minimum(self.range[0], batch[0]), torch.maximum(self.range[1], batch[1])]
            )
        moved = torch.where(self.batches > 0, moved, batch)
        self.range.copy_(torch.where(finite, moved, self.range))
        self.batches.add_(finite.to(self.batches.dtype))
        self._known = True

    def _measured(
        self,
        x: Tensor,
        extremes: Tensor,
        low: float,
        high: float,
        finite: Tensor | None = None,
    ) -> Tensor:
        """Return the range that a batch, or all batches up to it, asks for."""
        statistic = self.rule.statistic
        assert statistic is not None  # a fixed range observes nothing
        values = x.detach().reshape(1, -1).float()
        if low > -math.inf or high < math.inf:
            values = values.clamp(low, high)
        if self.rule.pools:
            largest = extremes.clamp(low, high).abs().amax()
            grown = self._pooled(values, largest, finite)
            half = statistic.measure(grown.centres()[None], grown.counts[None], self.grid)[0]
        else:
            empty = values.new_zeros(1, dtype=torch.float32)
            measured = statistic.measure(values, None, self.grid) if values.numel() else empty
            half = max_over_ranks(measured)[0]
        if not self.grid.affine:
            return torch.stack([-half, half])
        ends = self._ends(extremes.clamp(low, high), finite)
        return torch.stack([-half, half]).clamp(*ends)

    def _ends(self, extremes: Tensor, finite: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the extremes of the values that count, zero included."""
        low, high = extremes.clamp(max=0.0)[0], extremes.clamp(min=0.0)[1]
        if self.rule.pools:
            seen = torch.stack(
                [torch.minimum(self.ends[0], low), torch.maximum(self.ends[1], high)]
            )
            self.ends.copy_(seen if finite is None else torch.where(finite, seen, self.ends))
            low, high = self.ends[0].clone(), self.ends[1].clone()
        return low, high

    def _pooled(self, values: Tensor, largest: Tensor, finite: Tensor | None) -> Histogram:
        """Add a batch to the histogram, unless it is not finite, and return it."""
        before = Histogram(self.counts, self.top)
        grown = before.grown_to(largest if finite is None else torch.where(finite, largest, 0.0))
        added = sum_over_ranks(grown.binned(values))
        if finite is not None:
            added = torch.where(finite, added, 0)
        self.counts.copy_(grown.counts + added)
        self.top.copy_(grown.top)
        return Histogram(self.counts, self.top)

    def extra_repr(self) -> str:
        """Show the kind and the range."""
        return f"kind={self.kind!r}, range={self.range.tolist()}"


def _extremes(x: Tensor, like: Tensor) -> Tensor:
    """Return the smallest and largest value of all processes; infinities in place of NaN.

    Without any value these are +inf and -inf.
    """
    if x.numel() == 0:
        batch = like.new_tensor([math.inf, -math.inf])
    else:
        batch = torch.stack(torch.aminmax(x)).to(like.dtype)
    if not is_distributed():
        return batch
    # A maximum over processes may lose NaN.
    upward = torch.stack([-batch[0], batch[1]]).nan_to_num(math.inf, math.inf, -math.inf)
    upward = max_over_ranks(upward)
    return torch.stack([-upward[0], upward[1]])
