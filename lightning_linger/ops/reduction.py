"""Sums and variances over dimensions: exact in 64 bits, rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.integer import integer_op, payload_dtype, rescale_fixed_point
from lightning_linger.core.payload import integer_codes, step_of
from lightning_linger.core.platform import fixed_point_of
from lightning_linger.core.registry import register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by
from lightning_linger.ops.arguments import reduced_count, reduced_dims, refused_arguments
from lightning_linger.ops.exact import quotient, to_codes
from lightning_linger.ops.kernel import KernelOp, Target
from lightning_linger.ops.results import minimum_step


class ReduceCall(NamedTuple):
    """Bound arguments of a reduction; dimensions count from the front."""

    input: Tensor
    dim: tuple[int, ...]
    keepdim: bool = False
    correction: int = 0
    refused: str | None = None


class CumsumCall(NamedTuple):
    """Bound arguments of ``torch.cumsum``."""

    input: Tensor
    dim: int
    refused: str | None = None


# --- integer kernels --------------------------------------------------------------------------


@integer_op("linger::sum")
def integer_sum(
    x: Tensor,
    dim: Sequence[int],
    keepdim: bool,
    scale_x: float,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Add up codes in 64 bits and bring the sum to the output scale, rounding once."""
    sums = x.to(torch.int64).sum(list(dim), keepdim=keepdim)
    engine = fixed_point_of(platform)
    if engine is not None:
        codes = rescale_fixed_point(sums, [scale_x / scale_o], engine)
        return codes.clamp_(low, high).to(payload_dtype(bits_o))
    return to_codes(sums.double() * (scale_x / scale_o), bits_o, low, high, rounding)


@integer_sum.register_fake
def _(
    x: Tensor,
    dim: Sequence[int],
    keepdim: bool,
    scale_x: float,
    scale_o: float,
    bits_o: int,
    *_: object,
) -> Tensor:
    return x.float().sum(list(dim), keepdim=keepdim).to(payload_dtype(bits_o))


@integer_op("linger::cumsum")
def integer_cumsum(
    x: Tensor,
    dim: int,
    scale_x: float,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Add up codes along a dimension, each sum as in ``linger::sum``."""
    sums = x.to(torch.int64).cumsum(dim)
    return to_codes(sums.double() * (scale_x / scale_o), bits_o, low, high, rounding)


@integer_cumsum.register_fake
def _(x: Tensor, dim: int, scale_x: float, scale_o: float, bits_o: int, *_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits_o))


@integer_op("linger::var")
def integer_var(
    x: Tensor,
    dim: Sequence[int],
    keepdim: bool,
    correction: int,
    root: bool,
    scale_x: float,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Variance of codes, or its root.

    With the sums ``s1`` of ``n`` codes and ``s2`` of their squares, exact in 64 bits, the variance
    is ``(n * s2 - s1^2) / (n * (n - correction))`` in float64.

    Args:
        x: Codes.
        dim: Dimensions to reduce.
        keepdim: See torch.
        correction: 1 for the unbiased variance, 0 for that of the values themselves.
        root: Return the standard deviation.
        scale_x: Step of ``x``.
        scale_o: Step of the result.
        bits_o: Width of the result.
        low: Smallest code of the result.
        high: Largest code of the result.
        rounding: Rounding rule.
        platform: Name of the target.
    """
    whole = x.to(torch.int64)
    count = reduced_count(x.shape, dim)
    squares = (whole * whole).sum(list(dim), keepdim=keepdim) * count
    sums = whole.sum(list(dim), keepdim=keepdim)
    variance = quotient((squares - sums * sums).double(), float(count * (count - correction)))
    real = variance.sqrt() * (scale_x / scale_o) if root else variance * (scale_x**2 / scale_o)
    return to_codes(real, bits_o, low, high, rounding)


@integer_var.register_fake
def _(
    x: Tensor,
    dim: Sequence[int],
    keepdim: bool,
    correction: int,
    root: bool,
    scale_x: float,
    scale_o: float,
    bits_o: int,
    *_: object,
) -> Tensor:
    return x.float().sum(list(dim), keepdim=keepdim).to(payload_dtype(bits_o))


# --- ops --------------------------------------------------------------------------------------


class _ReduceOp(KernelOp):
    """A reduction with a scale of its own."""

    def obstacle(self, call: Any) -> str | None:
        """A sum over the batch makes an output depend on the other samples."""
        refused: str | None = call.refused
        return refused


class SumOp(_ReduceOp):
    """``sum`` over given dimensions."""

    def bind(
        self, input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any
    ) -> ReduceCall:
        """Bind ``(input, dim, keepdim)``; ``axis`` is numpy's name of ``dim``."""
        dims = reduced_dims(input, kwargs.pop("axis", dim))
        refused = refused_arguments(kwargs) or _over_batch("sum", dims)
        return ReduceCall(input, dims, keepdim, 0, refused)

    def real(self, site: Site, call: ReduceCall) -> Tensor:
        """Run the function of PyTorch."""
        return call.input.sum(call.dim, call.keepdim)

    def finest_step(self, site: Site, call: ReduceCall) -> Scalar | None:
        """Return the step of the sum."""
        return minimum_step(site, step_of(call.input))

    def kernel(self, site: Site, call: ReduceCall, target: Target) -> Tensor:
        """Call ``linger::sum``."""
        return integer_sum(
            integer_codes(call.input),
            call.dim,
            call.keepdim,
            float(step_of(call.input)),
            target.scale,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )


class CumsumOp(_ReduceOp):
    """``cumsum`` along a dimension."""

    def bind(self, input: Tensor, dim: Any = None, **kwargs: Any) -> CumsumCall:
        """Bind ``(input, dim)``; ``axis`` is numpy's name of ``dim``."""
        (along,) = reduced_dims(input, kwargs.pop("axis", dim))
        return CumsumCall(input, along, refused_arguments(kwargs))

    def real(self, site: Site, call: CumsumCall) -> Tensor:
        """Run the function of PyTorch."""
        return call.input.cumsum(call.dim)

    def finest_step(self, site: Site, call: CumsumCall) -> Scalar | None:
        """Return the step of the sums."""
        return minimum_step(site, step_of(call.input))

    def kernel(self, site: Site, call: CumsumCall, target: Target) -> Tensor:
        """Call ``linger::cumsum``."""
        return integer_cumsum(
            integer_codes(call.input),
            call.dim,
            float(step_of(call.input)),
            target.scale,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )


class VarOp(_ReduceOp):
    """``var`` and ``std`` over given dimensions.

    Args:
        kind: Canonical op name.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.root = kind == "std"

    def bind(
        self,
        input: Tensor,
        dim: Any = None,
        unbiased: bool | None = None,
        keepdim: bool = False,
        **kwargs: Any,
    ) -> ReduceCall:
        """Bind ``(input, dim, unbiased, keepdim)``, ``(input, unbiased)`` or ``correction=``."""
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        dims = reduced_dims(input, kwargs.pop("axis", dim))
        correction = kwargs.pop("correction", None)
        if correction is None:
            correction = 1 if unbiased is None else int(unbiased)
        refused = refused_arguments(kwargs) or _over_batch(self.kind, dims)
        if int(correction) != correction:
            refused = refused or f"a correction of {correction} is no whole number"
        elif reduced_count(input.shape, dims) <= correction:
            refused = refused or f"there are no more values than the correction of {correction}"
        return ReduceCall(input, dims, keepdim, int(correction), refused)

    def real(self, site: Site, call: ReduceCall) -> Tensor:
        """Run the function of PyTorch."""
        function = torch.std if self.root else torch.var
        return function(call.input, call.dim, correction=call.correction, keepdim=call.keepdim)

    def finest_step(self, site: Site, call: ReduceCall) -> Scalar | None:
        """Return the step of the values, or of their squares."""
        step = step_of(call.input)
        return minimum_step(site, step if self.root else step * step)

    def kernel(self, site: Site, call: ReduceCall, target: Target) -> Tensor:
        """Call ``linger::var``."""
        tag = tag_held_by(call.input)
        count = reduced_count(call.input.shape, call.dim)
        if count**2 * 4 ** (tag.bits - 1) >= 2**62:
            msg = (
                f"`{site.key}`: sums over {count} values of {tag.bits} bits exceed 64 bits. Use "
                "fewer activation_bits, or leave it in float with "
                f"overrides={{'{site.key}': None}}."
            )
            raise UnsupportedError(msg)
        return integer_var(
            integer_codes(call.input),
            call.dim,
            call.keepdim,
            call.correction,
            self.root,
            float(tag.step),
            target.scale,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )


def _over_batch(kind: str, dims: Sequence[int]) -> str | None:
    if 0 in dims or not dims:
        return f"a {kind} over the batch is a statistic, not a layer"
    return None


register(SumOp("sum"))
register(CumsumOp("cumsum"))
for _kind in ("var", "std"):
    register(VarOp(_kind))
