"""The ops of the ``linger`` domain as ONNX schemas, with shape inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx.defs import OpSchema

from lightning_linger.export.schemas import (
    CODE_TYPES,
    FLOAT,
    FLOAT_TYPES,
    INT,
    INTS,
    STRING,
    Shape,
    ShapeRule,
    TypeRule,
    input_of,
    register_schemas,
    schema_of,
)

DOMAIN = "linger"

# The packer accepts any number of operands, but attributes have to be declared one by one.
MAX_CAT_OPERANDS = 64

_COMMON = {"platform": STRING, "quant_mode": STRING}
_OPTIONAL = {"platform_quant": STRING}
_X = {"x_bits": INT, "scale_x": FLOAT}
_W = {"w_bits": INT, "scale_w": FLOAT}
_Y = {"y_bits": INT, "scale_y": FLOAT}
_O = {"o_bits": INT, "scale_o": FLOAT}
_WINDOW = {"kernel_shape": INTS, "strides": INTS, "pads": INTS}


# --- element types ----------------------------------------------------------------------------


def _code_type(bits: int) -> int:
    if bits <= 8:
        return int(onnx.TensorProto.INT8)
    return int(onnx.TensorProto.INT16 if bits <= 16 else onnx.TensorProto.INT32)


def _from_o_bits(attributes: Mapping[str, Any], types: Sequence[int]) -> int:
    return _code_type(attributes["o_bits"])


def _from_data_bits(attributes: Mapping[str, Any], types: Sequence[int]) -> int:
    return _code_type(attributes["data_bits"])


def _as_input(attributes: Mapping[str, Any], types: Sequence[int]) -> int:
    return types[0]


def _real(attributes: Mapping[str, Any], types: Sequence[int]) -> int:
    return int(onnx.TensorProto.FLOAT)


# --- shapes -----------------------------------------------------------------------------------


def _same(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    return shapes[0]


def _linear(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    return [*shapes[0][:-1], shapes[1][0]]


def _windows(attributes: Mapping[str, Any], sizes: Shape) -> Shape:
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


def _conv(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    return [shapes[0][0], shapes[1][0], *_windows(attributes, shapes[0][2:])]


def _conv_transpose(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
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


def _pool(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    return [*shapes[0][:2], *_windows(attributes, shapes[0][2:])]


def _broadcast(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    x, y = shapes
    rank = max(len(x), len(y))
    sizes_x: Shape = [*([1] * (rank - len(x))), *x]
    sizes_y: Shape = [*([1] * (rank - len(y))), *y]
    return [b if a == 1 else a for a, b in zip(sizes_x, sizes_y, strict=True)]


def _cat(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    result = list(shapes[0])
    axis = attributes["axis"] % len(result)
    sizes = [shape[axis] for shape in shapes]
    known = [size for size in sizes if isinstance(size, int)]
    result[axis] = sum(known) if len(known) == len(sizes) else None
    return result


# --- schemas ----------------------------------------------------------------------------------


def _layer(
    op_type: str, shape: ShapeRule, geometry: Mapping[str, OpSchema.AttrType] | None = None
) -> OpSchema:
    return schema_of(
        op_type,
        DOMAIN,
        [
            input_of("x", CODE_TYPES),
            input_of("weight", ["tensor(int8)", "tensor(int16)"]),
            input_of("bias", ["tensor(int32)"], optional=True),
        ],
        CODE_TYPES,
        {**_COMMON, **_X, **_W, **_O, **(geometry or {})},
        {**_OPTIONAL, "output_padding": INTS} if "Transpose" in op_type else _OPTIONAL,
        shape,
        _from_o_bits,
    )


def _pair(op_type: str) -> OpSchema:
    inputs = [input_of("x", CODE_TYPES), input_of("y", CODE_TYPES)]
    attributes = {**_COMMON, **_X, **_Y, **_O}
    return schema_of(
        op_type, DOMAIN, inputs, CODE_TYPES, attributes, _OPTIONAL, _broadcast, _from_o_bits
    )


def _unary(
    op_type: str,
    types: Sequence[str],
    output_types: Sequence[str],
    required: Mapping[str, OpSchema.AttrType],
    optional: Mapping[str, OpSchema.AttrType],
    shape: ShapeRule,
    dtype: TypeRule,
) -> OpSchema:
    inputs = [input_of("x", types)]
    return schema_of(op_type, DOMAIN, inputs, output_types, required, optional, shape, dtype)


def register_linger_schemas() -> None:
    """Make the ops of the domain known to ONNX."""
    geometry = {**_WINDOW, "dilations": INTS, "group": INT}
    operands = range(MAX_CAT_OPERANDS)
    average = {
        **{**_COMMON, **_X, **_O, **_WINDOW},
        **{"ceil_mode": INT, "count_include_pad": INT, "divisor_override": INT},
    }
    rounded = {**_COMMON, "data_bits": INT, "scale_x": FLOAT}
    register_schemas(
        [
            _unary(
                "Quant",
                FLOAT_TYPES,
                CODE_TYPES,
                {**rounded, "zero_point": INT},
                _OPTIONAL,
                _same,
                _from_data_bits,
            ),
            _unary("Dequant", CODE_TYPES, FLOAT_TYPES, {"scale_o": FLOAT}, {}, _same, _real),
            _unary(
                "Requant", CODE_TYPES, CODE_TYPES, {**rounded, **_O}, _OPTIONAL, _same, _from_o_bits
            ),
            *(_layer(f"QConv{d}d", _conv, geometry) for d in (1, 2)),
            *(_layer(f"QConvTranspose{d}d", _conv_transpose, geometry) for d in (1, 2)),
            _layer("QLinear", _linear),
            *(_layer(f"QBatchNorm{d}d", _same) for d in (1, 2)),
            *(_pair(op_type) for op_type in ("QAdd", "QSub", "QMul")),
            schema_of(
                "QCat",
                DOMAIN,
                [input_of("x", CODE_TYPES, variadic=True)],
                CODE_TYPES,
                {**_COMMON, **_O, "axis": INT},
                {
                    **_OPTIONAL,
                    **{f"scale_x_{i}": FLOAT for i in operands},
                    **{f"x_{i}_bits": INT for i in operands},
                },
                _cat,
                _from_o_bits,
            ),
            *(
                _unary(
                    f"QAvgPool{d}d",
                    CODE_TYPES,
                    CODE_TYPES,
                    average,
                    _OPTIONAL,
                    _pool,
                    _from_o_bits,
                )
                for d in (1, 2)
            ),
            _unary(
                "MaxPool",
                CODE_TYPES,
                CODE_TYPES,
                {"platform": STRING, **_WINDOW},
                {"dilations": INTS},
                _pool,
                _as_input,
            ),
        ]
    )
