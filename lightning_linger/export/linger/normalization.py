"""Layer norm over the last axis, the norm that the engine has."""

from __future__ import annotations

import math

import numpy as np
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
    W_GRID,
    X_GRID,
    same_shape,
    type_by_o_bits,
)
from lightning_linger.export.schemas import CODE_TYPES, FLOAT, INT, input_of, schema_of
from lightning_linger.ops.normalization import (
    ENGINE_BITS,
    epsilon_of_engine,
    has_engine_kernel,
)

ENGINE_EPS = 1e-5
# The engine computes eps * 2^(2q) with a 32-bit shift.
FINEST_STEP = 2.0**-15


def _refuse_other_norms(call: Call) -> None:
    """Refuse what is not the engine's layer norm, and say in what it differs."""
    groups = shape_of(call.weight)[0]
    what, remedy = "this norm", "Use nn.LayerNorm"
    if not call.centered:
        refuse_because(call, "rms_norm", "the engine takes the mean off", remedy)
    if groups != 1 or call.spread != 1:
        why = "the engine normalizes the last axis, with one weight for each place on it"
        refuse_because(call, "a group or instance norm", why, remedy)
    if call.target is not None and call.target.curves == "venus":
        why = "venus has a layer norm of its own with 16-bit weights, which is not known exactly"
        refuse_because(call, "layer_norm", why, "Use a batch norm")
    widths = (call.bits_x, call.bits_w, call.bits_o)
    if max(widths) > ENGINE_BITS:
        why = f"the engine computes it in 8 bits. Found {'/'.join(map(str, widths))} bits"
        remedy = "Set weight_bits, activation_bits and output_bits to 8 for it"
        refuse_because(call, "layer_norm", why, remedy)
    refuse_because(call, what, "the engine has no kernel for it", remedy)


def _refuse_other_sums(call: Call, count: int) -> None:
    """Refuse what the engine's 32-bit numbers do not hold, and an eps that it ignores."""
    if count**2 * 4 ** (call.bits_x - 1) >= 2**31:
        refuse_because(
            call,
            f"layer_norm over {count} values of {call.bits_x} bits",
            "the engine's sums of squares times their number may exceed 32 bits",
            "Set fewer activation_bits for it",
        )
    if call.scale_x < FINEST_STEP:
        refuse_because(
            call,
            f"layer_norm of codes with a step of {call.scale_x}",
            "the engine's epsilon exceeds 32 bits",
            "Use a larger range before it",
        )
    found, fixed = (epsilon_of_engine(eps, count, call.scale_x) for eps in (call.eps, ENGINE_EPS))
    if found != fixed:
        refuse_because(
            call,
            f"layer_norm with eps={call.eps}",
            "the engine ignores eps and takes 1e-5, which gives other results at this step",
            "Set eps=1e-5",
        )


def _layer_norm(builder: Builder, call: Call) -> ir.Value:
    scales = (call.scale_x, call.scale_w, call.scale_o)
    bits = (call.bits_x, call.bits_w, call.bits_o)
    weight_shape = shape_of(call.weight)
    name = "" if call.target is None else call.target.name
    if not has_engine_kernel(name, weight_shape, call.spread, call.centered, scales, bits):
        _refuse_other_norms(call)
    count = weight_shape[1]
    _refuse_other_sums(call, count)
    attributes = common_attributes(call) | {
        "x_bits": call.bits_x,
        "scale_x": reciprocal(call, call.scale_x),
        "w_bits": call.bits_w,
        "scale_w": reciprocal(call, call.scale_w),
        "o_bits": call.bits_o,
        "scale_o": reciprocal(call, call.scale_o),
        "axis": -1,
        "epsilon": ENGINE_EPS,
    }
    # The engine takes three dimensions, or four with a single sample.
    shape = shape_of(call.x)
    rows = [1, math.prod(shape) // count, count]
    fits = shape[-1] == count and (len(shape) == 3 or (len(shape) == 4 and shape[0] == 1))
    value = call.x if fits else reshape(builder, call.x, rows, "rows")
    inputs = [value, *(_vector(builder, call, name) for name in ("weight", "bias"))]
    given = shape if fits else rows
    value = builder.node("QLayerNorm2d", inputs, attributes, domain=DOMAIN, shape=given)
    value = value if fits else reshape(builder, value, shape, "shape")
    return window(builder, value, call.low, call.high, call.bits_o)


def _vector(builder: Builder, call: Call, name: str) -> ir.Value:
    """Add a parameter, one number per place on the last axis."""
    value: ir.Value = call.arguments[name]
    if value.const_value is None:
        msg = f"internal: the {name} of `{call.site}` is not a constant of the graph."
        raise RuntimeError(msg)
    return builder.constant(np.ascontiguousarray(value.const_value.numpy().reshape(-1)), name)


def _normalize(builder: Builder, call: Call) -> ir.Value:
    remedy = "Take it outside the model"
    refuse_because(call, "normalize", "the engine has no kernel for it", remedy)


TABLE: dict[str, Translation] = {"layer_norm": _layer_norm, "normalize": _normalize}

SCHEMAS: list[OpSchema] = [
    schema_of(
        "QLayerNorm2d",
        DOMAIN,
        [
            input_of("x", CODE_TYPES),
            input_of("weight", ["tensor(int8)"]),
            input_of("bias", ["tensor(int32)"]),
        ],
        CODE_TYPES,
        {**COMMON, **X_GRID, **W_GRID, **O_GRID},
        {**OPTIONAL, "axis": INT, "epsilon": FLOAT},
        same_shape,
        type_by_o_bits,
    )
]
