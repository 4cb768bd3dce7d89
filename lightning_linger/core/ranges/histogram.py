"""A histogram of magnitudes that grows with what it sees, without losing a count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 2048


@dataclass(frozen=True)
class Histogram:
    """How often magnitudes fall into 2048 equal bins.

    Args:
        counts: int64 ``[2048]``.
        top: 0-dim float32, the end of the last bin; 0 while only zeros were seen.
    """

    counts: Tensor
    top: Tensor

    @staticmethod
    def of(values: Tensor) -> Histogram:
        """Return the histogram of some values."""
        empty = torch.zeros(BINS, dtype=torch.int64, device=values.device)
        return Histogram(empty, values.new_zeros((), dtype=torch.float32)).with_values(values)

    def with_values(self, values: Tensor) -> Histogram:
        """Return the histogram with more values in it."""
        grown = self.grown_to(values.detach().abs().float().max())
        return Histogram(grown.counts + grown.binned(values), grown.top)

    def binned(self, values: Tensor) -> Tensor:
        """Return how many of some values, which lie in the range, fall into each bin."""
        magnitudes = values.detach().abs().float().flatten()
        width = torch.where(self.top > 0, self.top, 1.0)
        bins = (magnitudes / width * BINS).long().clamp_(max=BINS - 1)
        return torch.zeros_like(self.counts).scatter_add(0, bins, torch.ones_like(bins))

    def grown_to(self, largest: Tensor) -> Histogram:
        """Return the histogram with a range that holds ``largest``.

        The range doubles until it does; then neighbouring bins are merged, so every count stays
        exact.
        """
        ratio = torch.where(self.top > 0, largest / self.top, torch.ones_like(largest))
        doublings = torch.ceil(torch.log2(ratio.clamp(min=1.0)))
        # The logarithm of a ratio just above a power of two may be rounded down to it.
        doublings = doublings + (torch.ldexp(self.top, doublings) < largest) * (self.top > 0)
        merged = torch.arange(BINS, device=self.counts.device) >> doublings.long().clamp(max=62)
        counts = torch.zeros_like(self.counts).scatter_add(0, merged, self.counts)
        top = torch.where(self.top > 0, torch.ldexp(self.top, doublings), largest)
        return Histogram(counts, top)

    def centres(self) -> Tensor:
        """Return the middles of the bins."""
        positions = torch.arange(BINS, device=self.top.device, dtype=torch.float32) + 0.5
        return positions * (self.top / BINS)
