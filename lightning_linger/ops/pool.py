"""Pooling: maxima keep codes, averages divide a sum of codes and keep the scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.fake_quantize import Bound, straight_through
from lightning_linger.core.integer import code_limits, integer_op, payload_dtype, rescale
from lightning_linger.core.payload import integer_codes, step_of
from lightning_linger.core.platform import Platform, fixed_point_of
from lightning_linger.core.quantizer import clamped
from lightning_linger.core.registry import Op, OutputScale, register
from lightning_linger.core.rounding import ROUNDINGS
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, storable_codes, tag_of, with_tag
from lightning_linger.ops import tflite
from lightning_linger.ops.arguments import pool_tuple, to_tuple
from lightning_linger.ops.kernel import KernelOp, Target

_AVERAGES: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMA: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class PoolCall(NamedTuple):
    """Bound arguments of a pool; geometry has one entry per spatial dimension."""

    input: Tensor
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...] = ()
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None
    unsupported: str | None = None


class MeanCall(NamedTuple):
    """Bound arguments of ``torch.mean``."""

    input: Tensor
    dim: tuple[int, ...]
    keepdim: bool = False
    dtype: torch.dtype | None = None


# --- exact sums and divisions ---------------------------------------------------------------


def window_sums(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Return the sums over pooling windows, zeros in the padding."""
    dims = len(kernel_size)
    if dims == 1:  # torch has no `divisor_override` in one dimension
        sums = window_sums(
            x.unsqueeze(-1), (*kernel_size, 1), (*stride, 1), (*padding, 0), ceil_mode
        )
        return sums.squeeze(-1)
    total: Tensor = _AVERAGES[dims](
        x, kernel_size, stride, padding, ceil_mode, True, divisor_override=1
    )
    return total


def window_counts(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> int | Tensor:
    """Return by how much each window's sum is divided: one number, or one per window."""
    area = math.prod(tuple(kernel_size))
    if divisor is not None:
        return divisor
    if not ceil_mode and (count_include_pad or not any(padding)):
        return area
    dims = len(kernel_size)
    ones = torch.ones((1, 1, *x.shape[-dims:]), dtype=torch.float64, device=x.device)
    averages = _AVERAGES[dims](ones, kernel_size, stride, padding, ceil_mode, count_include_pad)
    sums = window_sums(ones, kernel_size, stride, padding, ceil_mode)
    return torch.round(sums / averages)


def divide(sums: Tensor, count: int | Tensor, low: int, high: int, rounding: str) -> Tensor:
    """Return ``clamp(round(sums / count))`` of whole numbers, exactly.

    The quotient of a half-integer tie by ``count`` differs from every other quotient by at least
    ``1 / (2 * count)``, which float64 resolves for all sums below 2^50.
    """
    if rounding == "half_up":
        quotient = torch.floor((sums.double() + 0.5 * count) / count)
    else:
        quotient = ROUNDINGS[rounding](sums.double() / count)
    return quotient.clamp_(low, high)


# --- integer kernels ------------------------------------------------------------------------


@integer_op("linger::avg_pool")
def integer_avg_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
    scale_x: float,
    scale_o: float,
    bits: int,
    rounding: str,
    platform: str,
    zero_point: int | None = None,
) -> Tensor:
    """Average codes over windows, rounding once.

    Args:
        x: Codes ``[N, C, ...]``.
        kernel_size: Per spatial dimension, like stride and padding.
        stride: See torch.
        padding: See torch.
        ceil_mode: See torch.
        count_include_pad: See torch.
        divisor: Divides instead of the window's count; 0 for the count.
        scale_x: Step of ``x``.
        scale_o: Step of the result: that of ``x``, or coarser by a power of two, in which case the
            sum is rounded at the new scale first and then divided, as LUNA's shift does.
        bits: Width of ``x`` and of the result.
        rounding: Rounding rule.
        platform: Name of the target. Where it works in fixed point, TFLite's kernel runs, which
            divides sums of stored codes.
        zero_point: What is added to a code to store it, None on a symmetric grid.
    """
    sums = window_sums(x.double(), kernel_size, stride, padding, ceil_mode)
    if fixed_point_of(platform) is not None:
        count = _whole(
            window_counts(
                x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor or None
            )
        )
        return _stored_average(sums.long(), count, bits, zero_point).to(payload_dtype(bits))
    if scale_x != scale_o:
        sums = rescale(sums, scale_x / scale_o, -(2**52), 2**52, rounding)
    count = window_counts(
        x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor or None
    )
    return divide(sums, count, *code_limits(bits), rounding).to(payload_dtype(bits))


@integer_avg_pool.register_fake
def _(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
    scale_x: float,
    scale_o: float,
    bits: int,
    rounding: str,
    platform: str,
    zero_point: int | None = None,
) -> Tensor:
    shape = window_sums(x.float(), kernel_size, stride, padding, ceil_mode).shape
    return x.new_empty(shape, dtype=payload_dtype(bits))


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
    count = _count(x, dim)
    return divide(sums, count, *code_limits(bits), rounding).to(payload_dtype(bits))


@integer_mean.register_fake
def _(
    x: Tensor,
    dim: Sequence[int],
    keepdim: bool,
    scale: float,
    bits: int,
    rounding: str,
    platform: str,
) -> Tensor:
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
        _count(x, dim),
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
    low: int,
    high: int,
    platform: str,
) -> Tensor:
    return x.float().sum(dim=list(dim), keepdim=keepdim).to(payload_dtype(bits_o))


@integer_op("linger::max_pool")
def integer_max_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    platform: str,
) -> Tensor:
    """Take the maximum of codes over windows; padding never wins."""
    pool = _MAXIMA[len(kernel_size)]
    dtype = torch.float32 if x.dtype != torch.int32 else torch.float64
    largest: Tensor = pool(x.to(dtype), kernel_size, stride, padding, dilation, ceil_mode)
    return largest.to(x.dtype)


@integer_max_pool.register_fake
def _(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    platform: str,
) -> Tensor:
    pool = _MAXIMA[len(kernel_size)]
    shape = pool(x.float(), kernel_size, stride, padding, dilation, ceil_mode).shape
    return x.new_empty(shape)


# --- ops ------------------------------------------------------------------------------------


class AvgPoolOp(Op):
    """``avg_pool*d`` and ``adaptive_avg_pool*d`` whose windows are all alike.

    Args:
        kind: Canonical op name.
        dims: Number of spatial dimensions.
        adaptive: Whether the call gives the output size instead of the window.
    """

    output_scale = "inputs"

    def __init__(self, kind: str, dims: int, adaptive: bool) -> None:
        super().__init__(kind)
        self.dims = dims
        self.adaptive = adaptive

    def bind(self, *args: Any, **kwargs: Any) -> PoolCall:
        """Bind the arguments of either function."""
        return (self._bind_adaptive if self.adaptive else self._bind_windows)(*args, **kwargs)

    def _bind_windows(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> PoolCall:
        kernel = to_tuple(kernel_size, self.dims)
        return PoolCall(
            input,
            kernel,
            pool_tuple(stride, kernel),
            to_tuple(padding, self.dims),
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
            divisor=divisor_override,
        )

    def _bind_adaptive(self, input: Tensor, output_size: Any) -> PoolCall:
        if isinstance(output_size, int):
            output_size = (output_size,) * self.dims
        sizes = tuple(int(size) for size in input.shape[-self.dims :])
        wanted = tuple(s if o is None else o for s, o in zip(sizes, output_size, strict=True))
        kernel = tuple(s // o for s, o in zip(sizes, wanted, strict=True))
        uneven = None
        if any(s % o for s, o in zip(sizes, wanted, strict=True)):
            uneven = f"windows of different sizes ({sizes} pooled to {wanted}) have no integer form"
        return PoolCall(input, kernel, kernel, (0,) * self.dims, unsupported=uneven)

    def obstacle(self, call: PoolCall) -> str | None:
        """Adaptive windows may differ in size."""
        return call.unsupported

    def run_fake(self, site: Site, call: PoolCall) -> Any:
        """Sum on the grid, divide and round."""
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None or call.unsupported is not None:
            return NotImplemented
        geometry = (call.kernel_size, call.stride, call.padding, call.ceil_mode)
        count = window_counts(x, *geometry, call.count_include_pad, call.divisor)
        sums = window_sums(_summable(x, tag), *geometry)
        return _averaged(site, sums, count, tag)

    def run_integer(self, site: Site, call: PoolCall) -> Any:
        """Call ``linger::avg_pool``."""
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None or call.unsupported is not None:
            return NotImplemented
        codes = integer_avg_pool(
            integer_codes(x),
            call.kernel_size,
            call.stride,
            call.padding,
            call.ceil_mode,
            call.count_include_pad,
            call.divisor or 0,
            float(tag.step),
            float(tag.step),
            tag.bits,
            site.rounding,
            site.platform_name,
            *([int(tag.zero_point)] if tag.zero_point is not None else []),
        )
        return with_tag(codes, _own(tag, site))


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
        count = _count(x, call.dim)
        sums = _summable(x, tag).sum(dim=call.dim, keepdim=call.keepdim)
        return _averaged(site, sums, count, tag)

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
        return with_tag(codes, _own(tag, site))


class MaxPoolOp(Op):
    """``max_pool*d``.

    Args:
        kind: Canonical op name.
        dims: Number of spatial dimensions.
    """

    output_scale = "inputs"

    def __init__(self, kind: str, dims: int) -> None:
        super().__init__(kind)
        self.dims = dims

    def bind(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> PoolCall:
        """Bind the arguments of ``F.max_pool*d``."""
        kernel = to_tuple(kernel_size, self.dims)
        return PoolCall(
            input,
            kernel,
            pool_tuple(stride, kernel),
            to_tuple(padding, self.dims),
            to_tuple(dilation, self.dims),
            ceil_mode,
            unsupported="indices have no integer form" if return_indices else None,
        )

    def obstacle(self, call: PoolCall) -> str | None:
        """Indices are not a quantized value."""
        return call.unsupported

    def run_fake(self, site: Site, call: PoolCall) -> Any:
        """Pool; maxima of grid values are on the grid."""
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None:
            return NotImplemented
        pooled = _MAXIMA[self.dims](
            x, call.kernel_size, call.stride, call.padding, call.dilation, call.ceil_mode
        )
        return with_tag(pooled, _own(tag, site))

    def run_integer(self, site: Site, call: PoolCall) -> Any:
        """Call ``linger::max_pool``."""
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None:
            return NotImplemented
        codes = integer_max_pool(
            integer_codes(x),
            call.kernel_size,
            call.stride,
            call.padding,
            call.dilation,
            call.ceil_mode,
            site.platform_name,
        )
        return with_tag(codes, _own(tag, site))


def _stored_average(
    sums: Tensor, count: int | Tensor, bits: int, zero_point: Bound | None
) -> Tensor:
    """Return what TFLite's kernel stores, without the zero point."""
    average = tflite.average(sums, count, 0 if zero_point is None else zero_point)
    return clamped(average, *storable_codes(bits, zero_point))


def _whole(count: int | Tensor) -> int | Tensor:
    return count.long() if isinstance(count, Tensor) else count


def _count(x: Tensor, dims: Sequence[int]) -> int:
    count = 1
    for d in dims:  # a generator would stop a graph capture
        count *= x.shape[d]
    return count


def _summable(x: Tensor, tag: Tag) -> Tensor:
    # 2^17 codes of 8 bits fit a float32 sum, 512 of 16 bits do not always.
    return x if tag.bits <= 8 else x.double()


def _averaged(site: Site, sums: Tensor, count: int | Tensor, tag: Tag) -> Tensor:
    """Divide sums of grid values and round to the same grid, straight-through."""
    average = sums / count
    with torch.no_grad():
        codes = torch.round(sums.double() / tag.step)
        if site.fixed_point:
            whole = _whole(count)
            divided = _stored_average(codes.long(), whole, tag.bits, tag.zero_point).double()
        else:
            divided = divide(codes, count, *code_limits(tag.bits), site.rounding)
        rounded = divided * tag.step
    value = straight_through(rounded.to(average.dtype), average).to(tag.dtype)
    return with_tag(value, _own(tag, site))


def _own(tag: Tag, site: Site) -> Tag:
    return dataclasses.replace(tag, site=site.key)


for _dims in (1, 2, 3):
    register(AvgPoolOp(f"avg_pool{_dims}d", _dims, adaptive=False))
    register(AvgPoolOp(f"adaptive_avg_pool{_dims}d", _dims, adaptive=True))
    _kind = f"max_pool{_dims}d"
    register(MaxPoolOp(_kind, _dims), _kind, f"{_kind}_with_indices")
register(MeanOp("mean"))
