"""Linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.integer import integer_op, payload_dtype
from lightning_linger.core.registry import register
from lightning_linger.core.sites import Site
from lightning_linger.ops.conv import (
    exact_shift,
    finish_accumulator,
    in_codes,
    in_one_product,
    is_wide,
    storage_offset,
    stored,
)
from lightning_linger.ops.prepared import Prepared
from lightning_linger.ops.refused import RefusedOp
from lightning_linger.ops.results import IntegerResult
from lightning_linger.ops.weighted import WeightedOp


class LinearCall(NamedTuple):
    """Bound arguments of ``F.linear``."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None


@integer_op("linger::linear")
def integer_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """Multiply codes ``[..., K]`` by ``weight [O, K]`` exactly, then rescale to the output.

    The arguments are those of ``linger::conv`` (see :mod:`lightning_linger.ops.conv`).
    """
    shift = exact_shift(scale_x, scale_w, scale_o, rounding) if exact_in_float32 else None
    if shift is not None:
        offset = storage_offset(bits_o, low)
        parameters = in_codes(weight, bias, shift, weight.shape[0], offset)
        return stored(F.linear(x.float(), *parameters), low, high, bits_o, offset)
    dtype = torch.float32 if exact_in_float32 else torch.float64
    acc = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    scale_x, scale_w = in_one_product(scale_x, scale_w, scale_o, platform)
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
        0,
        is_wide(bits_x),
    )


@integer_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale_x: float,
    scale_w: Sequence[float],
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    *_: object,
) -> Tensor:
    dtype = torch.float32 if scale_o == 0.0 else payload_dtype(bits_o)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


class LinearOp(WeightedOp):
    """``F.linear``."""

    groups_weights = True

    def bind(self, *args: Any, **kwargs: Any) -> LinearCall:
        """Bind the arguments of ``F.linear``."""
        return LinearCall(*args, **kwargs)

    def apply(self, call: LinearCall, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply."""
        return F.linear(x, weight, bias)

    def per_channel(self, call: LinearCall, values: Tensor) -> Tensor:
        """Output channels are dim 0."""
        return values.view(-1, 1)

    def weight_channels(self, call: LinearCall) -> int:
        """Dim 0."""
        return call.weight.shape[0]

    def channel_rows(self, call: LinearCall, weight: Tensor) -> Tensor:
        """Rows are output channels already."""
        return weight

    def along_output(self, call: LinearCall, values: Tensor) -> Tensor:
        """The channel is the last dimension."""
        return values

    def integer_kernel(
        self, site: Site, call: LinearCall, x: Tensor, prepared: Prepared, result: IntegerResult
    ) -> Tensor:
        """Call ``linger::linear``."""
        return integer_linear(
            x,
            prepared.codes,
            prepared.bias_codes,
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


register(LinearOp("linear"))
register(
    RefusedOp(
        "bilinear",
        "multiplies three tensors in one call; write "
        "`(linear(x).unflatten(-1, (out_features, -1)) * y.unsqueeze(-2)).sum(-1)`",
    )
)
