"""The clipping threshold of least relative entropy (TensorRT's calibration)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_linger.core.grid import Grid

# Thresholds are tried at every sixteenth bin, from a sixteenth of all bins on: fewer may hold a
# single value, which every distribution resembles.
STRIDE = 16
SMALLEST_PART = 16
# What a bin that the rounded distribution leaves empty counts for.
TINY = 1e-10


def entropy_threshold(counts: Tensor, top: Tensor, grid: Grid) -> Tensor:
    """Return the threshold whose rounded distribution resembles the clipped one most.

    For each threshold the values beyond are moved to the last bin that is kept (P); the bins that
    are kept are merged to one per positive code and spread again over those that were not empty
    (Q); the threshold of least ``sum P log(P / Q)`` is taken. The first bin counts as much as its
    neighbour: zeros, half of what is behind a ReLU, are exact with any threshold, and would hide
    what clipping costs.

    Args:
        counts: ``[B]`` of magnitudes in equal bins.
        top: 0-dim, the end of the last bin.
        grid: What will be rounded to.
    """
    bins, levels = counts.numel(), grid.qmax + 1
    first = min(max(levels, bins // SMALLEST_PART), bins)
    candidates = range(first, bins + 1, STRIDE)
    counts = torch.cat([counts[1:2], counts[1:]]).double()
    positions = torch.arange(bins, device=counts.device)
    divergences = [_divergence(counts, positions, kept, levels) for kept in candidates]
    best = torch.stack(divergences).flip(0).argmin()
    kept = torch.tensor(list(candidates), device=counts.device).flip(0)[best]
    return (top * kept / bins).float()


def _divergence(counts: Tensor, positions: Tensor, kept: int, levels: int) -> Tensor:
    inside = counts[:kept]
    clipped = inside.clone()
    clipped[-1] += counts[kept:].sum()
    groups = positions[:kept] * min(levels, kept) // kept
    occupied = (inside > 0).double()
    zeros = counts.new_zeros(min(levels, kept))
    mass = zeros.scatter_add(0, groups, inside)
    share = mass / zeros.scatter_add(0, groups, occupied).clamp(min=1.0)
    spread = share[groups] * occupied
    p = clipped / clipped.sum().clamp(min=1.0)
    q = (spread / spread.sum().clamp(min=1.0)).clamp(min=TINY)
    return torch.where(p > 0, p * torch.log(p.clamp(min=TINY) / q), 0.0).sum()
