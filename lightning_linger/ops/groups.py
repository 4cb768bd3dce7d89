"""Scales of parts of a weight along its input dimension, as one wider integer.

Within one output the products of all inputs are summed, so an integer accumulator has one step.
With powers of two the step of every group is a shift away from the finest one: a weight of 8 bits
per group is an integer of up to 16 bits at the finest step, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_linger.core.capture import can_read
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import WIDEST_OPERAND
from lightning_linger.ops.parameters import not_finer


def grouped_rows(weight: Tensor, granularity: str | int) -> Tensor:
    """Return the weight with a row for each scale.

    Args:
        weight: ``[O, I, ...]``.
        granularity: ``input_channel``: a scale per input channel, whatever the output: ``[I, N]``.
            A number ``g``: one per output channel and ``g`` input channels: ``[O * I / g, N]``.
    """
    if isinstance(granularity, int):
        return weight.reshape(weight.shape[0] * weight.shape[1] // granularity, -1)
    return weight.transpose(0, 1).flatten(1)


def group_steps(site: Site, weight: Tensor, finest: Tensor | None) -> tuple[Tensor, Scalar]:
    """Return the steps of the groups of a weight, and the finest of them, which is the integer's.

    No step is so much finer than the coarsest that the integer would need more than 16 bits.

    Args:
        site: The layer.
        weight: Detached, ``[O, I, ...]``.
        finest: ``[O]``: the finest steps at which the bias fits its codes, None for no bound.

    Returns:
        A tensor that broadcasts to the weight; a float where values can be read, else 0-dim.
    """
    grid, granularity = site.weights.grid, site.granularity
    assert grid is not None  # the planner gives one to every op that has parameters
    steps = grid.step(site.weights.reach(grouped_rows(weight, granularity)))
    steps = torch.maximum(steps, steps.amax() * 2.0 ** (grid.bits - WIDEST_OPERAND))
    steps = not_finer(grid, steps, finest if finest is None else finest.amax())
    steps = torch.as_tensor(site.weights.held("weight", steps))
    ones = [1] * (weight.dim() - 2)
    if isinstance(granularity, int):
        outputs, inputs = weight.shape[:2]
        spread = steps.view(outputs, inputs // granularity).repeat_interleave(granularity, dim=1)
        view = spread.view(outputs, inputs, *ones)
    else:
        view = steps.view(1, -1, *ones)
    smallest = steps.amin()
    return view, smallest.item() if can_read(smallest) else smallest
