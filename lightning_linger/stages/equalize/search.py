"""Which layers are equalized with each other: pairs in the recorded dataflow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_linger.core.graph import Node
from lightning_linger.core.instrumentation import Instrumentation
from lightning_linger.core.registry import op_of
from lightning_linger.core.sites import Site
from lightning_linger.ops.activation import ClampOp, has_tensor_bounds, window_of
from lightning_linger.ops.conv import ConvOp
from lightning_linger.ops.weighted import WeightedOp
from lightning_linger.stages.equalize.pairs import (
    ChannelPair,
    ChannelSource,
    ChannelTarget,
    LayerSource,
    NormSource,
)
from lightning_linger.stages.ownership import Ownership
from lightning_linger.stages.selection import matches

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


class UnsuitableError(Exception):
    """A layer has no follower to be equalized with, and why."""


class PairFinder:
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

    def pair_of(self, site: Site) -> ChannelPair:
        """Return the pair that a site begins.

        Raises:
            UnsuitableError: If there is none, with the reason.
        """
        self._require_chosen(site)
        source, last = self._source(site)
        axis = self._channel_axis(site)
        target, passed, repeats = self._follow(last, axis)
        self._require_chosen(target)
        self._require_own(target)
        limited = [s.key for s in (site, *passed, target) if s.active_limits is not None]
        if limited:
            msg = f"the range limits of `{limited[0]}` would not scale along"
            raise UnsuitableError(msg)
        rectified = any(isinstance(s.op, ClampOp) for s in passed) and all(
            isinstance(s.op, ClampOp) or s.op.kind in _SHIFTABLE for s in passed
        )
        return ChannelPair(source, ChannelTarget(target, repeats), rectified)

    def _require_chosen(self, site: Site) -> None:
        if self.modules is not None and not any(matches(site, p) for p in self.modules):
            msg = f"`{site.key}` is not in `modules`"
            raise UnsuitableError(msg)

    def _require_own(self, site: Site) -> None:
        obstacle = self.ownership.obstacle(site)
        if obstacle is not None:
            msg = f"`{site.key}`: {obstacle}"
            raise UnsuitableError(msg)

    def _source(self, site: Site) -> tuple[ChannelSource, Site]:
        """Return what gives the channels, and the site whose result they are."""
        if site.op.kind == "batch_norm":
            self._require_norm(site)
            norm: Any = site.owner
            return NormSource(site, norm, None), site
        fold: Any = site.__dict__["fold"]
        if fold is None:
            self._require_own(site)
            return LayerSource(site), site
        follower = self.graph.sole_consumer(site.key)
        assert follower is not None  # a fold was planned for it
        norm = self.instrumentation.find(follower.key)
        self._require_norm(norm)
        return NormSource(site, fold, LayerSource(site)), norm

    def _require_norm(self, site: Site) -> None:
        bn: Any = site.owner
        if getattr(bn, "weight", None) is None or getattr(bn, "running_var", None) is None:
            msg = f"`{site.key}` has no gamma and beta, or no running statistics"
            raise UnsuitableError(msg)
        self._require_own(site)

    def _channel_axis(self, site: Site) -> int:
        rank = len(site.node.outputs[0].shape)
        if site.op.kind == "linear":
            return rank - 1
        if isinstance(site.op, ConvOp) and rank != site.op.dims + 2:
            msg = "its input has no batch dimension"
            raise UnsuitableError(msg)
        return 1

    def _follow(self, site: Site, axis: int) -> tuple[Site, list[Site], int]:
        """Return the next layer, the sites on the way, and the inputs a channel has become."""
        passed: list[Site] = []
        node, repeats = site.node, 1
        while True:
            follower = self.graph.sole_consumer(node.key)
            if follower is None:
                msg = "its result is read by several calls, or returned"
                raise UnsuitableError(msg)
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
            raise UnsuitableError(msg)

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
                raise UnsuitableError(msg)
            return 1
        msg = f"`{node.key}` does not pass factors of channels on"
        raise UnsuitableError(msg)
