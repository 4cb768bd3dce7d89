"""Learning the rounding of one layer's weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.distributed import from_first_rank
from lightning_linger.core.sites import Site
from lightning_linger.ops.conv import ConvOp
from lightning_linger.ops.folding import TINY_FACTOR, running_factor
from lightning_linger.ops.groups import group_steps
from lightning_linger.ops.parameters import Parameters
from lightning_linger.ops.weighted import WeightedOp
from lightning_linger.stages.adaround.config import AdaRoundConfig
from lightning_linger.stages.adaround.data import LayerData
from lightning_linger.stages.forwards import (
    layer_op,
    result_of,
)

# The rectified sigmoid is stretched to this interval, so that it reaches 0 and 1 (eq. 23).
_LOW, _HIGH = -0.1, 1.1
# Where in its interval a weight lies that a rule rounds to the interval's code, whatever the noise.
_SAFEST = {"floor": 0.5, "ceil": -0.5}


@dataclass(frozen=True)
class AdaRoundRow:
    """What became of one layer.

    Args:
        site: Site key.
        weights: How many weights it has.
        changed: How many of them are not rounded to nearest now.
        error_before: Mean squared error of what follows the layer, behind its ReLU, with rounding
            to nearest, as a share of the mean square of the float values.
        error_after: The same now; never larger.
        why_not: Why nothing changed, empty if something did.
    """

    site: str
    weights: int = 0
    changed: int = 0
    error_before: float = math.nan
    error_after: float = math.nan
    why_not: str = ""


class LayerRounding:
    """Learns the rounding of one layer's weight.

    Args:
        site: The layer.
        data: What it is given and should give.
    """

    def __init__(self, site: Site, data: LayerData) -> None:
        self.site = site
        self.op: WeightedOp = layer_op(site)
        self.data = data
        owner: Any = site.owner
        self.weight: Tensor = owner.weight
        self.frozen_before = site.frozen
        # From here on the step stays, whatever becomes of the weight.
        site.freeze(site.frozen | {"weights"})
        nearest = self.op.parameters_in_use(site, data.call, data.step_x)
        plain = self.op.parameters_in_use(site, data.call, None)
        self.nearest = nearest
        self.steps = self._steps(nearest, plain)
        self.codes = torch.round(nearest.weight / self.steps)
        position = plain.weight / self.steps
        self.low = torch.floor(position)
        self.fraction = position - self.low
        grid = site.weights.grid
        assert grid is not None  # the planner gives one to every layer
        self.limits = grid.qmin, grid.qmax

    def _steps(self, nearest: Parameters, plain: Parameters) -> Tensor:
        """Return the steps in a shape that broadcasts to the weight."""
        if self.site.has_groups:
            return group_steps(self.site, plain.weight, None)[0]
        step = torch.as_tensor(nearest.step, device=plain.weight.device)
        return self.op.per_channel(self.data.call, step) if step.dim() else step

    def learn(self, config: AdaRoundConfig) -> AdaRoundRow:
        """Learn the rounding, and write it into the weight if it is better than to nearest."""
        power = max(self.data.power(), torch.finfo(torch.float32).tiny)
        before = self._error(self.nearest)
        original = self.weight.clone()
        codes = self._learned(config, before) if before > 0 else self.codes
        self._write(from_first_rank(codes), original)
        in_use = self.op.parameters_in_use(self.site, self.data.call, self.data.step_x)
        after = self._error(in_use)
        changed = int((torch.round(in_use.weight / self.steps) != self.codes).sum())
        row = AdaRoundRow(
            self.site.key, self.weight.numel(), changed, before / power, after / power
        )
        # Every process decides alike, as the first one measures.
        if bool(from_first_rank(torch.tensor(after < before and changed > 0))):
            return row
        self.weight.copy_(original)
        self.site.freeze(self.frozen_before)
        return AdaRoundRow(
            *(self.site.key, self.weight.numel(), 0, before / power, before / power),
            why_not="rounding to nearest is the best that was found",
        )

    def _error(self, parameters: Parameters) -> float:
        """Return the mean squared error on all data."""
        sums = []
        for x, target in zip(self.data.inputs, self.data.targets, strict=True):
            y = result_of(self.site, self.data.call, x, parameters)
            sums.append(float((self._let_through(y) - target).double().square().sum()))
        return self.data.mean(sums)

    def _let_through(self, y: Tensor) -> Tensor:
        return y.clamp(self.data.window.low, self.data.window.high)

    @torch.enable_grad()
    def _learned(self, config: AdaRoundConfig, scale: float) -> Tensor:
        """Return codes that are floor or ceiling of the weight's position on its grid."""
        start = (self.fraction - _LOW) / (_HIGH - _LOW)
        logits = torch.logit(start).detach().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=config.learning_rate)
        generator = torch.Generator().manual_seed(config.seed)
        for step in range(config.steps):
            x, target = self._sample(config.batch_size, generator)
            up = _rectified(logits)
            soft = Parameters((self.low + up).clamp(*self.limits) * self.steps, self.nearest.bias)
            y = self._let_through(result_of(self.site, self.data.call, x, soft))
            loss = (y - target).square().mean() / scale
            exponent = config.exponent(step)
            if exponent is not None:
                undecided = 1 - (2 * up - 1).abs().pow(exponent)
                loss = loss + config.regularization * undecided.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        up = (_rectified(logits.detach()) >= 0.5).to(self.low.dtype)
        return (self.low + up).clamp(*self.limits)

    def _sample(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return some samples of one batch."""
        chosen = int(torch.randint(len(self.data), (), generator=generator))
        x, target = self.data.inputs[chosen], self.data.targets[chosen]
        dims = self.op.dims + 2 if isinstance(self.op, ConvOp) else 2
        if x.dim() < dims or x.shape[0] <= size:
            return x, target
        rows = torch.randperm(x.shape[0], generator=generator)[:size].to(x.device)
        return x[rows], target[rows]

    def _write(self, codes: Tensor, original: Tensor) -> None:
        """Move weights whose code changed into the middle of its interval."""
        centre = (codes + _SAFEST.get(self.site.rounding, 0.0)) * self.steps
        fold: Any = self.site.active_fold
        movable = codes != self.codes
        if fold is not None:
            factor = self.op.per_channel(self.data.call, running_factor(fold))
            movable = movable & (factor.abs() >= TINY_FACTOR)
            centre = centre / torch.where(movable, factor, torch.ones_like(factor))
        self.weight.copy_(torch.where(movable, centre.to(original.dtype), original))
        in_use = self.op.parameters_in_use(self.site, self.data.call, self.data.step_x)
        # A range limit, or a dtype that is too coarse for the middle, may round it elsewhere.
        missed = torch.round(in_use.weight / self.steps) != codes
        self.weight.copy_(torch.where(missed, original, self.weight))


def _rectified(logits: Tensor) -> Tensor:
    """Return the rectified sigmoid of Louizos et al. 2018, from 0 to 1."""
    return (torch.sigmoid(logits) * (_HIGH - _LOW) + _LOW).clamp(0, 1)
