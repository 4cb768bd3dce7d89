"""Cross-layer equalization: channels of neighbouring layers brought to like ranges.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_linger.core.errors import ConfigError
from lightning_linger.core.graph import Node
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.logs import logger
from lightning_linger.core.registry import op_of
from lightning_linger.core.sites import Site
from lightning_linger.core.table import Table
from lightning_linger.ops.activation import ClampOp, has_tensor_bounds, window_of
from lightning_linger.ops.conv import ConvOp
from lightning_linger.ops.folding import running_factor
from lightning_linger.ops.weighted import WeightedOp
from lightning_linger.stages.ownership import Ownership
from lightning_linger.stages.selection import QUANT_MARK, Selection, matches

EqualizationFactors = Literal["power_of_two", "free"]

# f(s * x) = s * f(x) for every s > 0, value by value.
_HOMOGENEOUS = {"leaky_relu", "prelu", "dropout"}
# The same for pools, which mix positions of a channel; their last dimensions are positions.
_POOLS = {
    f"{kind}_pool{dims}d": dims
    for kind in ("avg", "max", "adaptive_avg", "adaptive_max")
    for dims in (1, 2, 3)
}
_FLATTENING = {"flatten", "reshape", "view"}
# Of these the values keep their order, so that a shift passes as well.
_SHIFTABLE = {"dropout"} | {name for name in _POOLS if "max" in name}
# Free factors that are nearer to one than this are not worth a sweep.
_SETTLED = 1e-4
# A Gaussian lies above its mean less three deviations in all but 0.13 % of cases.
_DEVIATIONS = 3.0


@dataclass(frozen=True)
class EqualizationRow:
    """What became of one convolution or linear layer and the layer behind it.

    Args:
        site: Site key of the layer, or of the batch norm that is not folded into it.
        follower: Site key of the layer that takes its result, empty if there is none.
        channels: How many channels were rescaled.
        largest_factor: The largest factor between old and new range of a channel, at least 1.
        absorbed: In how many channels a high bias moved on to the follower.
        precision_before: Mean over the channels of the product of both layers' channel range over
            layer range, from 0 to 1; 1 where all channels use the whole grid.
        precision_after: The same after equalization.
        why_not: Why nothing was rescaled, empty if the pair is equalized.
    """

    site: str
    follower: str = ""
    channels: int = 0
    largest_factor: float = 1.0
    absorbed: int = 0
    precision_before: float = math.nan
    precision_after: float = math.nan
    why_not: str = ""


class Equalization(Table[EqualizationRow]):
    """A list of :class:`EqualizationRow` in execution order that prints as a table."""

    row_type = EqualizationRow

    def cells(self) -> list[list[str]]:
        """Return what the cells say, numbers with four digits."""
        return [
            [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in vars(row).values()]
            for row in self
        ]


@torch.no_grad()
def equalize(
    model: nn.Module,
    factors: EqualizationFactors = "power_of_two",
    absorb_bias: bool = False,
    modules: Sequence[str] | None = None,
    max_sweeps: int = 20,
) -> Equalization:
    """Rescale channels between neighbouring layers, so that one step suits all channels of each.

    Where only a layer reads what another layer gives, through activations like ReLU for which
    ``f(s * x) = s * f(x)``, each channel can be divided by a factor in the first layer and
    multiplied by it in the second. The factor ``sqrt(r1 / r2)`` makes the channel's ranges in both
    weights equal. Pairs are swept over until nothing moves.

    With factors that are powers of two the float model computes the same bits as before, unless a
    number leaves the range of its dtype: channels where one would are left as they are.

    Batch norms that are to be folded have to be planned before: their layer is then equalized as
    folded, by gamma and beta. Otherwise a batch norm is a layer of its own.

    Args:
        model: A prepared model that has seen no ranges yet.
        factors: ``power_of_two``, or ``free`` for exact balance, which changes the float function
            by rounding.
        absorb_bias: Also move what a ReLU behind a batch norm passes in all but 0.13 % of cases,
            ``max(0, beta - 3 |gamma|)``, into the bias of the next layer. This changes the function
            where the assumption fails.
        modules: Globs on dotted paths: pairs of which both layers match; None takes all.
        max_sweeps: How often to go over all pairs at most.

    Returns:
        A row for each convolution and linear layer: what was done, or why nothing.

    Raises:
        ConfigError: If an argument is not allowed, or ranges of the model have been seen.
    """
    instrumentation = instrumentation_of(model)
    _check(instrumentation, factors, max_sweeps)
    Selection(None, modules, None, QUANT_MARK).validate(model, instrumentation.sites)
    finder = _Finder(model, instrumentation, modules)
    found = [
        finder.pair_of(site)
        for site in instrumentation.sites
        if isinstance(site.op, WeightedOp) or _is_norm_alone(site)
    ]
    pairs = [pair for pair in found if isinstance(pair, _Pair)]
    for _ in range(max_sweeps):
        moved = [pair.balance(factors) for pair in pairs]
        if not any(moved):
            break
    if absorb_bias:
        for pair in pairs:
            pair.absorb()
    instrumentation.thaw()
    instrumentation.applied.append("equalize")
    rows = Equalization([pair.row() if isinstance(pair, _Pair) else pair for pair in found])
    logger.info(
        "equalized %d of %d layers of %s with the layer behind them",
        len(pairs),
        len(rows),
        type(model).__name__,
    )
    return rows


def _check(instrumentation: Instrumentation, factors: str, max_sweeps: int) -> None:
    if factors not in ("power_of_two", "free"):
        msg = f"`factors` must be 'power_of_two' or 'free'. Found: {factors!r}."
        raise ConfigError(msg)
    if not isinstance(max_sweeps, int) or max_sweeps < 1:
        msg = f"`max_sweeps` must be a positive integer. Found: {max_sweeps!r}."
        raise ConfigError(msg)
    for site in instrumentation.sites:
        for quantizer in site.quantizers():
            if quantizer.known and quantizer.estimator.rule.fixed is None:
                msg = (
                    f"`{quantizer.name}` has seen a range, which equalization would change. "
                    "Equalize before ranges are calibrated or trained."
                )
                raise ConfigError(msg)


def _is_norm_alone(site: Site) -> bool:
    return site.op.kind == "batch_norm" and not site.completes_fold


# --- the two layers of a pair -------------------------------------------------------------------


class _Source(ABC):
    """What gives the channels of a pair."""

    site: Site

    @abstractmethod
    def rows(self) -> Tensor:
        """Return all that scales with a channel, ``[C, N]``."""

    @abstractmethod
    def ranges(self) -> Tensor:
        """Return the range of the channel in the weight that is quantized, ``[C]``."""

    @abstractmethod
    def multiply(self, factors: Tensor) -> None:
        """Scale the channels."""


class _LayerSource(_Source):
    """A layer without a batch norm folded into it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.op: Any = site.op
        self.layer: Any = site.owner
        self.call = site.recorded_call

    def rows(self) -> Tensor:
        rows: Tensor = self.op.channel_rows(self.call, self.layer.weight)
        bias = self.layer.bias
        return rows if bias is None else torch.cat([rows, bias.unsqueeze(1).to(rows.dtype)], 1)

    def ranges(self) -> Tensor:
        rows: Tensor = self.op.channel_rows(self.call, self.layer.weight)
        return rows.abs().amax(1).double()

    def multiply(self, factors: Tensor) -> None:
        weight = self.layer.weight
        weight.mul_(self.op.per_channel(self.call, factors.to(weight.dtype)))
        if self.layer.bias is not None:
            self.layer.bias.mul_(factors.to(self.layer.bias.dtype))


class _NormSource(_Source):
    """A batch norm, with the layer it is folded into if it is: gamma and beta take the factor."""

    def __init__(self, site: Site, bn: Any, layer: _LayerSource | None) -> None:
        self.site = site
        self.bn = bn
        self.layer = layer

    def rows(self) -> Tensor:
        return torch.stack([self.bn.weight, self.bn.bias], 1)

    def ranges(self) -> Tensor:
        factor = running_factor(self.bn).abs().double()
        return factor if self.layer is None else factor * self.layer.ranges()

    def multiply(self, factors: Tensor) -> None:
        self.bn.weight.mul_(factors.to(self.bn.weight.dtype))
        self.bn.bias.mul_(factors.to(self.bn.bias.dtype))


class _Target:
    """The layer that takes the channels.

    Args:
        site: The layer.
        repeats: How many of its inputs each channel has become (by flattening).
    """

    def __init__(self, site: Site, repeats: int) -> None:
        self.site = site
        self.repeats = repeats
        self.op: Any = site.op
        self.layer: Any = site.owner
        self.call = site.recorded_call

    def rows(self) -> Tensor:
        """Return all that scales with a channel, ``[C, N]``."""
        return self._by_input(self.layer.weight)

    def ranges(self) -> Tensor:
        """Return the range of the channel in the weight that is quantized, ``[C]``."""
        weight = self.layer.weight.abs()
        bn: Any = self.site.fold
        if bn is not None:
            weight = weight * self.op.per_channel(self.call, running_factor(bn).abs())
        return self._by_input(weight).amax(1).double()

    def multiply(self, factors: Tensor) -> None:
        """Scale the input channels."""
        weight = self.layer.weight
        weight.mul_(self._along_input(factors.to(weight.dtype)))

    def absorb(self, shift: Tensor) -> None:
        """Add to the result what a shift of the input channels takes off."""
        moved = self._response(shift.to(self.layer.weight.dtype))
        if self.layer.bias is not None:
            self.layer.bias.add_(moved)
        else:
            self.norm.running_mean.sub_(moved)

    @property
    def norm(self) -> Any:
        """The batch norm that is folded into the layer."""
        return self.site.fold

    def refuses_shift(self) -> str | None:
        """Say why its input cannot be shifted, if so."""
        if isinstance(self.op, ConvOp) and (self.op.transposed or any(self.call.padding)):
            return "padding"
        return None if self.layer.bias is not None or self.norm is not None else "no bias"

    def _response(self, shift: Tensor) -> Tensor:
        """Return what an input that is constant in each channel gives, ``[C_out]``."""
        if not isinstance(self.op, ConvOp):
            result: Tensor = self.layer.weight @ shift.repeat_interleave(self.repeats)
            return result
        covered = (
            spread * (size - 1) + 1
            for spread, size in zip(self.call.dilation, self.layer.weight.shape[2:], strict=True)
        )
        ones = [1] * self.op.dims
        constant = shift.view(1, -1, *ones).expand(1, -1, *covered)
        return self.op.apply(self.call, constant, self.layer.weight, None).flatten()

    def _by_input(self, weight: Tensor) -> Tensor:
        if not isinstance(self.op, ConvOp):
            return weight.t().reshape(weight.shape[1] // self.repeats, -1)
        if self.op.transposed:
            return weight.flatten(1)
        # [groups, outputs per group, inputs per group, positions]
        grouped = weight.reshape(self.call.groups, -1, *weight.shape[1:]).flatten(3)
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def _along_input(self, factors: Tensor) -> Tensor:
        if not isinstance(self.op, ConvOp):
            return factors.repeat_interleave(self.repeats).view(1, -1)
        ones = [1] * self.op.dims
        if self.op.transposed:
            return factors.view(-1, 1, *ones)
        groups, outputs = self.call.groups, self.call.weight.shape[0]
        grouped = factors.view(groups, 1, -1).expand(-1, outputs // groups, -1)
        return grouped.reshape(outputs, -1, *ones)


class _Pair:
    """Two layers and the factors between them.

    Args:
        source: Gives the channels.
        target: Takes them.
        rectified: Whether a ReLU, and nothing that a shift would not pass, stands between.
    """

    def __init__(self, source: _Source, target: _Target, rectified: bool) -> None:
        self.source = source
        self.target = target
        self.rectified = rectified
        self.total = torch.ones_like(source.ranges())
        self.before = self.precision()
        self.absorbed = 0

    def balance(self, kind: EqualizationFactors) -> bool:
        """Rescale the channels; return whether anything moved."""
        first, second = self.source.ranges(), self.target.ranges()
        alive = (first > 0) & (second > 0)
        wanted = torch.where(alive, (second / first).sqrt(), torch.ones_like(first))
        if kind == "power_of_two":
            wanted = torch.exp2(torch.round(torch.log2(wanted)))
            wanted = torch.where(self._survives(wanted), wanted, torch.ones_like(wanted))
        if bool(((wanted - 1).abs() < _SETTLED).all()):
            return False
        self.source.multiply(wanted)
        self.target.multiply(1 / wanted)
        self.total *= wanted
        return True

    def _survives(self, factors: Tensor) -> Tensor:
        """Whether the numbers of a channel can be scaled without losing a bit."""
        survives = torch.ones_like(factors, dtype=torch.bool)
        for rows, by in ((self.source.rows(), factors), (self.target.rows(), 1 / factors)):
            by = by.to(rows.dtype).unsqueeze(1)
            survives &= ((rows * by) / by == rows).all(1)
        return survives

    def precision(self) -> float:
        """Return the mean over the channels of the product of both relative ranges."""
        relative = [
            ranges / ranges.amax().clamp_min(torch.finfo(ranges.dtype).tiny)
            for ranges in (self.source.ranges(), self.target.ranges())
        ]
        return float((relative[0] * relative[1]).mean())

    def absorb(self) -> None:
        """Move the part of a bias that a ReLU hardly ever cuts on to the next layer."""
        if not (isinstance(self.source, _NormSource) and self.rectified):
            return
        if self.target.refuses_shift() is not None:
            return
        bn = self.source.bn
        shift = (bn.bias - _DEVIATIONS * bn.weight.abs()).clamp_min(0)
        self.absorbed = int(shift.count_nonzero())
        if self.absorbed:
            bn.bias.sub_(shift)
            self.target.absorb(shift)

    def row(self) -> EqualizationRow:
        """Return what was done."""
        return EqualizationRow(
            site=self.source.site.key,
            follower=self.target.site.key,
            channels=int((self.total != 1).sum()),
            largest_factor=float(torch.maximum(self.total, 1 / self.total).amax()),
            absorbed=self.absorbed,
            precision_before=self.before,
            precision_after=self.precision(),
        )


# --- finding the pairs --------------------------------------------------------------------------


class _UnsuitableError(Exception):
    """A layer has no follower to be equalized with, and why."""


class _Finder:
    """Finds the layer behind a layer in the recorded dataflow.

    Args:
        model: The model.
        instrumentation: Of the model.
        modules: Globs on dotted paths, or None.
    """

    def __init__(
        self, model: nn.Module, instrumentation: Instrumentation, modules: Sequence[str] | None
    ) -> None:
        self.instrumentation = instrumentation
        self.graph = instrumentation.graph
        self.ownership = Ownership(model, self.graph)
        self.modules = modules

    def pair_of(self, site: Site) -> _Pair | EqualizationRow:
        """Return the pair that a site begins, or a row that says why there is none."""
        try:
            return self._pair_of(site)
        except _UnsuitableError as reason:
            return EqualizationRow(site.key, why_not=str(reason))

    def _pair_of(self, site: Site) -> _Pair:
        self._require_chosen(site)
        source, last = self._source(site)
        axis = self._channel_axis(site)
        target, passed, repeats = self._follow(last, axis)
        self._require_chosen(target)
        self._require_own(target)
        limited = [s.key for s in (site, *passed, target) if s.active_limits is not None]
        if limited:
            msg = f"the range limits of `{limited[0]}` would not scale along"
            raise _UnsuitableError(msg)
        rectified = any(isinstance(s.op, ClampOp) for s in passed) and all(
            isinstance(s.op, ClampOp) or s.op.kind in _SHIFTABLE for s in passed
        )
        return _Pair(source, _Target(target, repeats), rectified)

    def _require_chosen(self, site: Site) -> None:
        if self.modules is not None and not any(matches(site, p) for p in self.modules):
            msg = f"`{site.key}` is not in `modules`"
            raise _UnsuitableError(msg)

    def _require_own(self, site: Site) -> None:
        obstacle = self.ownership.obstacle(site)
        if obstacle is not None:
            msg = f"`{site.key}`: {obstacle}"
            raise _UnsuitableError(msg)

    def _source(self, site: Site) -> tuple[_Source, Site]:
        """Return what gives the channels, and the site whose result they are."""
        if site.op.kind == "batch_norm":
            self._require_norm(site)
            norm: Any = site.owner
            return _NormSource(site, norm, None), site
        fold: Any = site.__dict__["fold"]
        if fold is None:
            self._require_own(site)
            return _LayerSource(site), site
        follower = self.graph.sole_consumer(site.key)
        assert follower is not None  # a fold was planned for it
        norm = self.instrumentation.find(follower.key)
        self._require_norm(norm)
        return _NormSource(site, fold, _LayerSource(site)), norm

    def _require_norm(self, site: Site) -> None:
        bn: Any = site.owner
        if getattr(bn, "weight", None) is None or getattr(bn, "running_var", None) is None:
            msg = f"`{site.key}` has no gamma and beta, or no running statistics"
            raise _UnsuitableError(msg)
        self._require_own(site)

    def _channel_axis(self, site: Site) -> int:
        rank = len(site.node.outputs[0].shape)
        if site.op.kind == "linear":
            return rank - 1
        if isinstance(site.op, ConvOp) and rank != site.op.dims + 2:
            msg = "its input has no batch dimension"
            raise _UnsuitableError(msg)
        return 1

    def _follow(self, site: Site, axis: int) -> tuple[Site, list[Site], int]:
        """Return the next layer, the sites on the way, and the inputs a channel has become."""
        passed: list[Site] = []
        node, repeats = site.node, 1
        while True:
            follower = self.graph.sole_consumer(node.key)
            if follower is None:
                msg = "its result is read by several calls, or returned"
                raise _UnsuitableError(msg)
            if follower.key in self.instrumentation:
                following = self.instrumentation.find(follower.key)
                if isinstance(following.op, WeightedOp):
                    self._require_input(following, node, axis)
                    return following, passed, repeats
                passed.append(following)
            repeats *= self._passed(follower, node, axis)
            node = follower

    def _require_input(self, target: Site, before: Node, axis: int) -> None:
        call = target.recorded_call
        rank = len(call.input.shape)
        wanted = rank - 1 if target.op.kind == "linear" else 1
        batched = not isinstance(target.op, ConvOp) or rank == target.op.dims + 2
        given = {
            spec.value
            for run in self.graph.runs
            for n in run.nodes
            if n.key == before.key
            for spec in n.outputs
        }
        if call.input.value not in given or not batched or axis != wanted:
            msg = f"`{target.key}` does not take the channels as its input channels"
            raise _UnsuitableError(msg)

    def _passed(self, node: Node, before: Node, axis: int) -> int:
        """Check that a factor per channel passes a call; return how often it repeats channels."""
        shape, after = before.outputs[0].shape, node.outputs[0].shape
        flat = (*shape[:1], math.prod(shape[1:]))
        if node.op in _FLATTENING and axis == 1 and after == flat:
            return math.prod(shape[2:])
        if node.op in _HOMOGENEOUS and shape == after:
            return 1
        if node.op in _POOLS and axis < len(shape) - _POOLS[node.op] and axis == 1:
            return 1
        op = op_of(node.op)
        kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
        if op is not None and node.op == "mean":
            call = op.bind(*node.args, **kwargs)
            if axis == 1 and not {0, 1} & set(call.dim):
                return 1
        if isinstance(op, ClampOp):
            call = op.bind(*node.args, **kwargs)
            window = window_of(call)
            if has_tensor_bounds(call) or (window.low, window.high) != (0.0, math.inf):
                msg = f"`{node.key}` clamps at bounds that would not scale along"
                raise _UnsuitableError(msg)
            return 1
        msg = f"`{node.key}` does not pass factors of channels on"
        raise _UnsuitableError(msg)
