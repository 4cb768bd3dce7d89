"""Layers: convolutions, matrix products and batch norms of their own.

Where the engine's layer of a kind is missing or computes something else, the layer is written as a
two-dimensional convolution that gives the same integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.export.dialect import Builder, Call, Translation, shape_of
from lightning_linger.export.linger.attributes import (
    accumulator,
    payload_bits,
    refuse,
    refuse_because,
    reshape,
    window,
)
from lightning_linger.export.linger.schema import (
    DOMAIN,
    WINDOW,
    layer_schema,
    same_shape,
    window_sizes,
)
from lightning_linger.export.schemas import INT, INTS, Shape


def add_layer(
    builder: Builder,
    call: Call,
    op_type: str,
    geometry: Mapping[str, Any],
    inputs: Sequence[ir.Value | None] | None = None,
    shape: Sequence[int] | None = None,
) -> ir.Value:
    """Add a layer's node, and what turns its accumulator into the result.

    Args:
        builder: Builds.
        call: The layer.
        op_type: Of the node.
        geometry: Attributes beside those of the scales.
        inputs: Operand, weight and bias; None takes those of the call.
        shape: Of the result; None takes that of the call.
    """
    attributes, real = accumulator(call)
    attributes |= geometry
    if inputs is None:
        inputs = [call.x, builder.parameter(call.weight, "weight"), _bias(builder, call)]
    if not real:
        value = builder.node(op_type, inputs, attributes, domain=DOMAIN, shape=shape)
        return window(builder, value, call.low, call.high, call.bits_o)
    codes = builder.node(
        op_type, inputs, attributes, domain=DOMAIN, dtype=ir.DataType.INT32, shape=shape
    )
    scale = {"scale_o": attributes["scale_o"]}
    return builder.node("Dequant", [codes], scale, domain=DOMAIN, suffix="dequantize", shape=shape)


def _bias(builder: Builder, call: Call) -> ir.Value | None:
    return None if call.bias is None else builder.parameter(call.bias, "bias")


# --- convolutions -----------------------------------------------------------------------------


def _conv(builder: Builder, call: Call) -> ir.Value:
    dims = len(call.stride)
    if dims > 2:
        refuse(call, f"a {dims}-dimensional convolution")
    _refuse_wide_result(call, (8,), "convolutions")
    x, pads = call.x, [*call.padding, *call.padding]
    groups, weight = call.groups, builder.parameter(call.weight, "weight")
    if not call.transposed:
        x, pads = _without_padding(builder, call, pads)
    elif groups > 1:
        groups, weight = 1, builder.constant(_dense_weight(call), "weight")
    geometry: dict[str, Any] = {
        "kernel_shape": shape_of(weight)[2:],
        "pads": pads,
        "strides": call.stride,
        "dilations": call.dilation,
        "group": groups,
    }
    if call.transposed:
        geometry["output_padding"] = call.output_padding
    name = "QConvTranspose" if call.transposed else "QConv"
    if dims == 1 and _lacks_one_dimension(call):
        return _conv_on_plane(builder, call, f"{name}2d", geometry, x, weight)
    inputs = [x, weight, _bias(builder, call)]
    return add_layer(builder, call, f"{name}{dims}d", geometry, inputs)


def _lacks_one_dimension(call: Call) -> bool:
    """Whether the engine's own one-dimensional convolution is missing or wrong."""
    if call.transposed or call.groups > 1:
        return True
    plain = shape_of(call.weight)[2] == 1 and list(call.padding) == [0]
    return call.target is not None and call.target.engine_name == "venusA" and not plain


def _conv_on_plane(
    builder: Builder,
    call: Call,
    op_type: str,
    geometry: Mapping[str, Any],
    x: ir.Value,
    weight: ir.Value,
) -> ir.Value:
    """Write a one-dimensional convolution as one of maps with a height of 1."""
    neutral = {"kernel_shape": 1, "strides": 1, "dilations": 1, "output_padding": 0}
    on_plane = dict(geometry)
    for name, number in neutral.items():
        if name in geometry:
            on_plane[name] = [number, *geometry[name]]
    before, after = geometry["pads"]
    on_plane["pads"] = [0, before, 0, after]
    kernel = _codes_of(call, weight)
    batch, channels, length = shape_of(x)
    inputs = [
        reshape(builder, x, [batch, channels, 1, length], "plane"),
        builder.constant(np.expand_dims(kernel, 2), "weight"),
        _bias(builder, call),
    ]
    shape = shape_of(call.result)
    value = add_layer(builder, call, op_type, on_plane, inputs, [*shape[:2], 1, shape[2]])
    return reshape(builder, value, shape, "row")


def _without_padding(builder: Builder, call: Call, pads: list[int]) -> tuple[ir.Value, list[int]]:
    """Take zeros that are padded before a convolution into its own pads: the engine has no Pad."""
    source: ir.Value = call.x
    quant, pad = None, source.producer()
    if pad is not None and pad.op_type == "Quant" and pad.domain == DOMAIN and pad.inputs[0]:
        quant, pad = pad, pad.inputs[0].producer()  # zeros stay zeros
    if pad is None or pad.op_type != "Pad" or pad.domain != "":
        return source, pads
    mode = pad.attributes.get("mode")
    widths, fill, axes = (_constant_input(pad, index) for index in (1, 2, 3))
    before = pad.inputs[0]
    constant = mode is None or mode.as_string() == "constant"
    if before is None or widths is None or axes is not None or not constant:
        return source, pads
    dims, edges = len(pads) // 2, [int(width) for width in widths]
    outside = [*edges[:2], *edges[2 + dims : 4 + dims]]
    if len(edges) != len(pads) + 4 or any(outside) or min(edges) < 0:
        return source, pads
    if (fill is not None and fill.any()) or len(source.uses()) != 1:
        return source, pads
    added = [*edges[2 : 2 + dims], *edges[4 + dims :]]
    if quant is not None:
        quant.replace_input_with(0, before)
        source.shape = before.shape
        if not pad.outputs[0].uses():
            builder.graph.remove(pad, safe=True)
        before = source
    return before, [own + more for own, more in zip(pads, added, strict=True)]


def _constant_input(node: ir.Node, index: int) -> NDArray[Any] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _dense_weight(call: Call) -> NDArray[Any]:
    """Return the weight of a transposed convolution without groups, with zeros between them."""
    weight = _codes_of(call, call.weight)
    rows, columns = weight.shape[0] // call.groups, weight.shape[1]
    dense = np.zeros((weight.shape[0], columns * call.groups, *weight.shape[2:]), weight.dtype)
    for group in range(call.groups):
        inside = slice(group * rows, (group + 1) * rows)
        dense[inside, group * columns : (group + 1) * columns] = weight[inside]
    return dense


def _codes_of(call: Call, value: ir.Value) -> NDArray[Any]:
    if value.const_value is None:
        refuse_because(
            call,
            "a weight that the model computes",
            "the packer arranges weights before they run",
            "Use a parameter",
        )
    return value.const_value.numpy()


def _refuse_wide_result(call: Call, allowed: tuple[int, ...], layers: str) -> None:
    """Refuse widths that the packer takes, and for which the engine gives something else."""
    bits = 32 if call.scale_o == 0.0 else payload_bits(call.bits_o)
    wide_weight = payload_bits(call.bits_w) > 8
    if payload_bits(call.bits_x) > 8 or (bits in allowed and not wide_weight):
        return  # the packer itself refuses wide operands
    what = "16-bit weights" if wide_weight else f"a {bits}-bit result"
    field = "weight_bits" if wide_weight else "output_bits"
    why = f"the {layers} of {_engine(call)} give other numbers for it"
    refuse_because(call, what, why, f"Set {field}=8 for it")


def _engine(call: Call) -> str:
    return "the engine" if call.target is None else call.target.engine_name


# --- linear layers and batch norms ------------------------------------------------------------


def _linear(builder: Builder, call: Call) -> ir.Value:
    widths = (8, 16, 32) if _engine(call) == "venus" else (8, 32)
    _refuse_wide_result(call, widths, "linear layers")
    return add_layer(builder, call, "QLinear", {})


def _scale_shift(builder: Builder, call: Call) -> ir.Value:
    """Write a batch norm as a convolution with one weight per channel."""
    shape = shape_of(call.x)
    if len(shape) > 4:
        refuse(call, f"a {len(shape) - 2}-dimensional batch norm")
    _refuse_wide_result(call, (8,), "convolutions")
    channels = shape[1]
    plane = shape if len(shape) == 4 else [*shape[:2], 1, *shape[2:], *[1] * (3 - len(shape))]
    weight = _codes_of(call, call.weight).reshape(channels, 1, 1, 1)
    inputs = [
        call.x if plane == shape else reshape(builder, call.x, plane, "plane"),
        builder.constant(weight, "weight"),
        _bias(builder, call),
    ]
    value = add_layer(builder, call, "QConv2d", pointwise(channels), inputs, plane)
    return value if plane == shape else reshape(builder, value, shape, "shape")


def pointwise(channels: int) -> dict[str, Any]:
    """Return the geometry of a convolution that has one weight for each channel."""
    return {
        "kernel_shape": [1, 1],
        "pads": [0, 0, 0, 0],
        "strides": [1, 1],
        "dilations": [1, 1],
        "group": channels,
    }


# --- shapes -----------------------------------------------------------------------------------


def _linear_shape(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    return [*shapes[0][:-1], shapes[1][0]]


def _conv_shape(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    return [shapes[0][0], shapes[1][0], *window_sizes(attributes, shapes[0][2:])]


def _conv_transpose_shape(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    kernel, pads = attributes["kernel_shape"], attributes["pads"]
    extra = attributes.get("output_padding") or [0] * len(kernel)
    per_group = shapes[1][1]
    channels = per_group * attributes["group"] if isinstance(per_group, int) else None
    result: Shape = [shapes[0][0], channels]
    for i, size in enumerate(shapes[0][2:]):
        if not isinstance(size, int):
            result.append(None)
            continue
        covered = attributes["dilations"][i] * (kernel[i] - 1) + 1
        full = (size - 1) * attributes["strides"][i] + covered + extra[i]
        result.append(full - pads[i] - pads[i + len(kernel)])
    return result


TABLE: dict[str, Translation] = {
    "conv": _conv,
    "linear": _linear,
    "scale_shift": _scale_shift,
}

_GEOMETRY = {**WINDOW, "dilations": INTS, "group": INT}

SCHEMAS: list[OpSchema] = [
    *(layer_schema(f"QConv{d}d", _conv_shape, _GEOMETRY) for d in (1, 2)),
    *(layer_schema(f"QConvTranspose{d}d", _conv_transpose_shape, _GEOMETRY) for d in (1, 2)),
    layer_schema("QLinear", _linear_shape),
    *(layer_schema(f"QBatchNorm{d}d", same_shape) for d in (1, 2)),
]
