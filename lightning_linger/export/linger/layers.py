"""Layers: convolutions, matrix products and batch norms of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.export.dialect import Builder, Call, Translation, shape_of
from lightning_linger.export.linger.attributes import accumulator, refuse, window
from lightning_linger.export.linger.schema import (
    DOMAIN,
    WINDOW,
    layer_schema,
    same_shape,
    window_sizes,
)
from lightning_linger.export.schemas import INT, INTS, Shape


def add_layer(builder: Builder, call: Call, op_type: str, geometry: dict[str, Any]) -> ir.Value:
    """Add a layer's node, and what turns its accumulator into the result."""
    attributes, real = accumulator(call)
    attributes |= geometry
    bias = None if call.bias is None else builder.parameter(call.bias, "bias")
    inputs = [call.x, builder.parameter(call.weight, "weight"), bias]
    if not real:
        value = builder.node(op_type, inputs, attributes, domain=DOMAIN)
        return window(builder, value, call.low, call.high, call.bits_o)
    codes = builder.node(op_type, inputs, attributes, domain=DOMAIN, dtype=ir.DataType.INT32)
    scale = {"scale_o": attributes["scale_o"]}
    return builder.node("Dequant", [codes], scale, domain=DOMAIN, suffix="dequantize")


def _conv(builder: Builder, call: Call) -> ir.Value:
    dims = len(call.stride)
    if dims > 2:
        refuse(call, f"a {dims}-dimensional convolution")
    geometry = {
        "kernel_shape": shape_of(call.weight)[2:],
        "pads": [*call.padding, *call.padding],
        "strides": call.stride,
        "dilations": call.dilation,
        "group": call.groups,
    }
    if call.transposed:
        geometry["output_padding"] = call.output_padding
    op_type = f"QConv{'Transpose' if call.transposed else ''}{dims}d"
    return add_layer(builder, call, op_type, geometry)


def _linear(builder: Builder, call: Call) -> ir.Value:
    return add_layer(builder, call, "QLinear", {})


def _scale_shift(builder: Builder, call: Call) -> ir.Value:
    dims = max(len(shape_of(call.x)) - 2, 1)
    if dims > 2:
        refuse(call, f"a {dims}-dimensional batch norm")
    return add_layer(builder, call, f"QBatchNorm{dims}d", {})


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
