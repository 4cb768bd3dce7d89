"""The ops of the ``linger`` domain as ONNX schemas, with shape inference: what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx.defs import OpSchema

from lightning_linger.export.generations import LINGER3_DOMAIN
from lightning_linger.export.schemas import (
    CODE_TYPES,
    FLOAT,
    INT,
    INTS,
    STRING,
    Shape,
    ShapeRule,
    TypeRule,
    input_of,
    schema_of,
)

DOMAIN = LINGER3_DOMAIN

# Attributes: of every op, of some platforms, and of operands and results.
COMMON = {"platform": STRING, "quant_mode": STRING}
OPTIONAL = {"platform_quant": STRING}
X_GRID = {"x_bits": INT, "scale_x": FLOAT}
W_GRID = {"w_bits": INT, "scale_w": FLOAT}
Y_GRID = {"y_bits": INT, "scale_y": FLOAT}
O_GRID = {"o_bits": INT, "scale_o": FLOAT}
WINDOW = {"kernel_shape": INTS, "strides": INTS, "pads": INTS}


# --- element types ----------------------------------------------------------------------------


def _code_type(bits: int) -> int:
    if bits <= 8:
        return int(onnx.TensorProto.INT8)
    return int(onnx.TensorProto.INT16 if bits <= 16 else onnx.TensorProto.INT32)


def type_by_o_bits(attributes: Mapping[str, Any], types: Sequence[int]) -> int:
    """The codes have ``o_bits``."""
    return _code_type(attributes["o_bits"])


def type_by_data_bits(attributes: Mapping[str, Any], types: Sequence[int]) -> int:
    """The codes have ``data_bits``."""
    return _code_type(attributes["data_bits"])


def type_of_input(attributes: Mapping[str, Any], types: Sequence[int]) -> int:
    """The type stays."""
    return types[0]


def type_of_reals(attributes: Mapping[str, Any], types: Sequence[int]) -> int:
    """Codes become real numbers."""
    return int(onnx.TensorProto.FLOAT)


# --- shapes -----------------------------------------------------------------------------------


def same_shape(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    """The shape stays."""
    return shapes[0]


def window_sizes(attributes: Mapping[str, Any], sizes: Shape) -> Shape:
    """Return how many windows fit into each spatial size."""
    kernel, strides = attributes["kernel_shape"], attributes["strides"]
    spreads = attributes.get("dilations") or [1] * len(kernel)
    pads = attributes["pads"]
    result: Shape = []
    for i, size in enumerate(sizes):
        if not isinstance(size, int):
            result.append(None)
            continue
        covered = spreads[i] * (kernel[i] - 1) + 1
        result.append((size + pads[i] + pads[i + len(kernel)] - covered) // strides[i] + 1)
    return result


def broadcast_shape(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    """Two operands are broadcast."""
    x, y = shapes
    rank = max(len(x), len(y))
    sizes_x: Shape = [*([1] * (rank - len(x))), *x]
    sizes_y: Shape = [*([1] * (rank - len(y))), *y]
    return [b if a == 1 else a for a, b in zip(sizes_x, sizes_y, strict=True)]


# --- schemas ----------------------------------------------------------------------------------


def layer_schema(
    op_type: str, shape: ShapeRule, geometry: Mapping[str, OpSchema.AttrType] | None = None
) -> OpSchema:
    """Return the schema of a layer with a weight and a bias."""
    return schema_of(
        op_type,
        DOMAIN,
        [
            input_of("x", CODE_TYPES),
            input_of("weight", ["tensor(int8)", "tensor(int16)"]),
            input_of("bias", ["tensor(int32)"], optional=True),
        ],
        CODE_TYPES,
        {**COMMON, **X_GRID, **W_GRID, **O_GRID, **(geometry or {})},
        {**OPTIONAL, "output_padding": INTS} if "Transpose" in op_type else OPTIONAL,
        shape,
        type_by_o_bits,
    )


def pair_schema(op_type: str) -> OpSchema:
    """Return the schema of an op with two operands."""
    inputs = [input_of("x", CODE_TYPES), input_of("y", CODE_TYPES)]
    attributes = {**COMMON, **X_GRID, **Y_GRID, **O_GRID}
    return schema_of(
        op_type, DOMAIN, inputs, CODE_TYPES, attributes, OPTIONAL, broadcast_shape, type_by_o_bits
    )


def unary_schema(
    op_type: str,
    types: Sequence[str],
    output_types: Sequence[str],
    required: Mapping[str, OpSchema.AttrType],
    optional: Mapping[str, OpSchema.AttrType],
    shape: ShapeRule,
    dtype: TypeRule,
) -> OpSchema:
    """Return the schema of an op with one input."""
    inputs = [input_of("x", types)]
    return schema_of(op_type, DOMAIN, inputs, output_types, required, optional, shape, dtype)
