"""Matrix products of two activations: the engine multiplies stacks of matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.export.dialect import Builder, Call, Translation, shape_of
from lightning_linger.export.linger.attributes import (
    common_attributes,
    reciprocal,
    refuse_left_shift,
    reshape,
    window,
)
from lightning_linger.export.linger.schema import (
    COMMON,
    DOMAIN,
    O_GRID,
    OPTIONAL,
    X_GRID,
    Y_GRID,
    type_by_o_bits,
)
from lightning_linger.export.schemas import CODE_TYPES, Shape, input_of, schema_of


def _shaped(builder: Builder, value: ir.Value, shape: list[int], suffix: str) -> ir.Value:
    """Reshape an operand, which keeps its type."""
    if shape_of(value) == shape:
        return value
    target = builder.constant(np.array(shape, np.int64), f"{suffix}/shape")
    return builder.node("Reshape", [value, target], suffix=suffix, dtype=value.dtype, shape=shape)


def _expanded(builder: Builder, value: ir.Value, batch: list[int], suffix: str) -> ir.Value:
    """Repeat matrices as often as the other operand has them."""
    matrix = shape_of(value)[-2:]
    if shape_of(value)[:-2] == batch:
        return value
    shape = [*batch, *matrix]
    target = builder.constant(np.array(shape, np.int64), f"{suffix}/expand/shape")
    inputs = [value, target]
    return builder.node("Expand", inputs, suffix=f"{suffix}/expand", dtype=value.dtype, shape=shape)


def _matrices(builder: Builder, call: Call) -> tuple[ir.Value, ir.Value, list[int]]:
    """Return the operands in two or three dimensions, and the shape of their product."""
    x, y = call.x, call.y
    if len(shape_of(x)) == 1:
        x = _shaped(builder, x, [1, *shape_of(x)], "x/row")
    if len(shape_of(y)) == 1:
        y = _shaped(builder, y, [*shape_of(y), 1], "y/column")
    features, columns = shape_of(y)[-2:]
    if len(shape_of(y)) == 2:  # all rows meet one matrix
        rows = math.prod(shape_of(x)[:-1])
        return _shaped(builder, x, [rows, features], "x"), y, [rows, columns]
    batch = list(np.broadcast_shapes(tuple(shape_of(x)[:-2]), tuple(shape_of(y)[:-2])))
    stack, rows = math.prod(batch), shape_of(x)[-2]
    x = _shaped(builder, _expanded(builder, x, batch, "x"), [stack, rows, features], "x")
    y = _shaped(builder, _expanded(builder, y, batch, "y"), [stack, features, columns], "y")
    return x, y, [stack, rows, columns]


def _matmul(builder: Builder, call: Call) -> ir.Value:
    product = reciprocal(call, call.scale_x) * reciprocal(call, call.scale_y)
    real = call.scale_o == 0.0
    scale_o = product if real else reciprocal(call, call.scale_o)
    if scale_o > product:
        refuse_left_shift(call)
    x, y, shape = _matrices(builder, call)
    attributes = common_attributes(call) | {
        "x_bits": call.bits_x,
        "scale_x": reciprocal(call, call.scale_x),
        "y_bits": call.bits_y,
        "scale_y": reciprocal(call, call.scale_y),
        "o_bits": 32 if real else call.bits_o,
        "scale_o": scale_o,
    }
    result = shape_of(call.result)
    kind = ir.DataType.INT32 if real else None
    value = builder.node("QBmm", [x, y], attributes, domain=DOMAIN, dtype=kind, shape=shape)
    if real:
        scale = {"scale_o": scale_o}
        value = builder.node(
            "Dequant", [value], scale, domain=DOMAIN, suffix="dequantize", shape=shape
        )
    if shape != result:
        value = reshape(builder, value, result, "shape")
    return value if real else window(builder, value, call.low, call.high, call.bits_o)


def _product_shape(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    x, y = shapes
    return [*x[:-1], y[-1]]


TABLE: dict[str, Translation] = {"matmul": _matmul}

SCHEMAS: list[OpSchema] = [
    schema_of(
        "QBmm",
        DOMAIN,
        [input_of("x", CODE_TYPES), input_of("y", CODE_TYPES)],
        CODE_TYPES,
        {**COMMON, **X_GRID, **Y_GRID, **O_GRID},
        OPTIONAL,
        _product_shape,
        type_by_o_bits,
    )
]
