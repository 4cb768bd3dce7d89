"""Sums, products, joins and clamps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.core.integer import code_limits
from lightning_linger.export.dialect import Builder, Call, Translation, shape_of
from lightning_linger.export.linger.attributes import (
    bits_of,
    common_attributes,
    pair_attributes,
    pair_inputs,
    reciprocal,
    refuse,
    refuse_because,
    refuse_left_shift,
    requant_attributes,
    reshape,
    window,
)
from lightning_linger.export.linger.layers import pointwise
from lightning_linger.export.linger.schema import (
    COMMON,
    DOMAIN,
    O_GRID,
    OPTIONAL,
    pair_schema,
    type_by_o_bits,
)
from lightning_linger.export.schemas import CODE_TYPES, FLOAT, INT, Shape, input_of, schema_of

# The packer accepts any number of operands, but attributes have to be declared one by one.
MAX_CAT_OPERANDS = 64


def _add(builder: Builder, call: Call) -> ir.Value:
    if not call.round_operands:
        refuse(call, "a sum that is rounded once; quantize for one of its own platforms")
    if call.scale_o < max(call.scale_x, call.scale_y):
        refuse_left_shift(call)
    tensor, number = _tensor_and_number(call)
    if number is not None and call.sign > 0:
        return _add_number(builder, call, tensor, number)
    if call.sign > 0 and shape_of(call.x) != shape_of(call.y):
        refuse_because(
            call,
            "a sum of tensors of different shapes",
            "the engine adds element by element",
            "Give both operands the same shape",
        )
    op_type = "QAdd" if call.sign > 0 else "QSub"
    value = builder.node(op_type, pair_inputs(builder, call), pair_attributes(call), domain=DOMAIN)
    return window(builder, value, call.low, call.high, call.bits_o)


def _tensor_and_number(call: Call) -> tuple[str, int | None]:
    """Return which operand is the tensor, and the code of the other one where it is a number."""
    for name, other in (("x", "y"), ("y", "x")):
        value: ir.Value = getattr(call, other)
        if value.const_value is not None and math.prod(shape_of(value)) == 1:
            return name, int(value.const_value.numpy().reshape(()))
    return "x", None


def _add_number(builder: Builder, call: Call, tensor: str, number: int) -> ir.Value:
    """Write ``x + number`` as a convolution with weights of one: the number is its bias.

    The engine adds tensors of one shape only. Rounding comes first in a sum, and a whole number of
    output steps in the accumulator passes through the rounding behind it.
    """
    other = "y" if tensor == "x" else "x"
    x: ir.Value = getattr(call, tensor)
    scale_x = getattr(call, f"scale_{tensor}")
    least, most = code_limits(call.bits_o)
    shift = round(math.log2(call.scale_o / scale_x))
    behind = round(math.log2(call.scale_o / getattr(call, f"scale_{other}")))
    rounded = (number + (1 << behind >> 1)) >> behind
    shape = shape_of(call.result)
    plane = shape if len(shape) == 4 else _plane(shape)
    channels = plane[1]
    bias = np.full(channels, min(max(rounded, least), most) << shift, np.int32)
    inputs = [
        x if plane == shape else reshape(builder, x, plane, "plane"),
        builder.constant(np.ones((channels, 1, 1, 1), np.int8), "weight"),
        builder.constant(bias, "bias"),
    ]
    attributes = common_attributes(call) | {
        "x_bits": bits_of(x),
        "scale_x": reciprocal(call, scale_x),
        "w_bits": 8,
        "scale_w": 1.0,
        "o_bits": call.bits_o,
        "scale_o": reciprocal(call, call.scale_o),
        **pointwise(channels),
    }
    value = builder.node("QConv2d", inputs, attributes, domain=DOMAIN, shape=plane)
    value = window(builder, value, call.low, call.high, call.bits_o)
    return value if plane == shape else reshape(builder, value, shape, "shape")


def _plane(shape: Sequence[int]) -> list[int]:
    """Return four sizes with one channel for values of fewer or more dimensions."""
    columns = shape[-1] if shape else 1
    return [1, 1, math.prod(shape) // columns, columns]


def _mul(builder: Builder, call: Call) -> ir.Value:
    if call.scale_o < call.scale_x * call.scale_y:
        refuse_left_shift(call)
    shape = shape_of(call.result)
    attributes, (x, y) = pair_attributes(call), pair_inputs(builder, call)
    if shape_of(x) != shape:  # the engine broadcasts its second operand
        x, y = y, x
        names = {"x_bits": "y_bits", "scale_x": "scale_y"}
        names |= {new: old for old, new in names.items()}
        attributes = {names.get(name, name): value for name, value in attributes.items()}
    planes = _planes(call, shape_of(x), shape_of(y), shape)
    if planes is None:
        value = builder.node("QMul", [x, y], attributes, domain=DOMAIN)
        return window(builder, value, call.low, call.high, call.bits_o)
    inputs = [reshape(builder, x, planes[0], "maps"), reshape(builder, y, planes[1], "factors")]
    value = builder.node("QMul", inputs, attributes, domain=DOMAIN, shape=planes[0])
    value = window(builder, value, call.low, call.high, call.bits_o)
    return reshape(builder, value, shape, "shape")


def _planes(
    call: Call, x: list[int], y: list[int], shape: list[int]
) -> tuple[list[int], list[int]] | None:
    """Return the sizes that both factors take, None where they may stay as they are.

    The engine multiplies tensors of one shape, a tensor with a number, and the maps of one image
    with a number for each map.
    """
    number = not y
    maps = len(shape) == 4 and y == [*shape[:2], 1, 1]
    if x == shape and (y == shape or number or maps):
        return None
    y = [*[1] * (len(shape) - len(y)), *y]
    alike = next((i for i, size in enumerate(y) if size != shape[i]), len(y))
    if x != shape or y[:alike] != shape[:alike] or math.prod(y[alike:]) != 1:
        refuse_because(
            call,
            f"a product of {x} and {y} values",
            "the engine multiplies element by element, or each map by one number",
            "Give both operands the same shape",
        )
    maps_of_all = math.prod(shape[:alike])
    return [1, maps_of_all, 1, math.prod(shape[alike:])], [1, maps_of_all, 1, 1]


def _cat(builder: Builder, call: Call) -> ir.Value:
    attributes = common_attributes(call)
    inputs = []
    for index, (value, step) in enumerate(zip(call.tensors, call.scales, strict=True)):
        operand, operand_step, bits = value, step, bits_of(value)
        if step < call.scale_o and attributes["platform"] == "venusA":
            # This engine gives zeros for an operand that is finer than the result.
            operand = builder.node(
                "Requant",
                [value],
                requant_attributes(call, step, call.scale_o, bits, call.bits_o),
                domain=DOMAIN,
                suffix=f"requantize{index}",
                shape=shape_of(value),
            )
            operand_step, bits = call.scale_o, call.bits_o
        inputs.append(operand)
        attributes[f"scale_x_{index}"] = reciprocal(call, operand_step)
        attributes[f"x_{index}_bits"] = bits
    attributes |= {
        "axis": call.dim % len(shape_of(call.result)),
        "o_bits": call.bits_o,
        "scale_o": reciprocal(call, call.scale_o),
    }
    return builder.node("QCat", inputs, attributes, domain=DOMAIN)


def _clamp(builder: Builder, call: Call) -> ir.Value:
    return window(builder, call.x, call.low, call.high, call.bits, own=True)


def _cat_shape(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    result = list(shapes[0])
    axis = attributes["axis"] % len(result)
    sizes = [shape[axis] for shape in shapes]
    known = [size for size in sizes if isinstance(size, int)]
    result[axis] = sum(known) if len(known) == len(sizes) else None
    return result


TABLE: dict[str, Translation] = {
    "add": _add,
    "mul": _mul,
    "cat": _cat,
    "clamp": _clamp,
}

SCHEMAS: list[OpSchema] = [
    *(pair_schema(op_type) for op_type in ("QAdd", "QSub", "QMul")),
    schema_of(
        "QCat",
        DOMAIN,
        [input_of("x", CODE_TYPES, variadic=True)],
        CODE_TYPES,
        {**COMMON, **O_GRID, "axis": INT},
        {
            **OPTIONAL,
            **{f"scale_x_{i}": FLOAT for i in range(MAX_CAT_OPERANDS)},
            **{f"x_{i}_bits": INT for i in range(MAX_CAT_OPERANDS)},
        },
        _cat_shape,
        type_by_o_bits,
    ),
]
