"""Means over dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.integer import code_limits, integer_op, payload_dtype
from lightning_linger.core.payload import integer_codes, step_of
from lightning_linger.core.platform import Platform, fixed_point_of
from lightning_linger.core.registry import Op, OutputScale, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of, with_tag
from lightning_linger.ops import tflite
from lightning_linger.ops.arguments import reduced_count, to_tuple
from lightning_linger.ops.averages import averaged, divide, summable
from lightning_linger.ops.kernel import KernelOp, Target


class MeanCall(NamedTuple):
    """Bound arguments of ``torch.mean``."""

    input: Tensor
    dim: tuple[int, ...]
    keepdim: bool = False
    dtype: torch.dtype | None = None


@integer_op("linger::mean")
def integer_mean(
    x: Tensor,
    dim: Sequence[int],
    keepdim: bool,
    scale: float,
    bits: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Average codes over dimensions; the scale stays."""
    sums = x.double().sum(dim=list(dim), keepdim=keepdim)
    count = reduced_count(x.shape, dim)
    return divide(sums, count, *code_limits(bits), rounding).to(payload_dtype(bits))


@integer_mean.register_fake
def _(x: Tensor, dim: Sequence[int], keepdim: bool, scale: float, bits: int, *_: object) -> Tensor:
    return x.float().sum(dim=list(dim), keepdim=keepdim).to(payload_dtype(bits))


@integer_op("linger::scaled_mean")
def integer_scaled_mean(
    x: Tensor,
    dim: Sequence[int],
    keepdim: bool,
    scale_x: float,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    platform: str,
) -> Tensor:
    """Average codes over dimensions and bring the mean to a scale of its own, in fixed point."""
    engine = fixed_point_of(platform)
    assert engine is not None  # others keep the scale
    codes = tflite.centred_mean(
        x.long().sum(dim=list(dim), keepdim=keepdim),
        reduced_count(x.shape, dim),
        (scale_x, scale_o),
        engine.averaging,
        engine.multiplier_rounding,
    )
    return codes.clamp_(low, high).to(payload_dtype(bits_o))


@integer_scaled_mean.register_fake
def _(
    x: Tensor,
    dim: Sequence[int],
    keepdim: bool,
    scale_x: float,
    scale_o: float,
    bits_o: int,
    *_: object,
) -> Tensor:
    return x.float().sum(dim=list(dim), keepdim=keepdim).to(payload_dtype(bits_o))


class _ScaledMeanOp(KernelOp):
    """A mean whose result has a range of its own."""

    def real(self, site: Site, call: MeanCall) -> Tensor:
        """Average real values."""
        return torch.mean(call.input, call.dim, call.keepdim)

    def kernel(self, site: Site, call: MeanCall, target: Target) -> Tensor:
        """Call ``linger::scaled_mean``."""
        return integer_scaled_mean(
            integer_codes(call.input),
            call.dim,
            call.keepdim,
            float(step_of(call.input)),
            target.scale,
            target.bits,
            target.low,
            target.high,
            site.platform_name,
        )


class MeanOp(Op):
    """``mean`` over given dimensions; in fixed point the result has a range of its own."""

    output_scale = "inputs"

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self._scaled = _ScaledMeanOp(kind)

    def scale_source(self, platform: Platform) -> OutputScale:
        """Engines with shifts keep the scale."""
        return "observed" if platform.fixed_point else self.output_scale

    def bind(
        self, input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any
    ) -> MeanCall:
        """Bind ``(input, dim, keepdim)``; ``axis`` is numpy's name of ``dim``."""
        dim = kwargs.get("axis", dim)
        rank = len(input.shape)
        dims = tuple(range(rank)) if dim is None else to_tuple(dim, 1)
        return MeanCall(input, tuple(d % rank for d in dims), keepdim, kwargs.get("dtype"))

    def obstacle(self, call: MeanCall) -> str | None:
        """A batch mean makes an output depend on the other samples."""
        if 0 in call.dim:
            return "a mean over the batch is a statistic, not a layer"
        return "`dtype=` has no integer form" if call.dtype is not None else None

    def run_fake(self, site: Site, call: MeanCall) -> Any:
        """Sum on the grid, divide and round."""
        if site.fixed_point:
            return self._scaled.run_fake(site, call)
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None:
            return NotImplemented
        count = reduced_count(x.shape, call.dim)
        sums = summable(x, tag).sum(dim=call.dim, keepdim=call.keepdim)
        return averaged(site, sums, count, tag)

    def run_integer(self, site: Site, call: MeanCall) -> Any:
        """Call ``linger::mean``."""
        if site.fixed_point:
            return self._scaled.run_integer(site, call)
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None:
            return NotImplemented
        codes = integer_mean(
            integer_codes(x),
            call.dim,
            call.keepdim,
            float(tag.step),
            tag.bits,
            site.rounding,
            site.platform_name,
        )
        return with_tag(codes, tag.at(site.key))


register(MeanOp("mean"))
