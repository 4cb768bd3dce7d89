"""Functions of one number, and gated units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.core.integer import code_limits
from lightning_linger.export.dialect import Builder, Call, Translation, shape_of
from lightning_linger.export.linger.attributes import (
    bits_of,
    common_attributes,
    payload_bits,
    reciprocal,
    refuse_because,
    refuse_left_shift,
    requant_attributes,
    reshape,
    window,
)
from lightning_linger.export.linger.schema import (
    COMMON,
    DOMAIN,
    O_GRID,
    OPTIONAL,
    X_GRID,
    same_shape,
    type_by_o_bits,
    unary_schema,
)
from lightning_linger.export.schemas import CODE_TYPES, INT, Shape

_OP_TYPES = {"sigmoid": "QSigmoid", "tanh": "QTanh", "gelu": "QGelu", "silu": "QSwish"}
# The venus kernels read 16-bit codes at this step or a finer one: a finer one is shifted right,
# a coarser one is taken for this one.
_VENUS_STEP = 2.0**-11
_PAYLOADS = {8: ir.DataType.INT8, 16: ir.DataType.INT16}


def _curve(builder: Builder, call: Call) -> ir.Value:
    x, step, bits = call.x, call.scale_x, bits_of(call.x)
    attributes = common_attributes(call)
    if call.function in ("sigmoid", "tanh") and attributes["platform"] == "venus":
        x, step, bits = _widened(builder, call)
    attributes |= {
        "x_bits": bits,
        "scale_x": reciprocal(call, step),
        "o_bits": call.bits_o,
        "scale_o": reciprocal(call, call.scale_o),
    }
    value = builder.node(_OP_TYPES[call.function], [x], attributes, domain=DOMAIN)
    return window(builder, value, call.low, call.high, call.bits_o)


def _widened(builder: Builder, call: Call) -> tuple[ir.Value, float, int]:
    """Bring an operand to 16 bits at a step that the venus kernels read."""
    x, step = call.x, call.scale_x
    if bits_of(x) == 16:
        if step > _VENUS_STEP:
            refuse_because(
                call,
                f"{call.function} of coarse 16-bit codes",
                f"the venus kernel reads steps up to 2^-11, found {step}",
                "Set activation_bits=8, which is widened, or limit the values before it to 16",
            )
        return x, step, 16
    coarsest = _VENUS_STEP * 2**8
    if step > coarsest:
        # Widening is a plain shift, so that what lies beyond the kernel saturates before.
        attributes = requant_attributes(call, step, coarsest, 8, 8)
        x = builder.node(
            "Requant", [x], attributes, domain=DOMAIN, suffix="saturate", dtype=x.dtype
        )
        step = coarsest
    attributes = requant_attributes(call, step, step * 2.0**-8, 8, 16)
    x = builder.node("Requant", [x], attributes, domain=DOMAIN, suffix="widen", dtype=_PAYLOADS[16])
    return x, step * 2.0**-8, 16


def _glu(builder: Builder, call: Call) -> ir.Value:
    if call.scale_o < call.scale_x * 2.0**-15:
        refuse_left_shift(call)
    attributes = common_attributes(call) | {
        "dim": call.dim,
        "x_bits": bits_of(call.x),
        "scale_x": reciprocal(call, call.scale_x),
        "o_bits": call.bits_o,
        "scale_o": reciprocal(call, call.scale_o),
    }
    value = builder.node("QGLU", [call.x], attributes, domain=DOMAIN)
    return window(builder, value, call.low, call.high, call.bits_o)


def _pair(
    builder: Builder,
    call: Call,
    op_type: str,
    operands: Sequence[tuple[ir.Value, float, int]],
    result: tuple[float, int],
    suffix: str = "",
) -> ir.Value:
    """Add an addition or a multiplication.

    Args:
        builder: Of the op.
        call: The op.
        op_type: ``QAdd`` or ``QMul``.
        operands: Value, step and width of both; the second may be a number.
        result: Step and width.
        suffix: See :meth:`Builder.node`.
    """
    (x, step_x, bits_x), (y, step_y, bits_y) = operands
    attributes = common_attributes(call) | {
        "x_bits": bits_x,
        "scale_x": reciprocal(call, step_x),
        "y_bits": bits_y,
        "scale_y": reciprocal(call, step_y),
        "o_bits": result[1],
        "scale_o": reciprocal(call, result[0]),
    }
    dtype = _PAYLOADS[payload_bits(result[1])]
    return builder.node(
        op_type, [x, y], attributes, domain=DOMAIN, suffix=suffix, dtype=dtype, shape=shape_of(x)
    )


def _minus(builder: Builder, call: Call, x: ir.Value, step: float, suffix: str) -> ir.Value:
    """Multiply by minus one, which saturates like a negation."""
    bits = bits_of(x)
    minus_one = builder.constant(np.array(-1, np.int8), "minus_one")
    return _pair(
        builder, call, "QMul", [(x, step, bits), (minus_one, 1.0, 8)], (step, bits), suffix
    )


def _array_of(value: ir.Value) -> NDArray[Any]:
    if value.const_value is None:
        msg = f"internal: the slopes {value.name!r} are no constant of the graph."
        raise RuntimeError(msg)
    return value.const_value.numpy()


def _neg(builder: Builder, call: Call) -> ir.Value:
    value = _minus(builder, call, call.x, call.scale, "")
    return window(builder, value, *code_limits(call.bits), call.bits)


def _abs(builder: Builder, call: Call) -> ir.Value:
    """Add what is positive of the value and of its negative."""
    bits, step = bits_of(call.x), call.scale
    positive = builder.node("Relu", [call.x], suffix="positive")
    negated = _minus(builder, call, call.x, step, "negated")
    negative = builder.node("Relu", [negated], suffix="negative")
    operands = [(positive, step, bits), (negative, step, bits)]
    value = _pair(builder, call, "QAdd", operands, (step, bits))
    return window(builder, value, *code_limits(call.bits), call.bits)


def _slopes(builder: Builder, call: Call) -> ir.Value:
    """Write a leaky ReLU in five steps, of which the last but one alone rounds.

    What is negative of ``x`` is ``x - relu(x)``; it is multiplied by the slope and brought to the
    scale of the result, where one of the two parts of the sum is zero.
    """
    if call.scale_o < max(call.scale_x, call.scale_x * call.scale_w):
        refuse_left_shift(call)
    bits, step = bits_of(call.x), call.scale_x
    shape = shape_of(call.x)
    x, slopes = call.x, _array_of(call.slopes)
    positive = builder.node("Relu", [x], suffix="positive", dtype=x.dtype, shape=shape)
    minus = _minus(builder, call, positive, step, "minus_positive")
    operands = [(x, step, bits), (minus, step, bits)]
    negative = _pair(builder, call, "QAdd", operands, (step, bits), "negative")
    if slopes.size == 1:
        slopes = slopes.reshape(())
    else:  # the engine multiplies each map of one image by a number
        maps = math.prod(shape[:2])
        negative = reshape(builder, negative, [1, maps, 1, math.prod(shape[2:])], "plane")
        slopes = np.tile(slopes, shape[0]).reshape(1, maps, 1, 1)
    factor = (builder.constant(slopes, "slopes"), call.scale_w, payload_bits(call.bits_w))
    result = (call.scale_o, call.bits_o)
    negative = _pair(builder, call, "QMul", [(negative, step, bits), factor], result, "scaled")
    if shape_of(negative) != shape:
        negative = reshape(builder, negative, shape, "shape")
    operands = [(positive, step, bits), (negative, call.scale_o, bits_of(negative))]
    value = _pair(builder, call, "QAdd", operands, result)
    return window(builder, value, call.low, call.high, call.bits_o)


def _refuse_table(builder: Builder, call: Call) -> ir.Value:
    if call.function in ("sigmoid", "tanh"):
        refuse_because(
            call,
            f"{call.function} from {call.bits_x} to {call.bits_o} bits",
            "the engine's kernels are for 8-bit codes only",
            "Set activation_bits=8 and output_bits=8 for it",
        )
    instead = {} if call.target is None else call.target.unsupported
    advice = instead.get(call.function, "a function that it has")
    refuse_because(call, call.function, "the engine has no such op", f"Use {advice}")


def _glu_shape(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    shape = list(shapes[0])
    axis = attributes["dim"] % len(shape)
    size = shape[axis]
    shape[axis] = size // 2 if isinstance(size, int) else None
    return shape


TABLE: dict[str, Translation] = {
    "curve": _curve,
    "glu": _glu,
    "neg": _neg,
    "abs": _abs,
    "lookup": _refuse_table,
    "interpolate": _refuse_table,
    "prelu": _slopes,
}

_GRIDS = {**COMMON, **X_GRID, **O_GRID}

SCHEMAS: list[OpSchema] = [
    *(
        unary_schema(op, CODE_TYPES, CODE_TYPES, _GRIDS, OPTIONAL, same_shape, type_by_o_bits)
        for op in _OP_TYPES.values()
    ),
    unary_schema(
        "QGLU",
        CODE_TYPES,
        CODE_TYPES,
        {**_GRIDS, "dim": INT},
        OPTIONAL,
        _glu_shape,
        type_by_o_bits,
    ),
]
