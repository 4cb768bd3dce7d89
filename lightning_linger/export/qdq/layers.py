"""Layers: convolutions, matrix products and batch norms of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import multiplier
from lightning_linger.export.dialect import Call, dtype_of, shape_of
from lightning_linger.export.qdq.writer import (
    FLOAT,
    INT32,
    Write,
    Writer,
    array_of,
    batched,
    batched_shape,
    width_of,
)


@dataclass(frozen=True)
class Layer:
    """A convolution or a matrix product.

    Args:
        op_type: ONNX operator on real values.
        integer_op: The same on 8-bit codes, with an int32 result; None if there is none.
        x: Stored codes.
        weight: Codes in ONNX layout.
        axis: The weight's axis of output channels.
        bias: Codes, or None.
        channel_shape: ``[C]`` values viewed so, broadcast to the result.
        shape: Of the result.
        attributes: Of the operator.
    """

    op_type: str
    integer_op: str | None
    x: ir.Value
    weight: NDArray[Any]
    axis: int
    bias: NDArray[Any] | None
    channel_shape: list[int]
    shape: list[int]
    attributes: dict[str, Any]


def run_layer(w: Writer, layer: Layer) -> ir.Value:
    """Write a layer in the form whose results are those of the integer kernel."""
    call = w.call
    narrow = width_of(layer.x) == 8 and layer.weight.dtype == np.int8
    quantized = call.scale_o != 0.0
    has_kernel = layer.op_type in ("Conv", "Gemm", "MatMul")
    if narrow and has_kernel and quantized and call.bits_o <= 8:
        value = _real_layer(w, layer, call.scale_x, np.asarray(call.scale_w, np.float32))
        return w.result(value, call.scale_o, call.bits_o, call.low, call.high)
    if narrow and layer.op_type == "Gemm" and not quantized:
        # onnxruntime's Gemm has a float output of its own: float32(acc) * (scale_x * scale_w).
        return _real_layer(w, layer, call.scale_x, np.asarray(call.scale_w, np.float32))
    if narrow and layer.integer_op is not None:
        acc = _integer_layer(w, layer, layer.integer_op)
    else:
        acc = _code_layer(w, layer)
    if quantized and call.bits_o == 32:
        if dtype_of(acc) == INT32:
            return acc
        return w.node("Cast", [acc], layer.shape, {"to": INT32}, "codes", INT32)
    if dtype_of(acc) == INT32:
        acc = w.node("Cast", [acc], layer.shape, {"to": FLOAT}, "accumulator")
    ratios = multiplier(call.scale_x, call.scale_w, call.scale_o if quantized else 1.0).numpy()
    shape = layer.channel_shape if len(ratios) > 1 else []
    factor = w.number(ratios.reshape(shape), "multiplier")
    value = w.node("Mul", [acc, factor], layer.shape, suffix="rescale")
    if not quantized:
        return value
    return w.result(value, 1.0, call.bits_o, call.low, call.high, fused=False)


def _real_layer(w: Writer, layer: Layer, scale_x: float, scale_w: NDArray[np.float32]) -> ir.Value:
    """Add the operator on real values."""
    scale_w = scale_w if scale_w.size > 1 else scale_w.reshape(())
    weight = w.parameter(layer.weight, scale_w, "weight", layer.axis)
    inputs = [w.real(layer.x, scale_x, "x"), weight]
    bias = None
    if layer.bias is not None:
        bias = w.parameter(layer.bias, np.float32(scale_x) * scale_w, "bias")
    if bias is not None and layer.op_type != "MatMul":
        inputs.append(bias)
    value = w.node(layer.op_type, inputs, layer.shape, layer.attributes)
    if bias is not None and layer.op_type == "MatMul":
        value = w.node("Add", [value, bias], layer.shape, suffix="add_bias")
    return value


def _code_layer(w: Writer, layer: Layer) -> ir.Value:
    """Add the operator on codes, in float32."""
    if not w.call.exact_in_float32:
        msg = (
            f"`{w.call.site}`: onnxruntime has no integer kernel for this layer, and its "
            "accumulator may exceed 2^24, the whole numbers that float32 holds. Use fewer "
            "weight_bits or activation_bits, or leave it in float with "
            f"overrides={{'{w.call.site}': None}}."
        )
        raise UnsupportedError(msg)
    return _real_layer(w, layer, 1.0, np.ones((), np.float32))


def _integer_layer(w: Writer, layer: Layer, op_type: str) -> ir.Value:
    """Add the operator on codes, in int32."""
    zero = w.storage(8)
    inputs = [
        layer.x,
        w.constant(layer.weight, "weight"),
        w.constant(zero.numpy(zero.zero), "x/zero_point"),
        w.constant(np.int8(0), "weight/zero_point"),
    ]
    acc = w.node(op_type, inputs, layer.shape, layer.attributes, dtype=INT32)
    if layer.bias is None:
        return acc
    bias = w.constant(layer.bias.reshape(layer.channel_shape), "bias")
    return w.node("Add", [acc, bias], layer.shape, suffix="add_bias", dtype=INT32)


def _bias(call: Call) -> NDArray[Any] | None:
    return None if call.bias is None else array_of(call.bias)


def _conv(w: Writer) -> ir.Value:
    call = w.call
    weight, dims = array_of(call.weight), len(call.stride)
    attributes: dict[str, Any] = {
        "kernel_shape": list(weight.shape[2:]),
        "strides": list(call.stride),
        "pads": [*call.padding, *call.padding],
        "dilations": list(call.dilation),
        "group": call.groups,
    }
    if call.transposed:
        attributes["output_padding"] = list(call.output_padding)
    layer = Layer(
        op_type="ConvTranspose" if call.transposed else "Conv",
        integer_op=None if call.transposed else "ConvInteger",
        x=batched(w, call.x, dims),
        weight=weight,
        axis=0,
        bias=_bias(call),
        channel_shape=[1, -1, *[1] * dims],
        shape=batched_shape(call.result, dims),
        attributes=attributes,
    )
    return w.reshape(run_layer(w, layer), shape_of(call.result), "unbatched")


def _linear(w: Writer) -> ir.Value:
    """A Gemm on matrices; on more dimensions a MatMul, which leaves room for a bias behind it."""
    call = w.call
    weight, result = array_of(call.weight), shape_of(call.result)
    outputs, features = weight.shape
    rows = math.prod(result[:-1])
    integers = call.bits_o > 8 or width_of(call.x) != 8 or weight.dtype != np.int8
    flat = len(result) < 2 or (call.scale_o == 0.0 and not integers)
    as_matrix = not integers and (flat or len(result) == 2)
    x, shape = call.x, result
    if flat:
        x, shape = w.reshape(x, [rows, features], "rows"), [rows, outputs]
    layer = Layer(
        op_type="Gemm" if as_matrix else "MatMul",
        integer_op="MatMulInteger",
        x=x,
        weight=weight if as_matrix else np.ascontiguousarray(weight.T),
        axis=0 if as_matrix else 1,
        bias=_bias(call),
        channel_shape=[-1],
        shape=shape,
        attributes={"transB": 1} if as_matrix else {},
    )
    return w.reshape(run_layer(w, layer), result, "shape")


def _scale_shift(w: Writer) -> ir.Value:
    """A batch norm of its own: a depthwise convolution with one weight per channel."""
    call = w.call
    shape = shape_of(call.x)
    dims = max(len(shape) - 2, 1)
    spread = [*shape, *[1] * (dims + 2 - len(shape))]
    layer = Layer(
        op_type="Conv",
        integer_op="ConvInteger",
        x=w.reshape(call.x, spread, "spread"),
        weight=array_of(call.weight).reshape(-1, 1, *[1] * dims),
        axis=0,
        bias=_bias(call),
        channel_shape=[1, -1, *[1] * dims],
        shape=spread,
        attributes={"kernel_shape": [1] * dims, "group": shape[1]},
    )
    return w.reshape(run_layer(w, layer), shape, "shape")


TABLE: dict[str, Write] = {
    "conv": _conv,
    "linear": _linear,
    "scale_shift": _scale_shift,
}
