"""The ``linger`` dialect: the integer graph that thinker packs into a chip image.

Integers flow between the nodes, weights are int8 initializers in torch's layout, biases int32 at
the scale of the accumulator. Scales are *reciprocals* of this library's steps: ``q = x * scale_x``.
The engine rounds ``floor(x + 0.5)`` and saturates; its ops say nothing else about rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import code_limits, is_power_of_two
from lightning_linger.core.sites import Site
from lightning_linger.export.dialect import Builder, Call, Dialect, shape_of
from lightning_linger.export.linger_schemas import DOMAIN, register_linger_schemas
from lightning_linger.export.linger_tidy import tidy

# The packer looks pools up by the limits of its first chip unless the node names another.
_PLAIN_POOL_KERNEL, _PLAIN_POOL_PAD = 5, 4

_NUMPY_CODES = {8: np.int8, 16: np.int16, 32: np.int32}
_CODE_TYPES = {8: ir.DataType.INT8, 16: ir.DataType.INT16, 32: ir.DataType.INT32}


# --- attributes -------------------------------------------------------------------------------


def _reciprocal(call: Call, step: float) -> float:
    if not is_power_of_two(step):
        msg = (
            f"`{call.site}`: the linger dialect needs power-of-two scales. Found the step {step}. "
            "Quantize with scale='power_of_two', or export with dialect='qdq'."
        )
        raise UnsupportedError(msg)
    return 1.0 / step


def _common(call: Call) -> dict[str, Any]:
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
    return _reciprocal(call, steps[0])


def _accumulator(call: Call) -> tuple[dict[str, Any], bool]:
    """Return the attributes of a layer, and whether its result has to become float again."""
    scale_x, scale_w = _reciprocal(call, call.scale_x), _weight_scale(call)
    float_result = call.scale_o == 0.0
    bits_o = 32 if float_result else call.bits_o
    scale_o = scale_x * scale_w if float_result else _reciprocal(call, call.scale_o)
    if scale_o > scale_x * scale_w and bits_o != 32:
        _refuse_left_shift(call)
    attributes = _common(call) | {
        "x_bits": call.bits_x,
        "scale_x": scale_x,
        "w_bits": call.bits_w,
        "scale_w": scale_w,
        "o_bits": bits_o,
        "scale_o": scale_o,
    }
    return attributes, float_result


def _refuse_left_shift(call: Call) -> None:
    msg = (
        f"`{call.site}`: the result is finer than the accumulator, and the engine only shifts "
        "right. Quantize for a platform that knows this ('venusa', 'arcs', 'venus', 'mars')."
    )
    raise UnsupportedError(msg)


# --- pieces -----------------------------------------------------------------------------------


def _window(
    builder: Builder, value: ir.Value, low: int, high: int, bits: int, own: bool = False
) -> ir.Value:
    """Clamp codes if the engine's own saturation is not enough: a ReLU, or a clip.

    ``own`` tells the clamp that is a site of its own from the one that completes another op.
    """
    least, most = code_limits(bits)
    if (low, high) == (least, most):
        return builder.node("Identity", [value]) if own else value
    if (low, high) == (0, most):
        return builder.node("Relu", [value], suffix="" if own else "relu")
    dtype = _NUMPY_CODES[_payload_bits(bits)]
    edges = [
        builder.constant(np.array(low, dtype), "min"),
        builder.constant(np.array(high, dtype), "max"),
    ]
    return builder.node("Clip", [value, *edges], suffix="" if own else "clip")


def _payload_bits(bits: int) -> int:
    return 8 if bits <= 8 else 16 if bits <= 16 else 32


def _layer(builder: Builder, call: Call, op_type: str, geometry: dict[str, Any]) -> ir.Value:
    """Add a layer's node, and what turns its accumulator into the result."""
    attributes, real = _accumulator(call)
    attributes |= geometry
    bias = None if call.bias is None else builder.parameter(call.bias, "bias")
    inputs = [call.x, builder.parameter(call.weight, "weight"), bias]
    if not real:
        value = builder.node(op_type, inputs, attributes, domain=DOMAIN)
        return _window(builder, value, call.low, call.high, call.bits_o)
    codes = builder.node(op_type, inputs, attributes, domain=DOMAIN, dtype=ir.DataType.INT32)
    scale = {"scale_o": attributes["scale_o"]}
    return builder.node("Dequant", [codes], scale, domain=DOMAIN, suffix="dequantize")


# --- entering, leaving and changing the grid --------------------------------------------------


def _quantize(builder: Builder, call: Call) -> ir.Value:
    attributes = _common(call) | {
        "data_bits": call.bits,
        "scale_x": _reciprocal(call, call.scale),
        "zero_point": 0,
    }
    value = builder.node("Quant", [call.x], attributes, domain=DOMAIN)
    return _window(builder, value, call.low, call.high, call.bits)


def _dequantize(builder: Builder, call: Call) -> ir.Value:
    attributes = {"scale_o": _reciprocal(call, call.scale)}
    return builder.node("Dequant", [call.x], attributes, domain=DOMAIN)


def _requantize(builder: Builder, call: Call) -> ir.Value:
    attributes = _requant_attributes(call, call.scale_x, call.scale_o, call.bits_x, call.bits)
    return builder.node("Requant", [call.x], attributes, domain=DOMAIN)


def _requant_attributes(
    call: Call, step_x: float, step_o: float, bits_x: int, bits_o: int
) -> dict[str, Any]:
    return _common(call) | {
        "data_bits": bits_x,
        "scale_x": _reciprocal(call, step_x),
        "o_bits": bits_o,
        "scale_o": _reciprocal(call, step_o),
    }


# --- layers -----------------------------------------------------------------------------------


def _conv(builder: Builder, call: Call) -> ir.Value:
    dims = len(call.stride)
    if dims > 2:
        _refuse(call, f"a {dims}-dimensional convolution")
    geometry = {
        "kernel_shape": shape_of(call.weight)[2:],
        "pads": [*call.padding, *call.padding],
        "strides": call.stride,
        "dilations": call.dilation,
        "group": call.groups,
    }
    if call.transposed:
        geometry["output_padding"] = call.output_padding
    op_type = f"QConv{'Transpose' if call.transposed else ''}{dims}d"
    return _layer(builder, call, op_type, geometry)


def _linear(builder: Builder, call: Call) -> ir.Value:
    return _layer(builder, call, "QLinear", {})


def _scale_shift(builder: Builder, call: Call) -> ir.Value:
    dims = max(len(shape_of(call.x)) - 2, 1)
    if dims > 2:
        _refuse(call, f"a {dims}-dimensional batch norm")
    return _layer(builder, call, f"QBatchNorm{dims}d", {})


def _refuse(call: Call, what: str) -> None:
    msg = (
        f"`{call.site}`: the linger dialect has no name for {what}. Leave the layer in float with "
        f"overrides={{'{call.site}': None}}."
    )
    raise UnsupportedError(msg)


# --- elementwise ------------------------------------------------------------------------------


def _pair(builder: Builder, call: Call) -> list[Any]:
    # A number is an initializer of the site, tensors are values.
    return [builder.parameter(call.x, "x"), builder.parameter(call.y, "y")]


def _pair_attributes(call: Call) -> dict[str, Any]:
    return _common(call) | {
        "x_bits": _bits_of(call.x),
        "scale_x": _reciprocal(call, call.scale_x),
        "y_bits": _bits_of(call.y),
        "scale_y": _reciprocal(call, call.scale_y),
        "o_bits": call.bits_o,
        "scale_o": _reciprocal(call, call.scale_o),
    }


def _bits_of(value: ir.Value) -> int:
    return next(bits for bits, dtype in _CODE_TYPES.items() if dtype == value.dtype)


def _add(builder: Builder, call: Call) -> ir.Value:
    if not call.round_operands:
        _refuse(call, "a sum that is rounded once; quantize for one of its own platforms")
    if call.scale_o < max(call.scale_x, call.scale_y):
        _refuse_left_shift(call)
    op_type = "QAdd" if call.sign > 0 else "QSub"
    value = builder.node(op_type, _pair(builder, call), _pair_attributes(call), domain=DOMAIN)
    return _window(builder, value, call.low, call.high, call.bits_o)


def _mul(builder: Builder, call: Call) -> ir.Value:
    if call.scale_o < call.scale_x * call.scale_y:
        _refuse_left_shift(call)
    value = builder.node("QMul", _pair(builder, call), _pair_attributes(call), domain=DOMAIN)
    return _window(builder, value, call.low, call.high, call.bits_o)


def _cat(builder: Builder, call: Call) -> ir.Value:
    attributes = _common(call)
    inputs = []
    for index, (value, step) in enumerate(zip(call.tensors, call.scales, strict=True)):
        operand, operand_step, bits = value, step, _bits_of(value)
        if step < call.scale_o and attributes["platform"] == "venusA":
            # This engine gives zeros for an operand that is finer than the result.
            operand = builder.node(
                "Requant",
                [value],
                _requant_attributes(call, step, call.scale_o, bits, call.bits_o),
                domain=DOMAIN,
                suffix=f"requantize{index}",
                shape=shape_of(value),
            )
            operand_step, bits = call.scale_o, call.bits_o
        inputs.append(operand)
        attributes[f"scale_x_{index}"] = _reciprocal(call, operand_step)
        attributes[f"x_{index}_bits"] = bits
    attributes |= {
        "axis": call.dim % len(shape_of(call.result)),
        "o_bits": call.bits_o,
        "scale_o": _reciprocal(call, call.scale_o),
    }
    return builder.node("QCat", inputs, attributes, domain=DOMAIN)


def _clamp(builder: Builder, call: Call) -> ir.Value:
    return _window(builder, call.x, call.low, call.high, call.bits, own=True)


# --- pools ------------------------------------------------------------------------------------


def _refuse_ceil_mode(call: Call) -> None:
    """Refuse ceil mode where it changes the result: the engine ignores it."""
    floors = [
        (size + 2 * pad - spread * (kernel - 1) - 1) // stride + 1
        for size, pad, spread, kernel, stride in zip(
            shape_of(call.x)[2:],
            call.padding,
            call.arguments.get("dilation") or [1] * len(call.kernel_size),
            call.kernel_size,
            call.stride,
            strict=False,
        )
    ]
    if call.ceil_mode and floors != shape_of(call.result)[2:]:
        msg = (
            f"`{call.site}`: the engine ignores ceil_mode=True, which changes the output size "
            "here. Use ceil_mode=False and pad the input."
        )
        raise UnsupportedError(msg)


def _average_attributes(
    call: Call, scale_x: float, scale_o: float, kernel: Sequence[int]
) -> dict[str, Any]:
    return _common(call) | {
        "x_bits": call.bits,
        "scale_x": _reciprocal(call, scale_x),
        "o_bits": call.bits,
        "scale_o": _reciprocal(call, scale_o),
        "kernel_shape": list(kernel),
        "strides": list(kernel),
        "pads": [0] * (2 * len(kernel)),
        "ceil_mode": 0,
        "count_include_pad": 1,
        "divisor_override": -1,
    }


def _avg_pool(builder: Builder, call: Call) -> ir.Value:
    dims = len(call.kernel_size)
    if dims > 2:
        _refuse(call, f"a {dims}-dimensional average pool")
    _refuse_ceil_mode(call)
    attributes = _average_attributes(call, call.scale_x, call.scale_o, call.kernel_size) | {
        "strides": call.stride,
        "pads": [*call.padding, *call.padding],
        "count_include_pad": int(call.count_include_pad),
        "divisor_override": call.divisor or -1,
    }
    return builder.node(f"QAvgPool{dims}d", [call.x], attributes, domain=DOMAIN)


def _mean(builder: Builder, call: Call) -> ir.Value:
    """Average over any dimensions as a global average pool of the engine."""
    shape = shape_of(call.x)
    rank = len(shape)
    dims = sorted(d % rank for d in call.dim)
    kept = [d for d in range(rank) if d not in dims]
    value = call.x
    if dims == [2, 3] and rank == 4:
        pooled, kernel = [shape[0], shape[1], 1, 1], [shape[2], shape[3]]
    else:
        if kept + dims != list(range(rank)):
            value = builder.node(
                "Transpose",
                [value],
                {"perm": kept + dims},
                suffix="transpose",
                shape=[shape[d] for d in kept + dims],
            )
        rows, count = math.prod(shape[d] for d in kept[1:]), math.prod(shape[d] for d in dims)
        pooled, kernel = [shape[kept[0]], rows, 1, 1], [1, count]
        value = _reshape(builder, value, [*pooled[:2], 1, count], "spread")
    attributes = _average_attributes(call, call.scale, call.scale, kernel)
    value = builder.node("QAvgPool2d", [value], attributes, domain=DOMAIN, shape=pooled)
    wanted = shape_of(call.result)
    if wanted == pooled:
        return value
    if wanted == pooled[:2]:
        return builder.node("Flatten", [value], {"axis": 1}, suffix="flatten")
    return _reshape(builder, value, wanted, "reshape")


def _reshape(builder: Builder, value: ir.Value, shape: list[int], suffix: str) -> ir.Value:
    target = builder.constant(np.array(shape, np.int64), f"{suffix}/shape")
    return builder.node("Reshape", [value, target], suffix=suffix, shape=shape)


def _max_pool(builder: Builder, call: Call) -> ir.Value:
    _refuse_ceil_mode(call)
    attributes: dict[str, Any] = {
        "kernel_shape": call.kernel_size,
        "strides": call.stride,
        "pads": [*call.padding, *call.padding],
    }
    if any(d != 1 for d in call.dilation):
        attributes["dilations"] = call.dilation
    domain = ""
    wide = max(call.kernel_size) > _PLAIN_POOL_KERNEL or max(call.padding) > _PLAIN_POOL_PAD
    if wide or _bits_of(call.x) != 8:
        # ONNX's own MaxPool takes no attribute that names the platform, and 8 bits only.
        domain = DOMAIN
        attributes["platform"] = _common(call)["platform"]
    return builder.node("MaxPool", [call.x], attributes, domain=domain)


# --- the dialect ------------------------------------------------------------------------------


def _check(sites: Sequence[Site]) -> None:
    """Refuse targets that do not read this dialect, and graphs for two targets at once."""
    first: Site | None = None
    for site in sites:
        platform = site.platform
        if platform is None:
            continue
        if platform.dialect != "linger":
            msg = (
                f"`{site.key}` is quantized for platform {platform.name!r}, which reads the "
                f"{platform.dialect!r} dialect. Export with dialect={platform.dialect!r}, or "
                "quantize for 'venusa', 'arcs', 'venus' or 'mars'."
            )
            raise UnsupportedError(msg)
        if first is None:
            first = site
        elif first.platform is not None and first.platform.name != platform.name:
            msg = (
                f"a linger graph has one platform. Found {first.platform.name!r} at `{first.key}` "
                f"and {platform.name!r} at `{site.key}`. Give all layers the same platform."
            )
            raise UnsupportedError(msg)


register_linger_schemas()

LINGER = Dialect(
    name="linger",
    table={
        "quantize": _quantize,
        "dequantize": _dequantize,
        "requantize": _requantize,
        "conv": _conv,
        "linear": _linear,
        "scale_shift": _scale_shift,
        "add": _add,
        "mul": _mul,
        "cat": _cat,
        "clamp": _clamp,
        "avg_pool": _avg_pool,
        "mean": _mean,
        "max_pool": _max_pool,
    },
    # What the packer's own ONNX release reads.
    opset_version=18,
    ir_version=8,
    domains={DOMAIN: 1},
    check=_check,
    finish=tidy,
)
