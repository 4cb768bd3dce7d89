"""AdaRound: which weights to round up and which down, learned from the layer's output.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.config import Limit
from lightning_linger.core.distributed import from_first_rank
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.instrumentation import Instrumentation
from lightning_linger.core.logs import logger
from lightning_linger.core.progress import with_progress
from lightning_linger.core.quantizer import Window
from lightning_linger.core.sites import Site
from lightning_linger.core.table import Table
from lightning_linger.ops.activation import ClampOp, has_tensor_bounds, window_of
from lightning_linger.ops.conv import ConvOp
from lightning_linger.ops.folding import TINY_FACTOR, running_factor
from lightning_linger.ops.groups import group_steps
from lightning_linger.ops.parameters import Parameters
from lightning_linger.ops.weighted import WeightedOp
from lightning_linger.stages.forwards import (
    Forward,
    call_of,
    evaluating,
    float_result,
    forwards_of,
    layer_op,
    quantized_input,
    require_float_reference,
    require_quantized,
    result_of,
    why_not_quantized,
)
from lightning_linger.stages.ownership import Ownership
from lightning_linger.stages.selection import QUANT_MARK, Selection, matches

# The rectified sigmoid is stretched to this interval, so that it reaches 0 and 1 (eq. 23).
_LOW, _HIGH = -0.1, 1.1
# Where in its interval a weight lies that a rule rounds to the interval's code, whatever the noise.
_SAFEST = {"floor": 0.5, "ceil": -0.5}


@dataclass(frozen=True)
class AdaRoundConfig:
    """How rounding is learned.

    Args:
        steps: Steps of Adam per layer.
        learning_rate: Of Adam.
        batch_size: Samples per step, from one calibration batch each.
        regularization: Weight of the term that drives each weight to up or down, against the
            output error as a share of that of rounding to nearest.
        warm_start: Share of the steps without that term, from 0 to 1.
        sharpness: First and last exponent of that term, which is annealed (beta of eq. 24).
        seed: Of the choice of samples.
    """

    steps: int = 500
    learning_rate: float = 3e-2
    batch_size: int = 32
    regularization: float = 1.0
    warm_start: float = 0.2
    sharpness: tuple[float, float] = (20.0, 2.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                msg = f"`{name}` must be a positive integer. Found: {value!r}."
                raise ConfigError(msg)
        for name in ("learning_rate", "regularization"):
            if not getattr(self, name) > 0:
                msg = f"`{name}` must be positive. Found: {getattr(self, name)!r}."
                raise ConfigError(msg)
        if not 0 <= self.warm_start < 1:
            msg = f"`warm_start` must be at least 0 and below 1. Found: {self.warm_start!r}."
            raise ConfigError(msg)
        if len(self.sharpness) != 2 or not all(value > 0 for value in self.sharpness):
            msg = f"`sharpness` must be two positive numbers. Found: {self.sharpness!r}."
            raise ConfigError(msg)

    def exponent(self, step: int) -> float | None:
        """Return the exponent of the term at a step, None while there is no such term."""
        start = self.warm_start * self.steps
        if step < start:
            return None
        done = (step - start) / max(self.steps - start, 1)
        first, last = self.sharpness
        return last + 0.5 * (first - last) * (1 + math.cos(math.pi * done))


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


class AdaRounding(Table[AdaRoundRow]):
    """A list of :class:`AdaRoundRow` in execution order that prints as a table."""

    row_type = AdaRoundRow

    def cells(self) -> list[list[str]]:
        """Return what the cells say, numbers with four digits."""
        return [
            [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in vars(row).values()]
            for row in self
        ]


def adaround(
    model: nn.Module,
    loader: Iterable[Any],
    config: AdaRoundConfig | None = None,
    modules: Sequence[str] | None = None,
) -> AdaRounding:
    """Learn for each weight whether it is rounded up or down, layer by layer.

    In execution order, each layer is given the inputs it has in the quantized model, and learns to
    give what it gives in the float model, behind the ReLU that follows if one does.

    A weight that is not rounded to nearest any more is moved into the middle of the interval of its
    code, by less than a step, and the steps of the layer's weights are frozen, as
    :func:`lightning_linger.freeze_ranges` freezes them. So the ordinary rounding gives the learned
    codes, in fake-quant, integers and exports alike. Biases and ranges of activations stay.

    Args:
        model: A quantized model that knows its ranges.
        loader: Some batches, as :func:`lightning_linger.calibrate` takes them; kept in memory.
        config: How rounding is learned.
        modules: Globs on dotted paths; None takes the whole model.

    Returns:
        A row for each layer with weights: what changed, or why nothing. Where the learned rounding
        is not better on the data than rounding to nearest, that stays.

    Raises:
        NotReadyError: If the model is not quantized, or has seen no range.
        ConfigError: If the loader is empty, a glob matches nothing, or the weights or biases are
            no longer those of the float model, because of an earlier call or of
            :func:`lightning_linger.correct_bias`.
    """
    return adaround_by(model, forwards_of(model, loader), config, modules)


def adaround_by(
    model: nn.Module,
    forwards: Sequence[Forward],
    config: AdaRoundConfig | None = None,
    modules: Sequence[str] | None = None,
) -> AdaRounding:
    """Learn rounding by forwards of the model, or of parts of it; see :func:`adaround`."""
    instrumentation = require_quantized(model)
    require_float_reference(instrumentation, "adaround")
    Selection(None, modules, None, QUANT_MARK).validate(model, instrumentation.sites)
    ownership = Ownership(model, instrumentation.graph)
    config = config or AdaRoundConfig()
    layers = [
        site
        for site in instrumentation.sites
        if site.has_parameters and site.op.kind != "batch_norm"
        if modules is None or any(matches(site, pattern) for pattern in modules)
    ]
    rows: list[AdaRoundRow] = []
    originals: dict[Tensor, Tensor] = {}
    with evaluating(model):
        for site in with_progress(layers, "Learning to round"):
            reason = _obstacle(site, ownership)
            data = None if reason else _Data.collect(instrumentation, site, forwards, originals)
            if data is None:
                why_not = reason or "the calibration data does not reach it"
                rows.append(AdaRoundRow(site.key, why_not=why_not))
                continue
            layer = _Layer(site, data)
            originals[layer.weight] = layer.weight.clone()
            rows.append(layer.learn(config))
            instrumentation.thaw()
    instrumentation.applied.append("adaround")
    changed = sum(row.changed for row in rows)
    logger.info(
        "%d of %d weights of %s are not rounded to nearest",
        *(changed, sum(row.weights for row in rows), type(model).__name__),
    )
    return AdaRounding(rows)


def _obstacle(site: Site, ownership: Ownership) -> str | None:
    reason = why_not_quantized(site) or ownership.obstacle(site, ("weight",))
    if reason is not None:
        return reason
    if "weights" in site.floating:
        return "its weight is not rounded"
    limits = site.active_limits
    limit: Limit | None = None if limits is None else limits.weight
    if limit is not None and limit.kind != "static":
        return "its range limit follows the weights"
    return None


# --- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """What a layer is given and what it should give, batch by batch.

    Args:
        call: A bound call of the layer.
        inputs: On the grid.
        targets: In float, as the follower lets them through.
        step_x: Step of the inputs.
        window: What the follower lets through.
    """

    call: Any
    inputs: list[Tensor]
    targets: list[Tensor]
    step_x: Scalar
    window: Window

    @staticmethod
    def collect(
        instrumentation: Instrumentation,
        site: Site,
        forwards: Sequence[Forward],
        originals: dict[Tensor, Tensor],
    ) -> _Data | None:
        """Run the float model, with its original weights, and the quantized one up to a layer."""
        window = _window_behind(instrumentation, site)
        inputs: list[Tensor] = []
        targets: list[Tensor] = []
        last: Any = None
        step_x: Scalar = 0.0
        for forward in forwards:
            with _values(originals):
                real = call_of(instrumentation, site, forward, "float")
            call = call_of(instrumentation, site, forward, "fake")
            given = None if call is None else quantized_input(site, call)
            if real is None or given is None:
                continue
            targets.append(float_result(site, real).clamp(window.low, window.high))
            last, (x, step_x) = call, given
            inputs.append(x)
        return None if last is None else _Data(last, inputs, targets, step_x, window)

    def __len__(self) -> int:
        return len(self.inputs)

    def power(self) -> float:
        """Return the mean square of the targets."""
        return _mean([float(y.double().square().sum()) for y in self.targets], self.targets)


@contextlib.contextmanager
def _values(values: dict[Tensor, Tensor]) -> Iterator[None]:
    """Give parameters other values for a while."""
    kept = {parameter: parameter.clone() for parameter in values}
    for parameter, value in values.items():
        parameter.copy_(value)
    try:
        yield
    finally:
        for parameter, value in kept.items():
            parameter.copy_(value)


def _mean(sums: list[float], tensors: list[Tensor]) -> float:
    return sum(sums) / max(sum(tensor.numel() for tensor in tensors), 1)


def _window_behind(instrumentation: Instrumentation, site: Site) -> Window:
    """Return what the activation lets through that alone reads a layer, or its batch norm."""
    graph = instrumentation.graph
    follower = graph.sole_consumer(site.key)
    if site.active_fold is not None and follower is not None:
        follower = graph.sole_consumer(follower.key)
    if follower is None or follower.key not in instrumentation:
        return Window()
    clamp = instrumentation.find(follower.key)
    if not isinstance(clamp.op, ClampOp) or has_tensor_bounds(clamp.recorded_call):
        return Window()
    return window_of(clamp.recorded_call)


# --- one layer ----------------------------------------------------------------------------------


class _Layer:
    """Learns the rounding of one layer's weight.

    Args:
        site: The layer.
        data: What it is given and should give.
    """

    def __init__(self, site: Site, data: _Data) -> None:
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
        grid = site.weight_grid
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
        return _mean(sums, self.data.targets)

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
