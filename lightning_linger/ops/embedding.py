"""Embeddings: rows of a quantized table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.capture import can_read, capturing
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.graph import TensorSpec
from lightning_linger.core.integer import integer_op, payload_dtype
from lightning_linger.core.limits import apply_bound, bound_of
from lightning_linger.core.registry import Op, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, with_tag
from lightning_linger.ops.folding import full
from lightning_linger.ops.parameters import learned_on_grid, learned_step, on_grid
from lightning_linger.ops.prepared import versions_of
from lightning_linger.ops.refused import RefusedOp

_PREPARED = "table"
# What `torch.embedding` calls the indices.
_NAMES = {"indices": "input"}


class EmbeddingCall(NamedTuple):
    """Bound arguments of ``F.embedding``."""

    input: Any
    weight: Any
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False


@dataclass(frozen=True)
class _Table:
    codes: Tensor
    step: float
    validity: tuple[Any, ...]
    source: Tensor | None


@integer_op("linger::embedding")
def integer_embedding(
    indices: Tensor, weight: Tensor, scale: float, bits: int, platform: str
) -> Tensor:
    """Take rows of a table of codes; the scale stays.

    Args:
        indices: Whole numbers of any shape.
        weight: ``[N, D]`` codes.
        scale: Step of the table and of the result.
        bits: Width of both.
        platform: Name of the target.

    Returns:
        ``[*indices.shape, D]`` codes.
    """
    return F.embedding(indices, weight)


@integer_embedding.register_fake
def _(indices: Tensor, weight: Tensor, *_: object) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]))


class EmbeddingOp(Op):
    """``F.embedding``: the result lies on the grid of the table.

    The table has one step, whatever the granularity: rows of one result share a scale. Its width is
    that of weights.
    """

    output_scale = "inputs"
    needs_quantized_operand = False
    has_parameters = True

    def bind(self, *args: Any, **kwargs: Any) -> EmbeddingCall:
        """Bind the arguments of ``F.embedding``, or of ``torch.embedding``: the table first."""
        call = EmbeddingCall(*args, **{_NAMES.get(name, name): x for name, x in kwargs.items()})
        if _is_floating(call.input):
            call = call._replace(input=call.weight, weight=call.input)
        return call._replace(padding_idx=None) if call.padding_idx == -1 else call

    def operands(self, call: EmbeddingCall) -> list[Any]:
        """None: indices are not on a grid."""
        return []

    def parameters(self, call: EmbeddingCall) -> list[Any]:
        """The table."""
        return [call.weight]

    def learned_weights(self, call: EmbeddingCall) -> Mapping[str, int | None]:
        """The table, which has one scale."""
        return {"weight": None}

    def obstacle(self, call: EmbeddingCall) -> str | None:
        """Renormalizing writes into the table."""
        if call.max_norm is not None:
            return (
                "`max_norm` rewrites rows of the table when they are read; clip the norm yourself"
            )
        return None

    def run_float(self, site: Site, call: EmbeddingCall) -> Any:
        """Limit the rows."""
        return self._limited_rows(site, call)

    def run_fake(self, site: Site, call: EmbeddingCall) -> Any:
        """Take rows, then round them: the gradient reaches the rows that were taken."""
        if not (site.training or torch.is_grad_enabled()) and self._is_prepared(site):
            table = self._prepare(site, call)
            codes = F.embedding(call.input, table.codes)
            values = codes.to(call.weight.dtype).mul_(table.step)
            return with_tag(values, self._tag(site, table.step, call))
        rows = self._limited_rows(site, call)
        step = self._step(site, call.weight)
        grid = site.weights.grid
        assert grid is not None  # the planner gives one to every op that has parameters
        rounding, clips = site.weight_rounding("weight"), site.weights.clips
        limits, learned = (grid.qmin, grid.qmax), site.weights.learned
        if learned is not None and site.training:
            rounded = learned_on_grid(full(rows), step, limits, rounding, learned, learned.value)
        else:
            rounded = on_grid(full(rows), step, limits, rounding, clips)
        rounded = site.with_rounded_gradient("weight", rounded)
        return with_tag(rounded.to(rows.dtype), self._tag(site, step, call))

    def run_integer(self, site: Site, call: EmbeddingCall) -> Any:
        """Call ``linger::embedding``."""
        table = self._prepare(site, call)
        codes = integer_embedding(
            call.input, table.codes, table.step, site.weights.bits, site.platform_name
        )
        return with_tag(codes, self._tag(site, table.step, call))

    def _tag(self, site: Site, step: Scalar, call: EmbeddingCall) -> Tag:
        return Tag(step, site.weights.bits, site.key, call.weight.dtype)

    def _limited_rows(self, site: Site, call: EmbeddingCall) -> Tensor:
        # A limit acts on single values: the rows that are read are enough.
        rows = F.embedding(*call)
        bound = self._bound(site, call.weight)
        limits = site.active_limits
        if bound is not None and limits is not None:
            rows = apply_bound(rows, bound.to(rows.dtype), limits.gradient)
        return site.limit_output(rows)

    def _bound(self, site: Site, weight: Tensor) -> Tensor | None:
        limits = site.active_limits
        if limits is None or limits.weight is None:
            return None
        return bound_of(full(weight), limits.weight)

    def _step(self, site: Site, weight: Tensor) -> Scalar:
        grid = site.weights.grid
        assert grid is not None
        rows = full(weight.detach()).reshape(1, -1)
        if site.weights.learned is not None:
            learned = learned_step(site, site.weights.learned, rows)
            return site.weights.held("weight", learned.item() if can_read(learned) else learned)
        absmax = site.weights.reach(rows)[0]
        bound = self._bound(site, weight)
        if bound is not None:
            absmax = torch.minimum(absmax, bound)
        step = grid.step_value(absmax.item()) if can_read(absmax) else grid.step(absmax)
        return site.weights.held("weight", step)

    def _is_prepared(self, site: Site) -> bool:
        return not capturing() or _PREPARED in site.prepared

    def _prepare(self, site: Site, call: EmbeddingCall) -> _Table:
        found: _Table | None = site.prepared.get(_PREPARED)
        if found is not None and (capturing() or self._is_valid(found, site, call)):
            return found
        grid = site.weights.grid
        assert grid is not None
        with torch.no_grad():
            step = float(self._step(site, call.weight))
            weight = full(call.weight)
            bound, edge = self._bound(site, call.weight), site.output_limit()
            if bound is not None:
                weight = torch.minimum(torch.maximum(weight, -bound), bound)
            if edge is not None:
                weight = weight.clamp(-edge, edge)
            rounded = on_grid(weight, step, (grid.qmin, grid.qmax), grid.rounding)
            site.note("weight", call.weight, rounded, step)
            codes = torch.round(rounded / step).to(payload_dtype(site.weights.bits))
            source = call.weight.clone() if site.weight_is_computed else None
        found = _Table(codes, step, self._validity(site, call), source)
        site.prepared[_PREPARED] = found
        return found

    def _validity(self, site: Site, call: EmbeddingCall) -> tuple[Any, ...]:
        weight = None if site.weight_is_computed else call.weight
        return (versions_of([weight]), site.switches.normalize)

    def _is_valid(self, found: _Table, site: Site, call: EmbeddingCall) -> bool:
        same_weight = found.source is None or torch.equal(found.source, call.weight)
        return same_weight and found.validity == self._validity(site, call)


def _is_floating(x: Any) -> bool:
    if isinstance(x, TensorSpec):
        return x.floating
    return isinstance(x, Tensor) and x.dtype.is_floating_point


register(EmbeddingOp("embedding"))
register(
    RefusedOp(
        "embedding_bag",
        "embedding_bag adds rows at the table's step, which its width does not hold; use "
        "`embedding` and a sum",
    )
)
