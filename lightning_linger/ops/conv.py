"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.grid import AFFINE_CODE_BITS
from lightning_linger.core.integer import (
    integer_op,
    is_power_of_two,
    multiplier,
    payload_dtype,
    rescale,
    rescale_fixed_point,
)
from lightning_linger.core.platform import arithmetic_of, fixed_point_of
from lightning_linger.core.registry import register
from lightning_linger.core.sites import Site
from lightning_linger.ops.arguments import to_tuple
from lightning_linger.ops.prepared import Prepared
from lightning_linger.ops.results import IntegerResult
from lightning_linger.ops.weighted import WeightedOp

_CONVOLUTIONS: dict[tuple[bool, int], Any] = {
    (False, 1): F.conv1d,
    (False, 2): F.conv2d,
    (False, 3): F.conv3d,
    (True, 1): F.conv_transpose1d,
    (True, 2): F.conv_transpose2d,
    (True, 3): F.conv_transpose3d,
}


class ConvCall(NamedTuple):
    """Bound arguments; every geometry argument has one entry per spatial dimension."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...]
    uneven_padding: bool = False


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Tensor:
    """Run the convolution of the right dimension and direction."""
    function = _CONVOLUTIONS[transposed, len(stride)]
    out: Tensor
    if transposed:
        out = function(x, weight, bias, stride, padding, output_padding, groups, dilation)
    else:
        out = function(x, weight, bias, stride, padding, dilation, groups)
    return out


@integer_op("linger::conv")
def integer_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    scale_x: float,
    scale_w: Sequence[float],
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
    exact_in_float32: bool,
) -> Tensor:
    """Convolve codes exactly and bring the accumulator to the output scale.

    Args:
        x: ``[N, C, ...]`` codes.
        weight: Codes, in torch's layout.
        bias: ``[C_out]`` codes at ``scale_x * scale_w``, or None.
        stride: Per spatial dimension, like the other geometry arguments.
        padding: Zeros on both sides.
        dilation: Spacing of the kernel.
        groups: Number of groups.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed convolution.
        scale_x: Step of ``x``.
        scale_w: Step of the weight, one or one per output channel.
        scale_o: Step of the result; 0 returns real values in float32.
        bits_x: Width of ``x``.
        bits_w: Width of the weight.
        bits_o: Width of the result.
        low: Smallest code of the result.
        high: Largest code of the result.
        rounding: Rounding rule.
        platform: Name of the target.
        exact_in_float32: Whether no accumulator can reach 2^24; else float64 accumulates.
    """
    geometry: tuple[Any, ...] = (stride, padding, dilation, groups, transposed, output_padding)
    shift = exact_shift(scale_x, scale_w, scale_o, rounding) if exact_in_float32 else None
    if shift is not None:
        channels = weight.shape[1] * groups if transposed else weight.shape[0]
        offset = storage_offset(bits_o, low)
        parameters = in_codes(weight, bias, shift, channels, offset)
        return stored(convolve(x.float(), *parameters, *geometry), low, high, bits_o, offset)
    dtype = torch.float32 if exact_in_float32 else torch.float64
    bias = None if bias is None else bias.to(dtype)
    acc = convolve(x.to(dtype), weight.to(dtype), bias, *geometry)
    return finish_accumulator(
        acc,
        scale_x,
        scale_w,
        scale_o,
        bits_o,
        low,
        high,
        rounding,
        platform,
        len(stride),
        is_wide(bits_x),
    )


def is_wide(bits_x: int) -> bool:
    """Whether codes have more bits than 8-bit ones without their zero point."""
    return bits_x > AFFINE_CODE_BITS


def in_one_product(
    scale_x: float, scale_w: Sequence[float], scale_o: float, platform: str
) -> tuple[float, Sequence[float]]:
    """Return the steps of operands as TFLite's matrix products take them.

    With one step per tensor they multiply in float32, where convolutions multiply in float64.
    """
    if len(scale_w) != 1 or scale_o == 0.0 or fixed_point_of(platform) is None:
        return scale_x, scale_w
    return float(np.float32(scale_x) * np.float32(scale_w[0])), [1.0]


def exact_shift(
    scale_x: float, scale_w: Sequence[float], scale_o: float, rounding: str
) -> float | None:
    """Return the power of two that brings the accumulator to the output scale, rounding half up.

    None where the multiplier is not one power of two, or rounding is another one.
    """
    if rounding != "half_up" or scale_o == 0.0 or len(scale_w) != 1:
        return None
    ratio = scale_x * scale_w[0] / scale_o
    return ratio if is_power_of_two(ratio) else None


def storage_offset(bits: int, low: int) -> int:
    """Return what makes every 8-bit code non-negative, where truncating is rounding down."""
    return 128 if bits == 8 and low < 0 else 0


def stored(codes: Tensor, low: int, high: int, bits: int, offset: int) -> Tensor:
    """Bring the output of a layer in codes, one half and an offset added, to its payload."""
    if offset:
        shifted = codes.clamp_(low + offset, high + offset).to(torch.uint8)
        return shifted.bitwise_xor_(offset).view(torch.int8)
    if low >= 0:
        return codes.clamp_(low, high).to(payload_dtype(bits))
    return codes.floor_().clamp_(low, high).to(payload_dtype(bits))


def in_codes(
    weight: Tensor, bias: Tensor | None, shift: float, channels: int, offset: int
) -> tuple[Tensor, Tensor]:
    """Return weight and bias with which a layer gives codes plus one half plus an offset.

    A power of two changes no mantissa, so this is as exact in float32 as shifting the accumulator,
    and saves two passes over it.
    """
    half = weight.new_full((channels,), 0.5 + offset, dtype=torch.float32)
    return weight.float() * shift, half if bias is None else bias.float() * shift + half


def finish_accumulator(
    acc: Tensor,
    scale_x: float,
    scale_w: Sequence[float],
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
    trailing: int,
    wide: bool = False,
) -> Tensor:
    """Bring an accumulator to the output scale, channels standing before ``trailing`` dims.

    ``wide`` says that operands have 16 bits, which matters in fixed point.
    """
    if scale_o == 0.0:
        return acc.float() * _ratio(scale_x, scale_w, 1.0, trailing, acc)
    engine = fixed_point_of(platform)
    if engine is not None and bits_o <= 16:
        ratios = [scale_x * scale / scale_o for scale in scale_w]
        codes = rescale_fixed_point(acc, ratios, engine, trailing, wide)
        return codes.clamp_(low, high).to(payload_dtype(bits_o))
    ratio = _ratio(scale_x, scale_w, scale_o, trailing, acc)
    arithmetic = arithmetic_of(platform)
    if arithmetic is not None and arithmetic.rescale == "multiply" and bits_o <= 16:
        # An engine that multiplies brings its accumulator to float32 first (onnxruntime); those
        # that shift keep every bit. It shows beyond 2^24 only.
        acc = acc.float()
    return rescale(acc, ratio, low, high, rounding).to(payload_dtype(bits_o))


def _ratio(
    scale_x: float, scale_w: Sequence[float], scale_o: float, trailing: int, like: Tensor
) -> float | Tensor:
    ratios = multiplier(scale_x, scale_w, scale_o)
    if len(scale_w) == 1:
        return ratios.item()
    return ratios.to(like.device).view(-1, *([1] * trailing))


@integer_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    scale_x: float,
    scale_w: Sequence[float],
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    *_: object,
) -> Tensor:
    shape = convolve(
        x.float(),
        weight.float(),
        None,
        stride,
        padding,
        dilation,
        groups,
        transposed,
        output_padding,
    ).shape
    dtype = torch.float32 if scale_o == 0.0 else payload_dtype(bits_o)
    return x.new_empty(shape, dtype=dtype)


class ConvOp(WeightedOp):
    """``conv1d`` to ``conv_transpose3d``; dimension and direction are parameters.

    Args:
        kind: Canonical op name.
        dims: Number of spatial dimensions.
        transposed: Direction.
    """

    def __init__(self, kind: str, dims: int, transposed: bool) -> None:
        super().__init__(kind)
        self.dims = dims
        self.transposed = transposed
        self.groups_weights = not transposed
        self.channel_dim = -1 - dims

    def bind(self, *args: Any, **kwargs: Any) -> ConvCall:
        """Bind the arguments of ``F.conv*d`` or ``F.conv_transpose*d``."""
        return (self._bind_transposed if self.transposed else self._bind_forward)(*args, **kwargs)

    def _bind_forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> ConvCall:
        spread = to_tuple(dilation, self.dims)
        uneven = False
        if isinstance(padding, str):
            kernel = tuple(weight.shape[2:])
            reach = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
            total = reach if padding == "same" else [0] * self.dims
            uneven = any(t % 2 for t in total)
            padding = tuple(t // 2 for t in total)
        return ConvCall(
            input,
            weight,
            bias,
            to_tuple(stride, self.dims),
            to_tuple(padding, self.dims),
            spread,
            groups,
            (0,) * self.dims,
            uneven,
        )

    def _bind_transposed(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> ConvCall:
        return ConvCall(
            input,
            weight,
            bias,
            to_tuple(stride, self.dims),
            to_tuple(padding, self.dims),
            to_tuple(dilation, self.dims),
            groups,
            to_tuple(output_padding, self.dims),
        )

    def obstacle(self, call: ConvCall) -> str | None:
        """Padding "same" with an even kernel pads unevenly."""
        if call.uneven_padding:
            return "padding='same' with an even kernel pads one side more; use F.pad and padding=0"
        return None

    def apply(self, call: ConvCall, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve."""
        return convolve(
            x,
            weight,
            bias,
            call.stride,
            call.padding,
            call.dilation,
            call.groups,
            self.transposed,
            call.output_padding,
        )

    def per_channel(self, call: ConvCall, values: Tensor) -> Tensor:
        """Output channels are dim 0, or dim 1 within each group of a transposed convolution."""
        ones = [1] * self.dims
        if not self.transposed:
            return values.view(-1, 1, *ones)
        per_group_in = call.weight.shape[0] // call.groups
        grouped = values.view(call.groups, 1, -1).expand(-1, per_group_in, -1)
        return grouped.reshape(call.weight.shape[0], -1, *ones)

    def weight_channels(self, call: ConvCall) -> int:
        """Dim 0, or dim 1 within each group of a transposed convolution."""
        return call.weight.shape[1] * call.groups if self.transposed else call.weight.shape[0]

    def channel_rows(self, call: ConvCall, weight: Tensor) -> Tensor:
        """Flatten everything but the output channel."""
        if self.transposed:
            weight = weight.view(call.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
        return weight.flatten(1)

    def along_output(self, call: ConvCall, values: Tensor) -> Tensor:
        """The channel stands before the spatial dimensions, with a batch or without."""
        return values.view(-1, *[1] * self.dims)

    def integer_kernel(
        self, site: Site, call: ConvCall, x: Tensor, prepared: Prepared, result: IntegerResult
    ) -> Tensor:
        """Call ``linger::conv``."""
        return integer_conv(
            x,
            prepared.codes,
            prepared.bias_codes,
            call.stride,
            call.padding,
            call.dilation,
            call.groups,
            self.transposed,
            call.output_padding,
            prepared.scale_x,
            prepared.steps,
            result.scale,
            prepared.bits_x,
            site.weight_code_bits,
            result.bits,
            result.low,
            result.high,
            site.rounding,
            site.platform_name,
            prepared.exact_in_float32,
        )


for _dims in (1, 2, 3):
    register(ConvOp(f"conv{_dims}d", _dims, transposed=False))
    register(ConvOp(f"conv_transpose{_dims}d", _dims, transposed=True))
