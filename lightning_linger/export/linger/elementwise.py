"""Sums, products, joins and clamps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.export.dialect import Builder, Call, Translation, shape_of
from lightning_linger.export.linger.attributes import (
    bits_of,
    common_attributes,
    pair_attributes,
    pair_inputs,
    reciprocal,
    refuse,
    refuse_left_shift,
    requant_attributes,
    window,
)
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
    op_type = "QAdd" if call.sign > 0 else "QSub"
    value = builder.node(op_type, pair_inputs(builder, call), pair_attributes(call), domain=DOMAIN)
    return window(builder, value, call.low, call.high, call.bits_o)


def _mul(builder: Builder, call: Call) -> ir.Value:
    if call.scale_o < call.scale_x * call.scale_y:
        refuse_left_shift(call)
    value = builder.node("QMul", pair_inputs(builder, call), pair_attributes(call), domain=DOMAIN)
    return window(builder, value, call.low, call.high, call.bits_o)


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
