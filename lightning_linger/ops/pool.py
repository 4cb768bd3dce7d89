"""Pooling: maxima keep codes, averages divide a sum of codes and keep the scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.integer import code_limits, integer_op, payload_dtype, rescale
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.platform import fixed_point_of
from lightning_linger.core.registry import Op, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of, with_tag
from lightning_linger.ops.arguments import pool_tuple, to_tuple
from lightning_linger.ops.averages import averaged, divide, stored_average, summable

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


# --- exact sums ---------------------------------------------------------------------------


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
    count = window_counts(
        x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor or None
    )
    if fixed_point_of(platform) is not None:
        return stored_average(sums.long(), count, bits, zero_point).to(payload_dtype(bits))
    if scale_x != scale_o:
        sums = rescale(sums, scale_x / scale_o, -(2**52), 2**52, rounding)
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
    *_: object,
) -> Tensor:
    shape = window_sums(x.float(), kernel_size, stride, padding, ceil_mode).shape
    return x.new_empty(shape, dtype=payload_dtype(bits))


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
        sums = window_sums(summable(x, tag), *geometry)
        return averaged(site, sums, count, tag)

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
        return with_tag(codes, tag.at(site.key))


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
        return with_tag(pooled, tag.at(site.key))

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
        return with_tag(codes, tag.at(site.key))


for _dims in (1, 2, 3):
    register(AvgPoolOp(f"avg_pool{_dims}d", _dims, adaptive=False))
    register(AvgPoolOp(f"adaptive_avg_pool{_dims}d", _dims, adaptive=True))
    _kind = f"max_pool{_dims}d"
    register(MaxPoolOp(_kind, _dims), _kind, f"{_kind}_with_indices")
