"""Values that all processes of a distributed run agree on; alone, everything is the identity."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the number of this process, 0 if it is alone."""
    return dist.get_rank() if is_distributed() else 0


def process_rank() -> int | None:
    """Return the number of this process, None if it is alone.

    Known before the processes have met, too, from what the launchers set.
    """
    if is_distributed():
        return dist.get_rank()
    several = any(_number(name) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))
    if not several or (dist.is_available() and dist.is_initialized()):
        return None
    launched = (name for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ)
    return _number(next(launched, ""))


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else 0


def max_over_ranks(x: Tensor) -> Tensor:
    """Return the elementwise maximum over all processes; exact, and the same on each."""
    if is_distributed():
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the elementwise sum over all processes, the same on each."""
    if is_distributed():
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.SUM)
    return x


def mean_over_ranks(x: Tensor, count: int) -> Tensor:
    """Return the mean over all processes, each weighted with its ``count``; the same on each."""
    if not is_distributed():
        return x
    weighted = torch.stack([x * count, x.new_tensor(float(count))])
    dist.all_reduce(weighted, dist.ReduceOp.SUM)
    return weighted[0] / weighted[1].clamp_min(1)


def copy_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of the first process."""
    if is_distributed():
        for x in tensors:
            dist.broadcast(x, src=0)


def from_first_rank(x: Tensor) -> Tensor:
    """Return the value that the first process has."""
    if is_distributed():
        x = x.clone()
        dist.broadcast(x, 0)
    return x


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
