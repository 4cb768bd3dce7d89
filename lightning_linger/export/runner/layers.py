"""Layers: convolutions, matrix products and batch norms of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import EXACT_FLOAT32, code_limits
from lightning_linger.export.runner.step import (
    ROUNDING,
    Array,
    Kernel,
    Step,
    check_padded,
    padded,
    refuse_huge,
    split_pads,
    to_array,
    to_tensor,
)
from lightning_linger.ops.conv import integer_conv
from lightning_linger.ops.linear import integer_linear
from lightning_linger.ops.norm import integer_scale_shift


def _is_exact(weight: Tensor, bias: Tensor | None, bits_x: int, ratio: float) -> bool:
    """Whether no accumulator, with what is added to store its code, can reach 2^24."""
    bound = float(weight.double().abs().flatten(1).sum(1).max()) * 2.0 ** (bits_x - 1)
    if bias is not None:
        bound += float(bias.double().abs().max())
    return bound + 128.5 / min(ratio, 1.0) < EXACT_FLOAT32


def layer_arguments(step: Step, dims_after_channel: int) -> dict[str, Any]:
    """Return the arguments that all layers share."""
    weight = to_tensor(step.array(1))
    bias = (
        to_tensor(step.inputs[2]) if len(step.inputs) > 2 and step.inputs[2] is not None else None
    )
    step_x, step_w, step_o = (step.step(name) for name in ("scale_x", "scale_w", "scale_o"))
    bits_x, bits_o = step.bits("x_bits"), step.bits("o_bits")
    low, high = code_limits(bits_o)
    rows = weight if dims_after_channel == 0 else weight.reshape(weight.shape[0], -1)
    return {
        "weight": weight,
        "bias": bias,
        "scale_x": step_x,
        "scale_w": [step_w],
        "scale_o": step_o,
        "bits_x": bits_x,
        "bits_w": step.bits("w_bits"),
        "bits_o": bits_o,
        "low": low,
        "high": high,
        "rounding": ROUNDING,
        "platform": step.platform,
        "exact_in_float32": bits_o <= 16
        and _is_exact(rows, bias, bits_x, step_x * step_w / step_o),
    }


def _conv(dims: int, transposed: bool) -> Callable[[Step], Array]:
    def run(step: Step) -> Array:
        x = step.codes(0)
        strides, ones = step.sizes("strides", dims, 1), [1] * dims
        dilations = step.sizes("dilations", dims, 1, ones)
        before, after = split_pads(step.sizes("pads", 2 * dims))
        extra = step.sizes("output_padding", dims, 0, [0] * dims)
        check_padded(step, x, before, after)
        _check_kernel(step, dims)
        arguments = layer_arguments(step, dims)
        if transposed:
            # Its rows are the input channels.
            arguments["exact_in_float32"] = False
            if before != after:
                msg = f"{step.label}: uneven pads of a transposed convolution are not supported."
                raise UnsupportedError(msg)
        elif before != after:
            x, before = padded(step, x, before, after, 0), [0] * dims
        if transposed:
            spread = zip(
                x.shape[2:], strides, dilations, step.get("kernel_shape"), extra, strict=True
            )
            sizes = ((n - 1) * stride + d * (k - 1) + e + 1 for n, stride, d, k, e in spread)
            refuse_huge(step.label, x.shape[0] * arguments["weight"].shape[1] * math.prod(sizes))
        y = integer_conv(
            x=x,
            stride=strides,
            padding=before,
            dilation=dilations,
            groups=int(step.attributes.get("group", 1)),
            transposed=transposed,
            output_padding=extra,
            **arguments,
        )
        return to_array(y)

    return run


def _check_kernel(step: Step, dims: int) -> None:
    """Refuse a kernel that is not that of the weight: the packer does, too."""
    shape, kernel = list(step.array(1).shape), step.sizes("kernel_shape", dims, 1)
    if len(shape) != dims + 2 or shape[2:] != kernel:
        msg = f"{step.label}: kernel_shape is {kernel}, and the weight's shape {shape}."
        raise UnsupportedError(msg)


def _linear(step: Step) -> Array:
    return to_array(integer_linear(x=step.codes(0), **layer_arguments(step, 0)))


def _batch_norm(step: Step) -> Array:
    arguments = layer_arguments(step, 1)
    if arguments["bias"] is None:
        arguments["bias"] = torch.zeros_like(arguments["weight"], dtype=torch.int32)
    return to_array(integer_scale_shift(x=step.codes(0), **arguments))


KERNELS: dict[str, Kernel] = {
    **{f"QConv{dims}d": _conv(dims, transposed=False) for dims in (1, 2)},
    **{f"QConvTranspose{dims}d": _conv(dims, transposed=True) for dims in (1, 2)},
    "QLinear": _linear,
    **{f"QBatchNorm{dims}d": _batch_norm for dims in (1, 2)},
}
