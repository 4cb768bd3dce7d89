"""Pools and means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import EXACT_FLOAT32, code_limits
from lightning_linger.export.dialect import Call, shape_of
from lightning_linger.export.qdq.writer import (
    Write,
    Writer,
    batched,
    batched_shape,
    scale_of,
    width_of,
)
from lightning_linger.ops.pool import window_counts


def _geometry(call: Call, spatial: Sequence[int], pooled: Sequence[int]) -> dict[str, Any]:
    """Return the attributes of a pool whose ceil mode is spelled out as padding at the end."""
    dilation = call.arguments.get("dilation") or [1] * len(call.kernel_size)
    ends = [
        max(pad, (out - 1) * stride + spread * (kernel - 1) + 1 - size - pad)
        for out, size, stride, pad, kernel, spread in zip(
            pooled, spatial, call.stride, call.padding, call.kernel_size, dilation, strict=True
        )
    ]
    return {
        "kernel_shape": list(call.kernel_size),
        "strides": list(call.stride),
        "pads": [*call.padding, *ends],
    }


def require_countable(call: Call, count: int, bits: int) -> None:
    """Refuse a sum of codes that float32 may not hold."""
    if count * 2 ** (bits - 1) > EXACT_FLOAT32:
        msg = (
            f"`{call.site}`: a sum of {count} codes of {bits} bits may exceed 2^24, the whole "
            "numbers that float32 holds. Use fewer activation_bits, or average in two steps."
        )
        raise UnsupportedError(msg)


def _avg_pool(w: Writer) -> ir.Value:
    call = w.call
    dims = len(call.kernel_size)
    if call.scale_x != call.scale_o:
        msg = f"internal: `{call.name}` changes the scale of an average."
        raise RuntimeError(msg)
    area = math.prod(call.kernel_size)
    require_countable(call, area, call.bits)
    x = batched(w, call.x, dims)
    shape, pooled = shape_of(x), batched_shape(call.result, dims)
    spatial = shape[2:]
    attributes = _geometry(call, spatial, pooled[2:])
    codes = w.real(x, 1.0, "x")
    plain = attributes["pads"] == [*call.padding, *call.padding] and not call.divisor
    whole = list(call.kernel_size) == spatial and not any(call.padding)
    if plain and not whole:
        attributes["count_include_pad"] = int(call.count_include_pad)
        value = w.node("AveragePool", [codes], pooled, attributes)
        return w.reshape(_average(w, value, call.bits), shape_of(call.result), "unbatched")
    if whole:
        # onnxruntime's fused average over a whole map multiplies by 1 / count instead of dividing.
        value = total(w, codes, range(2, dims + 2), pooled, keepdims=True)
    else:
        ones = w.number(np.ones((shape[1], 1, *call.kernel_size)), "ones")
        attributes["group"] = shape[1]
        value = w.node("Conv", [codes, ones], pooled, attributes)
    count = window_counts(
        torch.empty(shape),
        call.kernel_size,
        call.stride,
        call.padding,
        call.ceil_mode,
        call.count_include_pad,
        call.divisor or None,
    )
    value = w.node("Div", [value, w.number(count, "count")], pooled, suffix="divide")
    return w.reshape(_average(w, value, call.bits), shape_of(call.result), "unbatched")


def _average(w: Writer, value: ir.Value, bits: int) -> ir.Value:
    return w.result(value, 1.0, bits, *code_limits(bits))


def total(
    w: Writer, codes: ir.Value, dims: Sequence[int], shape: Sequence[int], keepdims: bool
) -> ir.Value:
    """Add up codes over dimensions."""
    axes = w.constant(np.array(dims, np.int64), "axes")
    return w.node("ReduceSum", [codes, axes], shape, {"keepdims": int(keepdims)})


def _mean(w: Writer) -> ir.Value:
    call = w.call
    sizes, shape = shape_of(call.x), shape_of(call.result)
    dims = [d % len(sizes) for d in call.dim]
    count = math.prod(sizes[d] for d in dims)
    require_countable(call, count, call.bits)
    summed = total(w, w.real(call.x, 1.0, "x"), dims, shape, call.keepdim)
    value = w.node("Div", [summed, w.number(count, "count")], shape, suffix="divide")
    return _average(w, value, call.bits)


def _max_pool(w: Writer) -> ir.Value:
    call = w.call
    dims = len(call.kernel_size)
    x = batched(w, call.x, dims)
    pooled = batched_shape(call.result, dims)
    attributes = _geometry(call, shape_of(x)[2:], pooled[2:]) | {"dilations": list(call.dilation)}
    scale, bits = scale_of(x), width_of(x)
    value = w.node("MaxPool", [w.real(x, scale, "x")], pooled, attributes)
    codes = w.result(value, scale, bits, *code_limits(bits))
    return w.reshape(codes, shape_of(call.result), "unbatched")


TABLE: dict[str, Write] = {
    "avg_pool": _avg_pool,
    "mean": _mean,
    "max_pool": _max_pool,
}
