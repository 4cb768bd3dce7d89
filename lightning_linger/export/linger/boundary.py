"""Entering, leaving and changing the grid."""

from __future__ import annotations

from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.export.dialect import Boundary, Builder, Call, Translation
from lightning_linger.export.linger.attributes import (
    common_attributes,
    reciprocal,
    refuse_because,
    requant_attributes,
    window,
)
from lightning_linger.export.linger.schema import (
    COMMON,
    DOMAIN,
    O_GRID,
    OPTIONAL,
    same_shape,
    type_by_data_bits,
    type_by_o_bits,
    type_of_reals,
    unary_schema,
)
from lightning_linger.export.schemas import CODE_TYPES, FLOAT, FLOAT_TYPES, INT


def _quantize(builder: Builder, call: Call) -> ir.Value:
    attributes = common_attributes(call) | {
        "data_bits": call.bits,
        "scale_x": reciprocal(call, call.scale),
        "zero_point": 0,
    }
    value = builder.node("Quant", [call.x], attributes, domain=DOMAIN)
    return window(builder, value, call.low, call.high, call.bits)


def _dequantize(builder: Builder, call: Call) -> ir.Value:
    attributes = {"scale_o": reciprocal(call, call.scale)}
    return builder.node("Dequant", [call.x], attributes, domain=DOMAIN)


def _requantize(builder: Builder, call: Call) -> ir.Value:
    if call.bits_x > 8:
        refuse_because(
            call,
            f"a change from {call.bits_x}-bit codes",
            "the engine changes the step of 8-bit codes only",
            "Set output_bits=8 for the layer before it",
        )
    attributes = requant_attributes(call, call.scale_x, call.scale_o, call.bits_x, call.bits)
    return builder.node("Requant", [call.x], attributes, domain=DOMAIN)


def _grid(node: ir.Node) -> tuple[float, int]:
    name = "scale_x" if node.op_type == "Quant" else "scale_o"
    return 1.0 / node.attributes[name].as_float(), 0


BOUNDARY = Boundary("Quant", "Dequant", _grid)

TABLE: dict[str, Translation] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "requantize": _requantize,
}

_ROUNDED = {**COMMON, "data_bits": INT, "scale_x": FLOAT}

SCHEMAS: list[OpSchema] = [
    unary_schema(
        "Quant",
        FLOAT_TYPES,
        CODE_TYPES,
        {**_ROUNDED, "zero_point": INT},
        OPTIONAL,
        same_shape,
        type_by_data_bits,
    ),
    unary_schema(
        "Dequant", CODE_TYPES, FLOAT_TYPES, {"scale_o": FLOAT}, {}, same_shape, type_of_reals
    ),
    unary_schema(
        "Requant",
        CODE_TYPES,
        CODE_TYPES,
        {**_ROUNDED, **O_GRID},
        OPTIONAL,
        same_shape,
        type_by_o_bits,
    ),
]
