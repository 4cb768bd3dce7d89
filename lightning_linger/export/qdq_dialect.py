"""The ``qdq`` dialect: float ONNX operators between QuantizeLinear and DequantizeLinear.

Codes of 8 bits travel as uint8 with zero point 128 and those of 16 bits as uint16 with 32768; the
graph is float at both ends. onnxruntime finds ``DequantizeLinear -> operator -> QuantizeLinear``
and runs its integer kernel, whose float32 arithmetic our kernels for ``onnxruntime`` repeat.

Where onnxruntime has no integer kernel it computes on real numbers, and free scales would bring in
rounding errors that no other runtime repeats. Those operators work on the *codes* instead, as if
their scale were 1: whole numbers below 2^24 are exact in float32 in any order, with and without
optimizations, and one product or quotient brings the result to its scale:

=====================================  ===========================================================
transposed convolution, 16-bit layers  operator on codes -> Mul(multiplier) -> QuantizeLinear(1)
average pools                          AveragePool on codes, scale 1 in and out
means, pools over the whole map        ReduceSum on codes -> Div(count) -> QuantizeLinear(1)
float output of a convolution          ConvInteger -> Cast -> Mul(scale_x * scale_w)
=====================================  ===========================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import EXACT_FLOAT32, code_limits, multiplier
from lightning_linger.core.sites import Site
from lightning_linger.export.dialect import (
    Builder,
    Call,
    Dialect,
    Translation,
    dtype_of,
    shape_of,
)
from lightning_linger.export.lowering import replace_value
from lightning_linger.ops.pool import window_counts

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32

# Marks a value that holds stored codes.
_STORED = "lightning_linger.stored"

_WIDTHS = {
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
    ir.DataType.INT16: 16,
    ir.DataType.UINT16: 16,
}
# The types of codes: as they are recorded and as they are stored.
_CODES = frozenset(_WIDTHS)


# --- stored codes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """How codes of one width are stored: ``stored = code + zero``."""

    bits: int
    dtype: ir.DataType
    numpy: type[np.integer[Any]]
    zero: int

    def store(self, codes: NDArray[Any]) -> NDArray[Any]:
        """Return codes as they are stored."""
        return (codes.astype(np.int64) + self.zero).astype(self.numpy)


_UNSIGNED = {
    8: Storage(8, ir.DataType.UINT8, np.uint8, 2**7),
    16: Storage(16, ir.DataType.UINT16, np.uint16, 2**15),
}
_SIGNED = {
    8: Storage(8, ir.DataType.INT8, np.int8, 0),
    16: Storage(16, ir.DataType.INT16, np.int16, 0),
}


def _width(value: ir.Value) -> int:
    return _WIDTHS[dtype_of(value)]


def _payload_width(bits: int) -> int:
    return 8 if bits <= 8 else 16


class _Writer:
    """Adds the nodes of one recorded op.

    Args:
        builder: Of the op.
        call: The op.
        storages: How codes are stored, by width.
    """

    def __init__(self, builder: Builder, call: Call, storages: dict[int, Storage]) -> None:
        self.builder = builder
        self.call = call
        self.storages = storages

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int],
        attributes: dict[str, Any] | None = None,
        suffix: str = "",
        dtype: ir.DataType = FLOAT,
    ) -> ir.Value:
        """Add a node; the op's main one has no suffix."""
        return self.builder.node(
            op_type, inputs, attributes, suffix=suffix, dtype=dtype, shape=shape
        )

    def constant(self, value: Any, suffix: str) -> ir.Value:
        """Add an initializer."""
        return self.builder.constant(np.asarray(value), suffix)

    def number(self, value: Any, suffix: str) -> ir.Value:
        """Add float32 numbers."""
        return self.constant(np.asarray(value, np.float32), suffix)

    def storage(self, bits: int) -> Storage:
        """Return how codes of a width are stored."""
        return self.storages[_payload_width(bits)]

    # --- entering and leaving the grid ------------------------------------------------------

    def real(self, value: ir.Value, scale: float, suffix: str) -> ir.Value:
        """Dequantize stored codes, with scale 1 to compute on the codes themselves."""
        if dtype_of(value) == INT32:
            return self._dequantize(value, scale, np.int32(0), suffix)
        storage = self.storages[_width(value)]
        return self._dequantize(value, scale, storage.numpy(storage.zero), suffix)

    def _dequantize(
        self, value: ir.Value, scale: Any, zero: Any, suffix: str, axis: int | None = None
    ) -> ir.Value:
        # Always with a zero point: onnxruntime does not fuse every operator without.
        inputs = [
            value,
            self.number(scale, f"{suffix}/scale"),
            self.constant(zero, f"{suffix}/zero_point"),
        ]
        attributes = None if axis is None else {"axis": axis}
        return self.node(
            "DequantizeLinear", inputs, shape_of(value), attributes, f"{suffix}/dequantize"
        )

    def parameter(
        self, codes: NDArray[Any], scales: NDArray[np.float32], suffix: str, axis: int = 0
    ) -> ir.Value:
        """Add a dequantized weight or bias, with one scale or one per entry of ``axis``."""
        zeros = np.zeros(scales.shape, codes.dtype)
        per_axis = axis if scales.ndim else None
        return self._dequantize(self.constant(codes, suffix), scales, zeros, suffix, per_axis)

    def quantize(
        self, value: ir.Value, scale: float, bits: int, suffix: str = "quantize"
    ) -> ir.Value:
        """Round real values to stored codes; the storage saturates."""
        storage = self.storage(bits)
        inputs = [
            value,
            self.number(scale, f"{suffix}/scale"),
            self.constant(storage.numpy(storage.zero), f"{suffix}/zero_point"),
        ]
        return _mark(
            self.node("QuantizeLinear", inputs, shape_of(value), None, suffix, storage.dtype)
        )

    def result(
        self, value: ir.Value, scale: float, bits: int, low: int, high: int, fused: bool = True
    ) -> ir.Value:
        """Quantize the result of the main operator, and clamp it if the storage does not.

        Between a fused operator and its QuantizeLinear nothing may stand. A clamp behind them is
        exact: a code that is dequantized and quantized with one scale is the same code.
        """
        clamped = (low, high) != code_limits(_payload_width(bits))
        if clamped and not fused:
            value = self.clip(value, scale, bits, low, high)
        codes = self.quantize(value, scale, bits)
        if clamped and fused:
            return self.clamp(codes, scale, bits, low, high)
        return codes

    def clamp(self, codes: ir.Value, scale: float, bits: int, low: int, high: int) -> ir.Value:
        """Clamp stored codes."""
        real = self.real(codes, scale, "clamp")
        return self.quantize(self.clip(real, scale, bits, low, high), scale, bits, "clamp/quantize")

    def clip(self, value: ir.Value, scale: float, bits: int, low: int, high: int) -> ir.Value:
        """Clamp real values between two codes; a ReLU where only negative values go."""
        if (low, high) == (0, code_limits(_payload_width(bits))[1]):
            return self.node("Relu", [value], shape_of(value), suffix="relu")
        edges = [
            self.number(np.float32(edge) * np.float32(scale), f"clip/{name}")
            for edge, name in ((low, "min"), (high, "max"))
        ]
        return self.node("Clip", [value, *edges], shape_of(value), suffix="clip")

    def reshape(self, value: ir.Value, shape: Sequence[int], suffix: str) -> ir.Value:
        """Reshape; stored codes stay stored codes."""
        if shape_of(value) == list(shape):
            return value
        target = self.constant(np.array(shape, np.int64), f"{suffix}/shape")
        width = dtype_of(value)
        dtype = self.storages[_WIDTHS[width]].dtype if width in _CODES else width
        reshaped = self.node("Reshape", [value, target], shape, suffix=suffix, dtype=dtype)
        return _mark(reshaped) if width in _CODES else reshaped


def _mark(value: ir.Value) -> ir.Value:
    value.meta[_STORED] = True
    return value


def _scale_of(value: ir.Value) -> float:
    """Return the scale that stored codes were quantized with, wherever they were moved since."""
    node = value.producer()
    while node is not None and node.op_type != "QuantizeLinear":
        source = node.inputs[0] if node.inputs else None
        node = None if source is None else source.producer()
    scale = None if node is None or node.inputs[1] is None else node.inputs[1].const_value
    # Clamps and maxima do not depend on the scale; 1 is right for any.
    return 1.0 if scale is None else float(scale.numpy())


def _array(value: ir.Value) -> NDArray[Any]:
    if value.const_value is None:
        msg = f"internal: the parameter {value.name!r} is not a constant of the graph."
        raise RuntimeError(msg)
    return value.const_value.numpy()


# --- entering, leaving and changing the grid -----------------------------------------------------


def _quantize(w: _Writer) -> ir.Value:
    call = w.call
    return w.result(call.x, call.scale, call.bits, call.low, call.high)


def _dequantize(w: _Writer) -> ir.Value:
    return w.real(w.call.x, w.call.scale, "x")


def _requantize(w: _Writer) -> ir.Value:
    call = w.call
    ratio = w.number(call.scale_x / call.scale_o, "ratio")
    value = w.node("Mul", [w.real(call.x, 1.0, "x"), ratio], shape_of(call.x))
    return w.result(value, 1.0, call.bits, *code_limits(call.bits), fused=False)


# --- layers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
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


def _run_layer(w: _Writer, layer: _Layer) -> ir.Value:
    """Write a layer in the form whose results are those of the integer kernel."""
    call = w.call
    narrow = _width(layer.x) == 8 and layer.weight.dtype == np.int8
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


def _real_layer(
    w: _Writer, layer: _Layer, scale_x: float, scale_w: NDArray[np.float32]
) -> ir.Value:
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


def _code_layer(w: _Writer, layer: _Layer) -> ir.Value:
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


def _integer_layer(w: _Writer, layer: _Layer, op_type: str) -> ir.Value:
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
    return None if call.bias is None else _array(call.bias)


def _conv(w: _Writer) -> ir.Value:
    call = w.call
    weight, dims = _array(call.weight), len(call.stride)
    attributes: dict[str, Any] = {
        "kernel_shape": list(weight.shape[2:]),
        "strides": list(call.stride),
        "pads": [*call.padding, *call.padding],
        "dilations": list(call.dilation),
        "group": call.groups,
    }
    if call.transposed:
        attributes["output_padding"] = list(call.output_padding)
    layer = _Layer(
        op_type="ConvTranspose" if call.transposed else "Conv",
        integer_op=None if call.transposed else "ConvInteger",
        x=_batched(w, call.x, dims),
        weight=weight,
        axis=0,
        bias=_bias(call),
        channel_shape=[1, -1, *[1] * dims],
        shape=_batched_shape(call.result, dims),
        attributes=attributes,
    )
    return w.reshape(_run_layer(w, layer), shape_of(call.result), "unbatched")


def _batched_shape(value: ir.Value, dims: int) -> list[int]:
    shape = shape_of(value)
    return shape if len(shape) == dims + 2 else [1, *shape]


def _batched(w: _Writer, value: ir.Value, dims: int) -> ir.Value:
    """Give an input without batch dimension one, which ONNX asks for."""
    return w.reshape(value, _batched_shape(value, dims), "batched")


def _linear(w: _Writer) -> ir.Value:
    """A Gemm on matrices; on more dimensions a MatMul, which leaves room for a bias behind it."""
    call = w.call
    weight, result = _array(call.weight), shape_of(call.result)
    outputs, features = weight.shape
    rows = math.prod(result[:-1])
    integers = call.bits_o > 8 or _width(call.x) != 8 or weight.dtype != np.int8
    flat = len(result) < 2 or (call.scale_o == 0.0 and not integers)
    as_matrix = not integers and (flat or len(result) == 2)
    x, shape = call.x, result
    if flat:
        x, shape = w.reshape(x, [rows, features], "rows"), [rows, outputs]
    layer = _Layer(
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
    return w.reshape(_run_layer(w, layer), result, "shape")


def _scale_shift(w: _Writer) -> ir.Value:
    """A batch norm of its own: a depthwise convolution with one weight per channel."""
    call = w.call
    shape = shape_of(call.x)
    dims = max(len(shape) - 2, 1)
    spread = [*shape, *[1] * (dims + 2 - len(shape))]
    layer = _Layer(
        op_type="Conv",
        integer_op="ConvInteger",
        x=w.reshape(call.x, spread, "spread"),
        weight=_array(call.weight).reshape(-1, 1, *[1] * dims),
        axis=0,
        bias=_bias(call),
        channel_shape=[1, -1, *[1] * dims],
        shape=spread,
        attributes={"kernel_shape": [1] * dims, "group": shape[1]},
    )
    return w.reshape(_run_layer(w, layer), shape, "shape")


# --- elementwise --------------------------------------------------------------------------------


def _operand(w: _Writer, name: str, rank: int) -> ir.Value:
    """Dequantize an operand after bringing it to ``rank`` dimensions.

    Operands of one rank meet in one code path of onnxruntime's addition, whatever layout it has
    chosen for them.
    """
    value: ir.Value = w.call.arguments[name]
    scale = w.call.arguments[f"scale_{name}"]
    shape = shape_of(value)
    shape = [*[1] * (rank - len(shape)), *shape]
    if value.const_value is not None:
        codes = w.storages[_width(value)].store(_array(value)).reshape(shape)
        return w.real(w.constant(codes, name), scale, name)
    return w.real(w.reshape(value, shape, f"{name}/rank"), scale, name)


def _pair(w: _Writer) -> list[ir.Value]:
    rank = max(len(shape_of(w.call.x)), len(shape_of(w.call.y)))
    return [_operand(w, name, rank) for name in ("x", "y")]


def _add(w: _Writer) -> ir.Value:
    call = w.call
    x, y = _pair(w)
    if call.sign > 0 and shape_of(x)[::-1] < shape_of(y)[::-1]:
        x, y = y, x  # the kernel's order: what is broadcast stands second
    value = w.node("Add" if call.sign > 0 else "Sub", [x, y], shape_of(call.result))
    return w.result(value, call.scale_o, call.bits_o, call.low, call.high)


def _mul(w: _Writer) -> ir.Value:
    call = w.call
    value = w.node("Mul", _pair(w), shape_of(call.result))
    return w.result(value, call.scale_o, call.bits_o, call.low, call.high)


def _cat(w: _Writer) -> ir.Value:
    call = w.call
    parts = [
        w.real(x, scale, f"x{index}")
        for index, (x, scale) in enumerate(zip(call.tensors, call.scales, strict=True))
    ]
    shape = shape_of(call.result)
    value = w.node("Concat", parts, shape, {"axis": call.dim % len(shape)})
    return w.result(value, call.scale_o, call.bits_o, *code_limits(call.bits_o))


def _clamp(w: _Writer) -> ir.Value:
    call = w.call
    return w.clamp(call.x, _scale_of(call.x), call.bits, call.low, call.high)


# --- pools --------------------------------------------------------------------------------------


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


def _require_countable(call: Call, count: int, bits: int) -> None:
    if count * 2 ** (bits - 1) > EXACT_FLOAT32:
        msg = (
            f"`{call.site}`: a sum of {count} codes of {bits} bits may exceed 2^24, the whole "
            "numbers that float32 holds. Use fewer activation_bits, or average in two steps."
        )
        raise UnsupportedError(msg)


def _avg_pool(w: _Writer) -> ir.Value:
    call = w.call
    dims = len(call.kernel_size)
    if call.scale_x != call.scale_o:
        msg = f"internal: `{call.name}` changes the scale of an average."
        raise RuntimeError(msg)
    area = math.prod(call.kernel_size)
    _require_countable(call, area, call.bits)
    x = _batched(w, call.x, dims)
    shape, pooled = shape_of(x), _batched_shape(call.result, dims)
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
        value = _total(w, codes, range(2, dims + 2), pooled, keepdims=True)
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


def _average(w: _Writer, value: ir.Value, bits: int) -> ir.Value:
    return w.result(value, 1.0, bits, *code_limits(bits))


def _total(
    w: _Writer, codes: ir.Value, dims: Sequence[int], shape: Sequence[int], keepdims: bool
) -> ir.Value:
    axes = w.constant(np.array(dims, np.int64), "axes")
    return w.node("ReduceSum", [codes, axes], shape, {"keepdims": int(keepdims)})


def _mean(w: _Writer) -> ir.Value:
    call = w.call
    sizes, shape = shape_of(call.x), shape_of(call.result)
    dims = [d % len(sizes) for d in call.dim]
    count = math.prod(sizes[d] for d in dims)
    _require_countable(call, count, call.bits)
    total = _total(w, w.real(call.x, 1.0, "x"), dims, shape, call.keepdim)
    value = w.node("Div", [total, w.number(count, "count")], shape, suffix="divide")
    return _average(w, value, call.bits)


def _max_pool(w: _Writer) -> ir.Value:
    call = w.call
    dims = len(call.kernel_size)
    x = _batched(w, call.x, dims)
    pooled = _batched_shape(call.result, dims)
    attributes = _geometry(call, shape_of(x)[2:], pooled[2:]) | {"dilations": list(call.dilation)}
    scale, bits = _scale_of(x), _width(x)
    value = w.node("MaxPool", [w.real(x, scale, "x")], pooled, attributes)
    codes = w.result(value, scale, bits, *code_limits(bits))
    return w.reshape(codes, shape_of(call.result), "unbatched")


# --- values that are moved between the operators -------------------------------------------------


def _finish(graph: ir.Graph, storages: dict[int, Storage]) -> None:
    """Let what moves codes around move stored codes."""
    for node in list(graph):
        if not any(value is not None and _STORED in value.meta for value in node.inputs):
            continue
        if any(output.meta.get(_STORED) for output in node.outputs) or _is_end(node):
            continue
        if node.op_type == "Pad":
            _pad_with_stored(graph, node, storages)
        for output in node.outputs:
            _mark(output)
            if output.dtype in _CODES:
                output.dtype = storages[_width(output)].dtype
        if node.op_type == "Cast" and node.outputs[0].dtype in _CODES:
            node.attributes["to"] = ir.AttrInt64("to", int(dtype_of(node.outputs[0])))


def _is_end(node: ir.Node) -> bool:
    return node.op_type in ("DequantizeLinear", "ConvInteger", "MatMulInteger")


def _pad_with_stored(graph: ir.Graph, node: ir.Node, storages: dict[int, Storage]) -> None:
    """Pad with the stored form of the code, where a missing constant means the code 0."""
    mode = node.attributes.get("mode")
    source, output = node.inputs[0], node.outputs[0]
    if source is None or source.dtype not in _CODES or (mode and mode.as_string() != "constant"):
        return
    storage = storages[_width(source)]
    given = node.inputs[2] if len(node.inputs) > 2 else None
    code = storage.store(np.zeros((), np.int8) if given is None else _array(given))
    if storage.bits == 16:  # onnxruntime pads bytes and floats, which hold 16 bits as well
        code = code.astype(np.float32)
        real, back = _like(source, FLOAT, "real"), _like(output, storage.dtype, "stored")
        graph.insert_before(node, _cast(source, real))
        node.replace_input_with(0, real)
        replace_value(graph, output, _mark(back))
        graph.insert_after(node, _cast(output, back))
        output.dtype = FLOAT
    name = f"{output.name}/value"
    tensor = ir.Tensor(code, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([]), const_value=tensor
    )
    graph.initializers[name] = value
    node.resize_inputs(max(3, len(node.inputs)))
    node.replace_input_with(2, value)


def _like(value: ir.Value, dtype: ir.DataType, suffix: str) -> ir.Value:
    return ir.Value(name=f"{value.name}/{suffix}", type=ir.TensorType(dtype), shape=value.shape)


def _cast(value: ir.Value, result: ir.Value) -> ir.Node:
    attributes = [ir.AttrInt64("to", int(dtype_of(result)))]
    return ir.Node("", "Cast", [value], attributes, outputs=[result], name=result.name)


# --- the dialect --------------------------------------------------------------------------------


def _check(sites: Sequence[Site]) -> None:
    """Refuse targets whose arithmetic onnxruntime does not have."""
    for site in sites:
        platform = site.platform
        if platform is not None and platform.dialect != "qdq":
            msg = (
                f"`{site.key}` is quantized for platform {platform.name!r}, which reads the "
                f"{platform.dialect!r} dialect. Export with dialect={platform.dialect!r}, or "
                "quantize for 'onnxruntime'."
            )
            raise UnsupportedError(msg)
        if site.rounding != "half_even":
            msg = (
                f"`{site.key}`: QuantizeLinear rounds half to even. Found rounding="
                f"{site.rounding!r}. Leave `rounding` to the platform."
            )
            raise UnsupportedError(msg)


_TABLE = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "requantize": _requantize,
    "conv": _conv,
    "linear": _linear,
    "scale_shift": _scale_shift,
    "add": _add,
    "mul": _mul,
    "cat": _cat,
    "clamp": _clamp,
    "avg_pool": _avg_pool,
    "mean": _mean,
    "max_pool": _max_pool,
}


def qdq_dialect(name: str = "qdq", signed: bool = False) -> Dialect:
    """Return the dialect.

    Args:
        name: What users write.
        signed: Store activations as int8 and int16 with zero point 0 instead of uint8 and uint16.
            The codes are the same. onnxruntime runs such a graph with its integer kernels on x86
            only if the session says ``session.qdqisint8allowed = 1``, and its sums and products may
            then round the other way next to a tie, unless scales are powers of two.
    """
    storages = _SIGNED if signed else _UNSIGNED

    def translate(write: Callable[[_Writer], ir.Value]) -> Translation:
        return lambda builder, call: write(_Writer(builder, call, storages))

    return Dialect(
        name=name,
        table={op: translate(write) for op, write in _TABLE.items()},
        # The first in which quantized values may have 16 bits.
        opset_version=21,
        ir_version=10,
        domains={},
        check=_check,
        finish=lambda graph: _finish(graph, storages),
    )


QDQ = qdq_dialect()
