"""What nodes of the ``linger`` dialect share: attributes, refusals and small pieces of graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import code_limits, is_power_of_two
from lightning_linger.export.dialect import Builder, Call, dtype_of, shape_of

_NUMPY_CODES = {8: np.int8, 16: np.int16, 32: np.int32}
_CODE_TYPES = {8: ir.DataType.INT8, 16: ir.DataType.INT16, 32: ir.DataType.INT32}


# --- attributes -------------------------------------------------------------------------------


def reciprocal(call: Call, step: float) -> float:
    """Return the scale attribute of a step, and refuse what is no power of two."""
    if not is_power_of_two(step):
        msg = (
            f"`{call.site}`: the linger dialect needs power-of-two scales. Found the step {step}. "
            "Quantize with scale='power_of_two', or export with dialect='qdq'."
        )
        raise UnsupportedError(msg)
    return 1.0 / step


def common_attributes(call: Call) -> dict[str, Any]:
    """Return what every op of the engine carries: the platform and the rounding rule."""
    if call.target is None:
        msg = f"internal: `{call.name}` was recorded without its platform."
        raise RuntimeError(msg)
    rounding = call.arguments.get("rounding", "half_up")
    if rounding != "half_up":
        msg = (
            f"`{call.site}`: the engine rounds half up. Found rounding={rounding!r}. Leave "
            "`rounding` to the platform."
        )
        raise UnsupportedError(msg)
    attributes: dict[str, Any] = {
        "platform": call.target.engine_name,
        "quant_mode": "floor_add",
    }
    if call.target.engine_name == "venus":
        attributes["platform_quant"] = "luna_quant"  # the name this engine reads instead
    return attributes


def _weight_scale(call: Call) -> float:
    steps: Sequence[float] = call.scale_w
    if len(steps) != 1:
        msg = (
            f"`{call.site}`: the linger dialect has one scale per weight. Found one per channel. "
            "Quantize with granularity='tensor'."
        )
        raise UnsupportedError(msg)
    return reciprocal(call, steps[0])


def accumulator(call: Call) -> tuple[dict[str, Any], bool]:
    """Return the attributes of a layer, and whether its result has to become float again."""
    scale_x, scale_w = reciprocal(call, call.scale_x), _weight_scale(call)
    float_result = call.scale_o == 0.0
    bits_o = 32 if float_result else call.bits_o
    scale_o = scale_x * scale_w if float_result else reciprocal(call, call.scale_o)
    if scale_o > scale_x * scale_w and bits_o != 32:
        refuse_left_shift(call)
    attributes = common_attributes(call) | {
        "x_bits": call.bits_x,
        "scale_x": scale_x,
        # Narrower weights lie in whole bytes, and the engine takes the name of a width literally.
        "w_bits": payload_bits(call.bits_w),
        "scale_w": scale_w,
        "o_bits": bits_o,
        "scale_o": scale_o,
    }
    return attributes, float_result


def requant_attributes(
    call: Call, step_x: float, step_o: float, bits_x: int, bits_o: int
) -> dict[str, Any]:
    """Return the attributes of a change from one grid to another."""
    return common_attributes(call) | {
        "data_bits": bits_x,
        "scale_x": reciprocal(call, step_x),
        "o_bits": bits_o,
        "scale_o": reciprocal(call, step_o),
    }


def pair_attributes(call: Call) -> dict[str, Any]:
    """Return the attributes of an op with two operands."""
    return common_attributes(call) | {
        "x_bits": bits_of(call.x),
        "scale_x": reciprocal(call, call.scale_x),
        "y_bits": bits_of(call.y),
        "scale_y": reciprocal(call, call.scale_y),
        "o_bits": call.bits_o,
        "scale_o": reciprocal(call, call.scale_o),
    }


def bits_of(value: ir.Value) -> int:
    """Return the width of codes by their element type."""
    return next(bits for bits, dtype in _CODE_TYPES.items() if dtype == value.dtype)


# --- refusals ---------------------------------------------------------------------------------


def refuse(call: Call, what: str) -> None:
    """Refuse what the engine has no op for."""
    msg = (
        f"`{call.site}`: the linger dialect has no name for {what}. Leave the layer in float with "
        f"overrides={{'{call.site}': None}}."
    )
    raise UnsupportedError(msg)


def refuse_because(call: Call, what: str, why: str, remedy: str) -> NoReturn:
    """Refuse what the engine cannot run.

    Args:
        call: The op.
        what: What it is.
        why: The reason.
        remedy: What to do, as a sentence without its end.
    """
    msg = (
        f"`{call.site}`: the linger dialect has no form of {what} because {why}. {remedy}, or "
        f"leave it in float with overrides={{'{call.site}': None}}."
    )
    raise UnsupportedError(msg)


def refuse_left_shift(call: Call) -> None:
    """Refuse a result that is finer than the accumulator."""
    msg = (
        f"`{call.site}`: the result is finer than the accumulator, and the engine only shifts "
        "right. Quantize for a platform that knows this ('venusa', 'arcs', 'venus', 'mars')."
    )
    raise UnsupportedError(msg)


# --- pieces -----------------------------------------------------------------------------------


def pair_inputs(builder: Builder, call: Call) -> list[Any]:
    """Return the inputs of an op with two operands."""
    # A number is an initializer of the site, tensors are values.
    return [builder.parameter(call.x, "x"), builder.parameter(call.y, "y")]


def window(
    builder: Builder, value: ir.Value, low: int, high: int, bits: int, own: bool = False
) -> ir.Value:
    """Clamp codes if the engine's own saturation is not enough: a ReLU, or a clip.

    ``own`` tells the clamp that is a site of its own from the one that completes another op.
    """
    # The engine saturates at whole bytes.
    least, most = code_limits(payload_bits(bits))
    if (low, high) == (least, most):
        return value
    shape = shape_of(value)
    if (low, high) == (0, most):
        return builder.node("Relu", [value], suffix="" if own else "relu", shape=shape)
    dtype = _NUMPY_CODES[payload_bits(bits)]
    edges = [
        builder.constant(np.array(low, dtype), "min"),
        builder.constant(np.array(high, dtype), "max"),
    ]
    return builder.node("Clip", [value, *edges], suffix="" if own else "clip", shape=shape)


def payload_bits(bits: int) -> int:
    """Return the width in which codes are stored."""
    return 8 if bits <= 8 else 16 if bits <= 16 else 32


def reshape(builder: Builder, value: ir.Value, shape: list[int], suffix: str) -> ir.Value:
    """Add a reshape to sizes that are numbers."""
    target = builder.constant(np.array(shape, np.int64), f"{suffix}/shape")
    dtype = dtype_of(value)
    return builder.node("Reshape", [value, target], suffix=suffix, dtype=dtype, shape=shape)
