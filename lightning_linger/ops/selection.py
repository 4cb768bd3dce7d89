"""Extremes and order: whatever only selects keeps codes and their scale.

Indices are plain integers; of equal codes the first counts, in both number systems and in every
export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.integer import integer_op
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.registry import Op, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_held_by, with_tag
from lightning_linger.ops.arguments import reduced_dims, refused_arguments
from lightning_linger.ops.common_step import at_common_step
from lightning_linger.ops.reduction import ReduceCall


class ExtremeCall(NamedTuple):
    """Bound arguments of ``torch.max`` and its relatives.

    Args:
        input: Values.
        other: Values to compare with; None for a reduction.
        dim: The dimension to reduce; None for all.
        keepdim: See torch.
        refused: Why the call has no integer form.
    """

    input: Tensor
    other: Any = None
    dim: int | None = None
    keepdim: bool = False
    refused: str | None = None


class OrderCall(NamedTuple):
    """Bound arguments of ``torch.topk`` and ``torch.sort``."""

    input: Tensor
    k: int
    dim: int
    descending: bool
    refused: str | None = None


# --- integer kernels ------------------------------------------------------------------------


@integer_op("linger::amax")
def integer_amax(
    x: Tensor, dim: Sequence[int], keepdim: bool, largest: bool, platform: str
) -> Tensor:
    """Return the largest (or smallest) codes over dimensions; the scale stays."""
    return x.amax(list(dim), keepdim) if largest else x.amin(list(dim), keepdim)


@integer_amax.register_fake
def _(x: Tensor, dim: Sequence[int], keepdim: bool, *_: object) -> Tensor:
    return x.amax(list(dim), keepdim)


@integer_op("linger::max")
def integer_max(
    x: Tensor, dim: int, keepdim: bool, largest: bool, platform: str
) -> tuple[Tensor, Tensor]:
    """Return the largest (or smallest) codes along a dimension, and where each stands first."""
    index = x.argmax(dim, True) if largest else x.argmin(dim, True)
    values = x.gather(dim, index)
    return (values, index) if keepdim else (values.squeeze(dim), index.squeeze(dim))


@integer_max.register_fake
def _(x: Tensor, dim: int, keepdim: bool, *_: object) -> tuple[Tensor, Tensor]:
    values = x.amax(dim, keepdim)
    return values, values.new_empty(values.shape, dtype=torch.int64)


@integer_op("linger::argmax")
def integer_argmax(x: Tensor, dim: int, keepdim: bool, largest: bool, platform: str) -> Tensor:
    """Return where the largest (or smallest) code along a dimension stands first, as int64."""
    return x.argmax(dim, keepdim) if largest else x.argmin(dim, keepdim)


@integer_argmax.register_fake
def _(x: Tensor, dim: int, keepdim: bool, *_: object) -> Tensor:
    return x.amax(dim, keepdim).to(torch.int64)


@integer_op("linger::maximum")
def integer_maximum(x: Tensor, y: Tensor, largest: bool, platform: str) -> Tensor:
    """Return the larger (or smaller) of two codes on one scale; shapes broadcast."""
    return torch.maximum(x, y) if largest else torch.minimum(x, y)


@integer_maximum.register_fake
def _(x: Tensor, y: Tensor, *_: object) -> Tensor:
    return torch.maximum(x, y)


@integer_op("linger::topk")
def integer_topk(
    x: Tensor, k: int, dim: int, largest: bool, platform: str
) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest (or smallest) codes along a dimension in order, and their places.

    Equal codes stand in the order in which they stood.
    """
    values, indices = ordered(x, k, dim, largest)
    return values.contiguous(), indices.contiguous()


@integer_topk.register_fake
def _(x: Tensor, k: int, dim: int, *_: object) -> tuple[Tensor, Tensor]:
    shape = list(x.shape)
    shape[dim] = k
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def ordered(x: Tensor, k: int, dim: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Return the first ``k`` values of a stable sort, and their places."""
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


# --- ops --------------------------------------------------------------------------------------


class _SelectOp(Op):
    """Selects among values: results are on the grid of the operand."""

    output_scale = "inputs"

    def obstacle(self, call: Any) -> str | None:
        """Arguments that say more than which values to select."""
        refused: str | None = call.refused
        return refused


class AmaxOp(_SelectOp):
    """``amax`` and ``amin`` over given dimensions.

    Args:
        kind: Canonical op name.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.largest = kind == "amax"

    def bind(
        self, input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any
    ) -> ReduceCall:
        """Bind ``(input, dim, keepdim)``; ``axis`` is numpy's name of ``dim``."""
        dims = reduced_dims(input, kwargs.pop("axis", dim))
        return ReduceCall(input, dims, keepdim, 0, refused_arguments(kwargs))

    def run_fake(self, site: Site, call: ReduceCall) -> Any:
        """Reduce; extremes of grid values are on the grid."""
        x = site.operand(0, call.input)
        if x is None:
            return NotImplemented
        reduced = x.amax(call.dim, call.keepdim) if self.largest else x.amin(call.dim, call.keepdim)
        return with_tag(reduced, _own(x, site))

    def run_integer(self, site: Site, call: ReduceCall) -> Any:
        """Call ``linger::amax``."""
        x = site.operand(0, call.input)
        if x is None:
            return NotImplemented
        codes = integer_codes(x)
        result = integer_amax(codes, call.dim, call.keepdim, self.largest, site.platform_name)
        return with_tag(result, _own(x, site))


class MaxOp(_SelectOp):
    """``max`` and ``min`` in all their forms, ``maximum`` and ``minimum``.

    Two operands meet at the coarsest step among them, as in a concatenation.

    Args:
        kind: Canonical op name.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.largest = kind.startswith("max")
        self.commutative = kind in ("maximum", "minimum")

    def bind(
        self, input: Tensor, other: Any = None, keepdim: bool = False, **kwargs: Any
    ) -> ExtremeCall:
        """Bind ``(input)``, ``(input, dim, keepdim)`` or ``(input, other)``."""
        dim = kwargs.pop("axis", kwargs.pop("dim", None))
        if isinstance(other, int):
            other, dim = None, other
        if dim is not None:
            dim %= max(len(input.shape), 1)
        return ExtremeCall(input, other, dim, keepdim, refused_arguments(kwargs))

    def operands(self, call: ExtremeCall) -> list[Any]:
        """What is compared."""
        return [call.input] if call.other is None else [call.input, call.other]

    def run_fake(self, site: Site, call: ExtremeCall) -> Any:
        """Select among the values on the grid."""
        operands = _operands(site, self.operands(call))
        if operands is None:
            return NotImplemented
        if call.other is not None:
            (x, y), tag = at_common_step(site, operands)
            function = torch.maximum if self.largest else torch.minimum
            return with_tag(function(x, y), tag)
        (x,) = operands
        function = torch.max if self.largest else torch.min
        if call.dim is None:
            return with_tag(function(x), _own(x, site))
        index = x.argmax(call.dim, True) if self.largest else x.argmin(call.dim, True)
        values = x.gather(call.dim, index)
        if not call.keepdim:
            values, index = values.squeeze(call.dim), index.squeeze(call.dim)
        return self._pair(with_tag(values, _own(x, site)), index)

    def run_integer(self, site: Site, call: ExtremeCall) -> Any:
        """Call ``linger::maximum``, ``linger::amax`` or ``linger::max``."""
        operands = _operands(site, self.operands(call))
        if operands is None:
            return NotImplemented
        if call.other is not None:
            (x, y), tag = at_common_step(site, operands)
            return with_tag(integer_maximum(x, y, self.largest, site.platform_name), tag)
        (x,) = operands
        codes, tag = integer_codes(x), _own(x, site)
        if call.dim is None:
            dims = tuple(range(codes.dim()))
            return with_tag(integer_amax(codes, dims, False, self.largest, site.platform_name), tag)
        values, index = integer_max(codes, call.dim, call.keepdim, self.largest, site.platform_name)
        return self._pair(with_tag(values, tag), index)

    def _pair(self, values: Tensor, index: Tensor) -> Any:
        kind = torch.return_types.max if self.largest else torch.return_types.min
        return kind((values, index))


class ArgmaxOp(_SelectOp):
    """``argmax`` and ``argmin``: plain integers.

    Args:
        kind: Canonical op name.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.largest = kind == "argmax"

    def bind(
        self, input: Tensor, dim: int | None = None, keepdim: bool = False, **kwargs: Any
    ) -> ExtremeCall:
        """Bind ``(input, dim, keepdim)``; ``axis`` is numpy's name of ``dim``."""
        dim = kwargs.pop("axis", dim)
        if dim is not None:
            dim %= max(len(input.shape), 1)
        return ExtremeCall(input, None, dim, keepdim, refused_arguments(kwargs))

    def run_fake(self, site: Site, call: ExtremeCall) -> Any:
        """Search among the values on the grid."""
        x = site.operand(0, call.input)
        if x is None:
            return NotImplemented
        return (
            x.argmax(call.dim, call.keepdim) if self.largest else x.argmin(call.dim, call.keepdim)
        )

    def run_integer(self, site: Site, call: ExtremeCall) -> Any:
        """Call ``linger::argmax``."""
        x = site.operand(0, call.input)
        if x is None:
            return NotImplemented
        codes, dim = integer_codes(x), call.dim
        if dim is None:
            shape = [1] * codes.dim() if call.keepdim else []
            index = integer_argmax(codes.flatten(), 0, False, self.largest, site.platform_name)
            return index.reshape(shape)
        return integer_argmax(codes, dim, call.keepdim, self.largest, site.platform_name)


class OrderOp(_SelectOp):
    """``topk`` and ``sort``; equal values keep their order, whatever the call says.

    Args:
        kind: Canonical op name.
        bind: Binds the arguments of its functions.
        result: Type of the pair of values and indices.
    """

    def __init__(self, kind: str, bind: Callable[..., OrderCall], result: Any) -> None:
        super().__init__(kind)
        self._bind = bind
        self._result = result

    def bind(self, *args: Any, **kwargs: Any) -> OrderCall:
        """Bind the arguments of either function."""
        return self._bind(*args, **kwargs)

    def run_fake(self, site: Site, call: OrderCall) -> Any:
        """Order the values on the grid."""
        x = site.operand(0, call.input)
        if x is None:
            return NotImplemented
        values, indices = ordered(x, call.k, call.dim, call.descending)
        return self._result((with_tag(values, _own(x, site)), indices))

    def run_integer(self, site: Site, call: OrderCall) -> Any:
        """Call ``linger::topk``."""
        x = site.operand(0, call.input)
        if x is None:
            return NotImplemented
        codes = integer_codes(x)
        values, indices = integer_topk(codes, call.k, call.dim, call.descending, site.platform_name)
        return self._result((with_tag(values, _own(x, site)), indices))


# --- arguments --------------------------------------------------------------------------------


def _bind_topk(
    input: Tensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
    **kwargs: Any,
) -> OrderCall:
    return OrderCall(input, k, dim % max(len(input.shape), 1), largest, refused_arguments(kwargs))


def _bind_sort(
    input: Tensor,
    dim: int = -1,
    descending: bool = False,
    stable: bool = False,
    **kwargs: Any,
) -> OrderCall:
    along = dim % max(len(input.shape), 1)
    count = input.shape[along] if input.shape else 1
    return OrderCall(input, count, along, descending, refused_arguments(kwargs))


def _operands(site: Site, values: Sequence[Any]) -> list[Tensor] | None:
    operands = [site.operand(position, x) for position, x in enumerate(values)]
    found = [x for x in operands if x is not None]
    return found if len(found) == len(operands) else None


def _own(x: Tensor, site: Site) -> Tag:
    tag = tag_held_by(x)
    return tag.at(site.key)


for _kind in ("amax", "amin"):
    register(AmaxOp(_kind))
for _kind in ("max", "min", "maximum", "minimum"):
    register(MaxOp(_kind))
for _kind in ("argmax", "argmin"):
    register(ArgmaxOp(_kind))
register(OrderOp("topk", _bind_topk, torch.return_types.topk))
register(OrderOp("sort", _bind_sort, torch.return_types.sort))
