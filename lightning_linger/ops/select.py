"""Choosing by a mask: ``where`` and ``masked_fill``.

Two tensors meet at the coarser of their steps, which loses no range. A number becomes the nearest
code of the tensor's grid, whose step is doubled until the number fits.

A number of -1000 or less (``-inf``, ``-1e9``, ``torch.finfo(...).min``) stands for minus infinity,
as attention masks use it: it becomes the lowest code. So that a softmax gives such a place nothing,
the lowest code has to lie far below every value that is kept: the range reaches ``bits`` below
the smallest of them. A softmax then weighs a masked place with at most ``exp(-bits)``, which is
less than half a step of a result of that width. A number of 1000 or more becomes the highest code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.capture import capturing
from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.graph import TensorSpec
from lightning_linger.core.integer import code_limits, integer_op, payload_dtype, rescale, wide
from lightning_linger.core.platform import Platform
from lightning_linger.core.registry import Op, Part, register
from lightning_linger.core.rounding import round_value
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by, tag_of
from lightning_linger.ops.kernel import run_on_grid

# From here on a number stands for infinity.
INFINITE = 1e3
FLOAT_LIMIT = 1e30
# Name of the quantizer that knows how far down the lowest code has to reach.
REACH = "reach"


class SelectCall(NamedTuple):
    """Bound arguments: ``input`` where the mask is true, ``other`` elsewhere."""

    input: Any
    other: Any
    mask: Any
    unsupported: str | None = None


# --- integer kernels ------------------------------------------------------------------------


@integer_op("linger::where")
def integer_where(
    mask: Tensor,
    x: Tensor,
    y: Tensor,
    scale_x: float,
    scale_y: float,
    scale_o: float,
    bits: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Choose codes by a mask, after bringing both sides to the output scale.

    Args:
        mask: Boolean, true for ``x``; broadcasts with the codes.
        x: Codes.
        y: Codes.
        scale_x: Step of ``x``.
        scale_y: Step of ``y``.
        scale_o: Step of the result, not finer than theirs.
        bits: Width of both and of the result.
        rounding: Rounding rule.
        platform: Name of the target.
    """
    a = brought_to(x, scale_x, scale_o, bits, rounding)
    b = brought_to(y, scale_y, scale_o, bits, rounding)
    return torch.where(mask, a, b)


@integer_where.register_fake
def _(mask: Tensor, x: Tensor, y: Tensor, *_: object) -> Tensor:
    return torch.where(mask, x, y)


@integer_op("linger::masked_fill")
def integer_masked_fill(
    x: Tensor,
    mask: Tensor,
    code: int,
    scale_x: float,
    scale_o: float,
    bits: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Bring codes to the output scale and put one code where a mask is true.

    Args:
        x: Codes.
        mask: Boolean; broadcasts with ``x``.
        code: What is filled in, at the output scale.
        scale_x: Step of ``x``.
        scale_o: Step of the result, not finer than that of ``x``.
        bits: Width of ``x`` and of the result.
        rounding: Rounding rule.
        platform: Name of the target.
    """
    kept = brought_to(x, scale_x, scale_o, bits, rounding)
    return torch.where(mask, torch.full((), code, dtype=kept.dtype, device=kept.device), kept)


@integer_masked_fill.register_fake
def _(x: Tensor, mask: Tensor, *_: object) -> Tensor:
    return torch.where(mask, torch.full((), 0, dtype=x.dtype, device=x.device), x)


def brought_to(x: Tensor, scale_x: float, scale_o: float, bits: int, rounding: str) -> Tensor:
    """Return codes at another scale, as they are where it is theirs."""
    if scale_x == scale_o:
        return x
    codes = rescale(wide(x, bits), scale_x / scale_o, *code_limits(bits), rounding)
    return codes.to(payload_dtype(bits))


# --- steps ----------------------------------------------------------------------------------


def widened(step: Scalar, needed: Scalar) -> Scalar:
    """Return the smallest ``step * 2^k`` (``k >= 0``) that is not finer than ``needed``."""
    if isinstance(step, float) and isinstance(needed, float):
        while step < needed:
            step *= 2.0
        return step
    ratio = torch.as_tensor(needed) / torch.as_tensor(step)
    return step * torch.exp2(torch.ceil(torch.log2(ratio)).clamp(min=0.0))


def coarser(a: Scalar, b: Scalar) -> Scalar:
    """Return the coarser of two steps."""
    if isinstance(a, float) and isinstance(b, float):
        return a if a >= b else b
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


def kept_range(x: Tensor, masked: Tensor, margin: float) -> Tensor:
    """Return what a range has to cover so that its lowest code stands for minus infinity.

    Args:
        x: Real values.
        masked: Which of them do not count.
        margin: How far the lowest code has to lie below all that count.

    Returns:
        The two ends of the range.
    """
    low = torch.where(masked, math.inf, x).amin() - margin
    high = torch.where(masked, -math.inf, x).amax()
    # Where everything is masked nothing is known.
    return torch.nan_to_num(torch.stack([low, high]), posinf=0.0, neginf=0.0)


# --- ops ------------------------------------------------------------------------------------


class SelectOp(Op):
    """``where`` and ``masked_fill``.

    Args:
        kind: Canonical op name.
        binder: Binds the arguments.
    """

    output_scale = "inputs"
    learns_ranges = False

    def __init__(self, kind: str, binder: Callable[..., SelectCall]) -> None:
        super().__init__(kind)
        self.binder = binder

    def bind(self, *args: Any, **kwargs: Any) -> SelectCall:
        """Bind the arguments of either function."""
        return self.binder(*args, **kwargs)

    def operands(self, call: SelectCall) -> list[Any]:
        """Both sides; numbers, and tensors that hold one, are constants."""
        return [None if _is_number(x) else x for x in (call.input, call.other)]

    def parts(self, call: SelectCall, config: QuantConfig, platform: Platform) -> dict[str, Part]:
        """A number that stands for minus infinity needs a range that leaves room for it."""
        numbers = [x for x in (call.input, call.other) if _is_number(x)]
        masks = any(not isinstance(x, int | float) or x <= -INFINITE for x in numbers)
        return {REACH: Part()} if masks and len(numbers) == 1 else {}

    def obstacle(self, call: SelectCall) -> str | None:
        """What cannot be bound."""
        return call.unsupported

    def run_fake(self, site: Site, call: SelectCall) -> Any:
        """Choose on the grid."""
        return self._run(site, call)

    def run_integer(self, site: Site, call: SelectCall) -> Any:
        """Call ``linger::where`` or ``linger::masked_fill``."""
        return self._run(site, call)

    def _run(self, site: Site, call: SelectCall) -> Any:
        sides = (call.input, call.other)
        # The example tells which side is a number: a broadcast tensor may have no dimension too.
        recorded = site.recorded_call
        fixed = [_is_number(x) for x in (recorded.input, recorded.other)]
        found = [
            None if is_fixed else site.operand(position, x)
            for position, (x, is_fixed) in enumerate(zip(sides, fixed, strict=True))
        ]
        if any(x is None and not is_fixed for x, is_fixed in zip(found, fixed, strict=True)):
            return NotImplemented
        x, y = found
        if x is not None and y is not None:
            return self._choose(site, call.mask, x, y)
        kept = y if x is None else x
        if kept is None:
            return NotImplemented
        mask = call.mask if x is None else torch.logical_not(call.mask)
        return self._fill(site, kept, mask, sides[0] if x is None else sides[1])

    def _choose(self, site: Site, mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
        tag_x, tag_y = tag_held_by(x), tag_held_by(y)
        step = coarser(tag_x.step, tag_y.step)
        reach = None
        if tag_x.reach is not None and tag_y.reach is not None:
            reach = coarser(tag_x.reach, tag_y.reach)
        tag = dataclasses.replace(tag_x, step=step, site=site.key, reach=reach)

        def kernel(usable: float, a: Tensor, b: Tensor) -> Tensor:
            return integer_where(
                mask,
                a,
                b,
                float(tag_x.step),
                float(tag_y.step),
                usable,
                tag.bits,
                site.rounding,
                site.platform_name,
            )

        return run_on_grid(site, [x, y], tag, lambda: torch.where(mask, x, y), kernel)

    def _fill(self, site: Site, x: Tensor, mask: Tensor, value: Any) -> Tensor:
        tag = tag_held_by(x)
        number = number_of(site, value)
        low, high = code_limits(tag.bits)
        step, reach = tag.step, tag.reach
        if REACH in site.parts:
            part = site.part(REACH)
            if site.learning:
                margin = tag.bits if number <= -INFINITE else 0
                part.observe(kept_range(x.detach(), mask, margin))
            step = widened(step, part.step())
        if abs(number) < INFINITE:
            step = widened(step, abs(number) / high)
            reach = None if reach is None else coarser(reach, abs(number))
        else:
            reach = None
        before = tag.step
        tag = dataclasses.replace(tag, step=step, site=site.key, reach=reach)

        def kernel(usable: float, codes: Tensor) -> Tensor:
            code = max(low, min(high, _rounded(number / usable, site)))
            return integer_masked_fill(
                codes,
                mask,
                code,
                float(before),
                usable,
                tag.bits,
                site.rounding,
                site.platform_name,
            )

        # An infinity would make the gradient of a clamp no number.
        finite = max(-FLOAT_LIMIT, min(FLOAT_LIMIT, number))
        return run_on_grid(
            site, [x], tag, lambda: torch.where(mask, x.new_full((), finite), x), kernel
        )


def number_of(site: Site, value: Any) -> float:
    """Return a number, which may stand in a tensor without dimensions.

    Raises:
        UnsupportedError: If a capture runs in which the tensor cannot be read.
    """
    if not isinstance(value, Tensor):
        return float(value)
    if capturing():
        known = site.prepared.get("number")
        if known is None:
            msg = (
                f"`{site.key}`: the value in a tensor cannot be read in torch.compile. Pass it as "
                "a Python number."
            )
            raise UnsupportedError(msg)
        return float(known)
    number = float(value.item())
    if not site.training:
        site.prepared["number"] = number
    return number


def _rounded(code: float, site: Site) -> int:
    if math.isinf(code):
        return -(2**31) if code < 0 else 2**31
    return round_value(code, site.rounding)


def _is_number(x: Any) -> bool:
    if isinstance(x, Tensor | TensorSpec):
        return len(x.shape) == 0 and tag_of(x) is None
    return True


def _is_mask(x: Any) -> bool:
    if isinstance(x, TensorSpec):
        return not x.floating
    return isinstance(x, Tensor) and tag_of(x) is None and not x.dtype.is_floating_point


def _bind_where(*args: Any, **kwargs: Any) -> SelectCall:
    # `torch.where(mask, x, y)` or `x.where(mask, y)`
    names = ("condition", "input", "self", "other")
    given = [*args, *(kwargs[name] for name in names if name in kwargs)]
    if len(given) != 3 or "out" in kwargs:
        return SelectCall(None, None, None, "`where` without values, or with `out=`")
    if not _is_mask(given[0]) and _is_mask(given[1]):
        return SelectCall(given[0], given[2], given[1])
    return SelectCall(given[1], given[2], given[0])


def _bind_masked_fill(input: Any, mask: Any, value: Any) -> SelectCall:
    return SelectCall(value, input, mask)


register(SelectOp("where", _bind_where))
register(SelectOp("masked_fill", _bind_masked_fill))
