"""Softmax, along the last axis, which is the one that the engine has."""

from __future__ import annotations

import math
from typing import Any

from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.export.dialect import Builder, Call, Translation, shape_of
from lightning_linger.export.linger.attributes import (
    common_attributes,
    reciprocal,
    refuse_because,
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
from lightning_linger.export.schemas import CODE_TYPES, INT
from lightning_linger.ops.softmax import ENGINE_BITS

# Entries along the axis that the packer accepts.
MAX_LENGTH = 2048
# A code of 8 bits at this step fills the 32-bit numbers that the engine moves it to.
COARSEST_STEP = 0.5


def _attributes(call: Call) -> dict[str, Any]:
    """Return the attributes of a softmax, and refuse what the engine's kernel does not take."""
    attributes = common_attributes(call)
    if max(call.bits_x, call.bits_o) > ENGINE_BITS:
        refuse_because(
            call,
            f"{call.op} of {call.bits_x} to {call.bits_o} bits",
            "the engine's kernel takes and gives 8 bits",
            "Set activation_bits=8 and output_bits=8 for this layer",
        )
    length = shape_of(call.x)[call.dim]
    if length > MAX_LENGTH:
        refuse_because(
            call,
            f"{call.op} over {length} values",
            f"the engine takes up to {MAX_LENGTH}",
            "Split the axis",
        )
    if call.scale_x > COARSEST_STEP:
        refuse_because(
            call,
            f"{call.op} of codes with a step of {call.scale_x}",
            "they leave the engine's 32-bit numbers in Q25",
            "Keep what comes before within 64 by a range limit on its output",
        )
    # One engine reads another name.
    axis = "dim" if attributes["platform"] == "venus" else "axis"
    return attributes | {
        "x_bits": call.bits_x,
        "scale_x": reciprocal(call, call.scale_x),
        "o_bits": call.bits_o,
        "scale_o": reciprocal(call, call.scale_o),
        axis: -1,
    }


def _along_last_axis(builder: Builder, call: Call, op_type: str) -> ir.Value:
    """Add an op of the last axis; another axis is swapped with what lies behind it."""
    attributes = _attributes(call)
    shape = shape_of(call.x)
    behind = math.prod(shape[call.dim + 1 :])
    if behind == 1 and call.dim == len(shape) - 1:
        value = builder.node(op_type, [call.x], attributes, domain=DOMAIN)
    else:
        length = shape[call.dim]
        sizes = [math.prod(shape[: call.dim]), length, behind]
        turned = [sizes[0], behind, length]
        value = call.x if shape == sizes else reshape(builder, call.x, sizes, "spread")
        value = _swapped(builder, value, turned, "last")
        value = builder.node(op_type, [value], attributes, domain=DOMAIN, shape=turned)
        value = _swapped(builder, value, sizes, "back")
        value = value if shape == sizes else reshape(builder, value, shape, "shape")
    return window(builder, value, call.low, call.high, call.bits_o)


def _swapped(builder: Builder, value: ir.Value, shape: list[int], suffix: str) -> ir.Value:
    return builder.node("Transpose", [value], {"perm": [0, 2, 1]}, suffix=suffix, shape=shape)


def _softmax(builder: Builder, call: Call) -> ir.Value:
    return _along_last_axis(builder, call, "QSoftmax")


def _log_softmax(builder: Builder, call: Call) -> ir.Value:
    if call.target is not None and call.target.curves != "venus":
        refuse_because(
            call,
            "log_softmax",
            f"no kernel of {call.target.engine_name} computes it as far as is known",
            "Leave it out of the deployed model (the largest value has the largest logarithm)",
        )
    return _along_last_axis(builder, call, "LogSoftmaxInt")


def _refused(what: str, remedy: str) -> Translation:
    def refuse(builder: Builder, call: Call) -> ir.Value:
        refuse_because(call, what, "the engine has no kernel for it", remedy)

    return refuse


TABLE: dict[str, Translation] = {
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "softmin": _refused("softmin", "Use a softmax behind a layer with negated weights"),
    "logsumexp": _refused("logsumexp", "Use a maximum, or take it outside the model"),
}

_AXES = {**OPTIONAL, "axis": INT, "dim": INT}

SCHEMAS: list[OpSchema] = [
    unary_schema(
        op_type,
        CODE_TYPES,
        CODE_TYPES,
        {**COMMON, **X_GRID, **O_GRID},
        _AXES,
        same_shape,
        type_by_o_bits,
    )
    for op_type in ("QSoftmax", "LogSoftmaxInt")
]
