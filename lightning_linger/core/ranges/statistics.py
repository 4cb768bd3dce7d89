"""What range some values ask for: one function per estimator, and the table of their names.

Every function takes values ``[R, N]`` (a row per scale), how often each occurs ``[R, N]`` (None for
once) and the grid they will be rounded to, and returns the half-range ``[R]`` in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_linger.core.grid import Grid
from lightning_linger.core.ranges.entropy import entropy_threshold
from lightning_linger.core.ranges.histogram import Histogram
from lightning_linger.core.rounding import rounder

Measure = Callable[[Tensor, Tensor | None, Grid], Tensor]

# A free scale is searched among 64ths of the largest magnitude, down to two of them.
FREE_PARTS = 64
# A power-of-two scale among so many halves of it at least: two bits clip most of the magnitudes.
FEWEST_HALVINGS = 4
# Candidates are tried together as long as their values are no more than a cache holds.
VALUES_AT_ONCE = 1 << 16
W_LIKE_STEPS, W_LIKE_LAST = 20, 2.0**9


@dataclass(frozen=True)
class Statistic:
    """One estimator.

    Args:
        measure: Returns the half-range of values.
        about: What it does, for the documentation.
        pools: Whether it can be taken of all batches together, from a histogram of magnitudes;
            otherwise the widest range of the batches counts.
        extremes: Whether only the two extreme values matter, which need no further pass.
        symmetric: Whether the range is symmetric around zero.
    """

    measure: Measure
    about: str
    pools: bool = False
    extremes: bool = False
    symmetric: bool = True


def absmax(values: Tensor, counts: Tensor | None, grid: Grid) -> Tensor:
    """Return the largest magnitude."""
    if values.shape[0] == 1:
        low, high = torch.aminmax(values)
        return torch.maximum(-low, high).float().reshape(1)
    low, high = torch.aminmax(values, dim=1)
    return torch.maximum(-low, high).float()


def three_sigma(values: Tensor, counts: Tensor | None, grid: Grid) -> Tensor:
    """Return ``3 * std + |mean|`` with the unbiased deviation, 0 for a single value."""
    values = values.float()
    mean = values.mean(dim=1)
    if values.shape[1] == 1:
        return mean.abs()
    return 3 * values.std(dim=1) + mean.abs()


def top_tenth(values: Tensor, counts: Tensor | None, grid: Grid) -> Tensor:
    """Return the smallest of the largest tenth of magnitudes."""
    return _nth_largest(values, max(1, values.shape[1] // 10))


def top_10(values: Tensor, counts: Tensor | None, grid: Grid) -> Tensor:
    """Return the tenth largest magnitude, of fewer than twelve values the largest."""
    return _nth_largest(values, 10 if values.shape[1] > 11 else 1)


def percentile(percent: float) -> Measure:
    """Return the measure of the magnitude that ``percent`` of the values do not exceed."""

    def measure(values: Tensor, counts: Tensor | None, grid: Grid) -> Tensor:
        total = values.shape[1] if counts is None else counts.sum(dim=1, keepdim=True)
        if counts is None:
            rank = max(1, round(int(total) * percent / 100.0))
            return values.abs().kthvalue(rank, dim=1).values.float()
        covered = counts.double().cumsum(dim=1) >= total * (percent / 100.0)
        first = covered.to(torch.uint8).argmax(dim=1, keepdim=True)
        return (values.gather(1, first) + values[:, :1]).squeeze(1).float()

    return measure


def least_squares(values: Tensor, counts: Tensor | None, grid: Grid) -> Tensor:
    """Return the half-range of the least squared error: among powers of two, or 63 fractions."""
    largest = absmax(values, counts, grid)
    if grid.scale_kind == "power_of_two":
        ratios = _halvings(1.0, max(grid.bits, FEWEST_HALVINGS), largest)
    else:
        ratios = torch.arange(FREE_PARTS, 1, -1, device=largest.device) / FREE_PARTS
    return _sweep(values, counts, grid, largest * ratios[:, None], 2)


def l1_sweep(values: Tensor, counts: Tensor | None, grid: Grid) -> Tensor:
    """Return the covering power of two, its half or its quarter: the least absolute error."""
    covering = _power_of_two_above(absmax(values, counts, grid))
    return _sweep(values, counts, grid, covering * _halvings(1.0, 3, covering)[:, None], 1)


def w_like(values: Tensor, counts: Tensor | None, grid: Grid) -> Tensor:
    """Return the half-range of the step of least squared error among 2^-10 ... 2^9."""
    codes = values.new_full((values.shape[0],), 2.0 ** (grid.bits - 1), dtype=torch.float32)
    steps = _halvings(W_LIKE_LAST, W_LIKE_STEPS, codes).flip(0)
    return _sweep(values, counts, grid, codes * steps[:, None], 2)


def entropy(values: Tensor, counts: Tensor | None, grid: Grid) -> Tensor:
    """Return the threshold of least Kullback-Leibler divergence."""
    if counts is not None:
        return entropy_threshold(counts[0], _end(values)[0], grid)[None]
    found = []
    for row in values:
        histogram = Histogram.of(row)
        found.append(entropy_threshold(histogram.counts, histogram.top, grid))
    return torch.stack(found)


def lsq_start(values: Tensor, counts: Tensor | None, grid: Grid) -> Tensor:
    """Return the half-range of the step ``2 * mean|x| / sqrt(qmax)`` (LSQ, section 2.1)."""
    return values.abs().float().mean(dim=1) * (2.0 * math.sqrt(grid.qmax))


STATISTICS: dict[str, Statistic] = {
    "absmax": Statistic(absmax, "the largest magnitude", extremes=True),
    "minmax": Statistic(
        absmax, "the smallest and the largest value", extremes=True, symmetric=False
    ),
    "three_sigma": Statistic(three_sigma, "three standard deviations plus the mean's magnitude"),
    "top_tenth": Statistic(top_tenth, "the largest tenth of the magnitudes saturates"),
    "top_10": Statistic(top_10, "the tenth largest magnitude"),
    "mse": Statistic(least_squares, "least squared error of rounding and clipping", pools=True),
    "l1": Statistic(
        l1_sweep,
        "least absolute error among the covering power of two, its half and its quarter",
        pools=True,
    ),
    "w_like": Statistic(w_like, "least squared error among the steps 2^-10 ... 2^9", pools=True),
    "kl": Statistic(entropy, "least Kullback-Leibler divergence", pools=True),
    "lsq_start": Statistic(lsq_start, "the mean magnitude times 2 sqrt(qmax), where LSQ starts"),
}


def percentile_statistic(percent: float) -> Statistic:
    """Return the estimator of a name like ``99.9%``."""
    return Statistic(percentile(percent), "a percentile of the magnitudes", pools=True)


def _end(centres: Tensor) -> Tensor:
    """Return where a histogram ends: half a bin, which is the first centre, beyond the last one."""
    return centres[:, -1] + centres[:, 0]


def _nth_largest(values: Tensor, n: int) -> Tensor:
    return values.abs().kthvalue(values.shape[1] - n + 1, dim=1).values.float()


def _halvings(first: float, count: int, like: Tensor) -> Tensor:
    # Made where they are needed: a copy from the host would wait for the device.
    exponents = torch.arange(count, device=like.device)
    return torch.ldexp(like.new_full((count,), first), -exponents)


def _power_of_two_above(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), exponent), x)


def _sweep(
    values: Tensor, counts: Tensor | None, grid: Grid, candidates: Tensor, power: int
) -> Tensor:
    """Return, per row, the first of the candidates ``[C, R]`` with the least error."""
    at_once = max(1, VALUES_AT_ONCE // max(values.numel(), 1))
    errors = [_errors(values, counts, grid, some, power) for some in candidates.split(at_once)]
    best = torch.cat(errors).argmin(dim=0, keepdim=True)
    return candidates.gather(0, best).squeeze(0)


def _errors(
    values: Tensor, counts: Tensor | None, grid: Grid, candidates: Tensor, power: int
) -> Tensor:
    """Return the errors ``[C, R]`` of rounding ``[R, N]`` values with the candidates' steps."""
    values = values.float()
    steps = grid.step(candidates)[:, :, None]
    codes = rounder(grid.rounding)(values / steps)
    errors = codes.clamp_(grid.qmin, grid.qmax).mul_(steps).sub_(values).double()
    errors = errors.square_() if power == 2 else errors.abs_()
    return (errors if counts is None else errors.mul_(counts)).sum(dim=2)
