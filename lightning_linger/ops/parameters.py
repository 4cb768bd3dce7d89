"""Weights and biases on their grids: the steps of weights, and rounding to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_linger.core.capture import can_read
from lightning_linger.core.fake_quantize import Scalar, fake_quantize, straight_through
from lightning_linger.core.grid import Grid
from lightning_linger.core.integer import float32_code_limits
from lightning_linger.core.quantizer import readable
from lightning_linger.core.ranges import LearnedScale
from lightning_linger.core.rounding import Rounder
from lightning_linger.core.sites import Site


@dataclass(frozen=True)
class Parameters:
    """The effective weight and bias of a layer.

    Args:
        weight: Of the shape the torch function takes.
        bias: ``[C_out]`` or None.
        step: Step of the weight, 0-dim or ``[C_out]``; None if the weight is not quantized.
    """

    weight: Tensor
    bias: Tensor | None
    step: Scalar | None = None


def finest_for_bias(
    bias: Tensor | None, step_x: Scalar, bits: int, headroom: float = 1.0
) -> Tensor | None:
    """Return the finest weight step, per channel, at which the bias fits its codes.

    Args:
        bias: ``[C]``, or None.
        step_x: Step of the input.
        bits: Width of the bias.
        headroom: How many times the bias has to fit.
    """
    if bias is None:
        return None
    return bias.detach().abs().float() * headroom / (step_x * float32_code_limits(bits)[1])


def bias_headroom(site: Site) -> float:
    """Return what part of the bias codes is left to the sum: TFLite's converter keeps half."""
    return 2.0 if site.fixed_point else 1.0


def weight_step(
    site: Site, rows: Tensor, finest: Tensor | None = None, name: str = "weight"
) -> Scalar:
    """Return the step of a weight.

    Args:
        site: The site, whose weight grid and range estimator apply.
        rows: Detached weight, ``[1, N]`` for one step, ``[C, N]`` for one per channel.
        finest: ``[C]``: the finest step, because a bias has to fit its codes; None for no bound.
        name: Tells the weights of the site apart.

    Returns:
        ``[C]`` per channel; for one step a float where values can be read, else a 0-dim tensor.
    """
    grid = site.weights.grid
    assert grid is not None  # the planner gives one to every op that has parameters
    per_channel = site.granularity == "channel"
    finest = finest if finest is None or per_channel else finest.amax()
    learned = site.weights.learned_scale(name)
    if learned is not None:
        step = not_finer(grid, learned_step(site, learned, rows), finest)
        return step if per_channel or not can_read(step) else step.item()
    reach = site.weights.reach(rows)
    if not per_channel:
        reach = reach[0]
    if finest is not None:
        reach = torch.maximum(reach, finest * grid.steps_covered)
    if per_channel:
        return grid.step(reach)
    return grid.step_value(reach.item()) if can_read(reach) else grid.step(reach)


def not_finer(grid: Grid, steps: Tensor, finest: Tensor | None) -> Tensor:
    """Return steps of a grid, coarser where they are finer than allowed.

    Args:
        grid: The grid.
        steps: What is asked for.
        finest: Broadcasts to the steps; 0, and None, for no bound.
    """
    if finest is None:
        return steps
    bound = torch.where(finest > 0, grid.step(finest * grid.steps_covered), 0.0)
    return torch.maximum(steps, bound)


def learned_step(site: Site, learned: LearnedScale, rows: Tensor) -> Tensor:
    """Return a learned step; the first training step with gradients takes it over."""
    if not learned.started:
        reach = site.weights.reach(rows, learned.start_grid)
        if not (site.moves_weight_ranges and torch.is_grad_enabled()):
            return learned.step_of(reach)
        learned.follow(reach)
        learned.start()
    return learned.step()


def on_grid(
    x: Tensor,
    step: Scalar,
    limits: tuple[int, int],
    rounding: str | Rounder,
    clips: bool = False,
) -> Tensor:
    """Round a parameter to its grid.

    Args:
        x: The parameter.
        step: Its step.
        limits: Smallest and largest code.
        rounding: How to round.
        clips: Whether its range may leave values out, which then have no gradient. Otherwise the
            range is the parameter's own absolute maximum, and the gradient is the identity.
    """
    usable = readable(step)
    if clips:
        return fake_quantize(x, usable, *limits, rounding, keeps_input=True)
    return straight_through(fake_quantize(x.detach(), usable, *limits, rounding), x)


def learned_on_grid(
    x: Tensor,
    step: Scalar,
    limits: tuple[int, int],
    rounding: str | Rounder,
    learned: LearnedScale,
    parameter: Tensor,
) -> Tensor:
    """Round a weight to its grid with gradients for it and for its learned range.

    Args:
        x: The weight.
        step: Its step.
        limits: Smallest and largest code.
        rounding: How to round.
        learned: The learned range.
        parameter: Its parameter in a shape that broadcasts to the weight.
    """
    usable = readable(step)
    rounded = fake_quantize(x.detach(), usable, *limits, rounding)
    if not torch.is_grad_enabled():
        return rounded
    return learned.carry(rounded, x, usable, *limits, parameter)
