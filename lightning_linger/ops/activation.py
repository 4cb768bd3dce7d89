"""Clamping activations: a ReLU is the lower edge of the quantizer before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.capture import can_read
from lightning_linger.core.graph import TensorSpec
from lightning_linger.core.integer import integer_op, payload_dtype
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.quantizer import Window
from lightning_linger.core.registry import Op, register
from lightning_linger.core.rounding import round_value
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_of, with_tag
from lightning_linger.ops.arguments import refused_arguments
from lightning_linger.ops.common_step import at_common_step
from lightning_linger.ops.selection import integer_maximum


class ClampCall(NamedTuple):
    """Bound arguments of a clamping activation; ``tensors`` are bounds that are no numbers."""

    input: Tensor
    low: float = -math.inf
    high: float = math.inf
    tensors: tuple[Any, Any] = (None, None)
    refused: str | None = None


@integer_op("linger::clamp")
def integer_clamp(x: Tensor, low: int, high: int, bits: int, platform: str) -> Tensor:
    """Clamp codes into ``[low, high]``; the scale stays."""
    return x.clamp(low, high)


@integer_clamp.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def window_of(call: ClampCall) -> Window:
    """Return what the activation lets through."""
    return Window(low=call.low, high=call.high)


class ClampOp(Op):
    """``relu``, ``relu6``, ``hardtanh`` and ``clamp``.

    Numbers as bounds take the nearest codes of the input's grid. With tensors as bounds, all meet
    at the coarsest step among them.
    """

    output_scale = "inputs"

    def bind(self, *args: Any, **kwargs: Any) -> ClampCall:
        """Bind the arguments of any of the functions."""
        kwargs.pop("inplace", None)
        call: ClampCall = _BINDERS[self.kind](*args, **kwargs)
        return call

    def operands(self, call: ClampCall) -> list[Any]:
        """The input, and bounds that are tensors."""
        return [call.input, *call.tensors] if has_tensor_bounds(call) else [call.input]

    def obstacle(self, call: ClampCall) -> str | None:
        """``out=`` writes where nothing is on a grid."""
        return call.refused

    def run_fake(self, site: Site, call: ClampCall) -> Any:
        """Clamp to the bounds as they lie on the input's grid."""
        if site.merged and tag_of(call.input) is not None:
            return call.input
        if has_tensor_bounds(call):
            return _between(site, call, torch.maximum, torch.minimum)
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None:
            return NotImplemented
        low, high = (_on_grid(edge, tag) for edge in (call.low, call.high))
        return with_tag(_clamp(x, low, high), tag)

    def run_integer(self, site: Site, call: ClampCall) -> Any:
        """Call ``linger::clamp``, or ``linger::maximum`` with bounds that are tensors."""
        if site.merged and tag_of(call.input) is not None:
            return call.input
        if has_tensor_bounds(call):
            name = site.platform_name
            return _between(
                site,
                call,
                lambda x, y: integer_maximum(x, y, True, name),
                lambda x, y: integer_maximum(x, y, False, name),
            )
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None:
            return NotImplemented
        low, high = (edge_code(edge, tag) for edge in (call.low, call.high))
        codes = integer_codes(x)
        assert codes.dtype == payload_dtype(tag.bits)
        return with_tag(integer_clamp(codes, low, high, tag.bits, site.platform_name), tag)


def has_tensor_bounds(call: ClampCall) -> bool:
    """Whether a bound is a tensor, which no edge of a quantizer can stand for."""
    return any(edge is not None for edge in call.tensors)


def _between(
    site: Site,
    call: ClampCall,
    larger: Callable[[Tensor, Tensor], Tensor],
    smaller: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    given = (call.input, *call.tensors)
    found = [None if x is None else site.operand(i, x) for i, x in enumerate(given)]
    if any(x is not None and y is None for x, y in zip(given, found, strict=True)):
        return NotImplemented
    moved, tag = at_common_step(site, [x for x in found if x is not None])
    values = iter(moved)
    x, low, high = (None if y is None else next(values) for y in found)
    assert x is not None  # the input is always there
    x = x if low is None else larger(x, low)
    return with_tag(x if high is None else smaller(x, high), tag)


def edge_code(edge: float, tag: Tag) -> int:
    """Return the code of a clamp's edge, which may be infinite."""
    low, high = (int(code) for code in tag.limits)
    if math.isinf(edge):
        return low if edge < 0 else high
    place = edge / float(tag.step)
    code = round_value(place, "half_away") if tag.affine else math.floor(place + 0.5)
    return max(low, min(high, code))


def _on_grid(edge: float, tag: Tag) -> Any:
    step = tag.step
    if math.isinf(edge):
        return None
    if edge == 0.0:
        return 0.0
    if isinstance(step, Tensor) and not can_read(step):
        return torch.floor(edge / step + 0.5) * step
    return edge_code(edge, tag) * float(step)


def _clamp(x: Tensor, low: Any, high: Any) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        if low is not None:
            x = torch.maximum(x, torch.as_tensor(low, device=x.device))
        return x if high is None else torch.minimum(x, torch.as_tensor(high, device=x.device))
    return x.clamp(low, high)


def _bind_relu(input: Tensor) -> ClampCall:
    return ClampCall(input, 0.0)


def _bind_relu6(input: Tensor) -> ClampCall:
    return ClampCall(input, 0.0, 6.0)


def _bind_hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> ClampCall:
    return ClampCall(input, float(min_val), float(max_val))


def _bind_clamp(input: Tensor, min: Any = None, max: Any = None, **kwargs: Any) -> ClampCall:
    refused = refused_arguments(kwargs)
    if any(isinstance(edge, Tensor | TensorSpec) for edge in (min, max)):
        return ClampCall(input, tensors=(min, max), refused=refused)
    low = -math.inf if min is None else float(min)
    return ClampCall(input, low, math.inf if max is None else float(max), refused=refused)


def _bind_clamp_min(input: Tensor, min: Any) -> ClampCall:
    return _bind_clamp(input, min=min)


def _bind_clamp_max(input: Tensor, max: Any) -> ClampCall:
    return _bind_clamp(input, max=max)


_BINDERS: dict[str, Any] = {
    "relu": _bind_relu,
    "relu6": _bind_relu6,
    "hardtanh": _bind_hardtanh,
    "clamp": _bind_clamp,
    "clamp_min": _bind_clamp_min,
    "clamp_max": _bind_clamp_max,
}

_SPELLINGS = {"clamp": ("clamp", "clip")}

for _kind in _BINDERS:
    register(ClampOp(_kind), *_SPELLINGS.get(_kind, ()))
