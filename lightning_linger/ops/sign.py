"""Negation and absolute value, which keep the scale: the most negative code saturates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.integer import code_limits, integer_op
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.quantizer import readable
from lightning_linger.core.registry import Op, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of, with_tag


class SignCall(NamedTuple):
    """Bound arguments of ``torch.neg`` and ``torch.abs``."""

    input: Tensor
    out: Any = None


@integer_op("linger::neg")
def integer_neg(x: Tensor, scale: float, bits: int, platform: str) -> Tensor:
    """Negate codes with saturation: -128 becomes 127.

    Args:
        x: Codes.
        scale: Their step, which is that of the result.
        bits: Their width.
        platform: Name of the target.
    """
    return (-x.to(torch.int32)).clamp_(*code_limits(bits)).to(x.dtype)


@integer_neg.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@integer_op("linger::abs")
def integer_abs(x: Tensor, scale: float, bits: int, platform: str) -> Tensor:
    """Take absolute values with saturation (arguments as ``linger::neg``)."""
    return x.to(torch.int32).abs_().clamp_(*code_limits(bits)).to(x.dtype)


@integer_abs.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


class SignOp(Op):
    """``neg`` and ``abs``.

    Args:
        kind: Canonical op name.
        function: On real values.
        integer_function: On codes.
    """

    output_scale = "inputs"

    def __init__(
        self,
        kind: str,
        function: Callable[[Tensor], Tensor],
        integer_function: Callable[[Tensor, float, int, str], Tensor],
    ) -> None:
        super().__init__(kind)
        self.function = function
        self.integer_function = integer_function

    def bind(self, *args: Any, **kwargs: Any) -> SignCall:
        """Bind ``(input, out=None)``."""
        return SignCall(*args, **kwargs)

    def obstacle(self, call: SignCall) -> str | None:
        """``out=`` is a tensor from elsewhere."""
        return None if call.out is None else "`out=` has no integer form"

    def run_fake(self, site: Site, call: SignCall) -> Any:
        """Run the function and saturate at the largest code."""
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None:
            return NotImplemented
        real = self.function(x)
        _, most = code_limits(tag.bits)
        top = readable(tag.step) * most
        if isinstance(top, Tensor):
            return with_tag(torch.minimum(real, top.to(real)), tag)
        return with_tag(real.clamp(max=top), tag)

    def run_integer(self, site: Site, call: SignCall) -> Any:
        """Call ``linger::neg`` or ``linger::abs``."""
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None:
            return NotImplemented
        codes = self.integer_function(
            integer_codes(x), float(tag.step), tag.bits, site.platform_name
        )
        return with_tag(codes, tag)


register(SignOp("neg", torch.neg, integer_neg), "neg", "negative", "__neg__")
register(SignOp("abs", torch.abs, integer_abs), "abs", "absolute", "__abs__")
