"""Pools and means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.dialect import Builder, Call, Translation, shape_of
from lightning_linger.export.linger.attributes import (
    bits_of,
    common_attributes,
    reciprocal,
    refuse,
    refuse_because,
    reshape,
)
from lightning_linger.export.linger.elementwise import MAX_CAT_OPERANDS
from lightning_linger.export.linger.schema import (
    COMMON,
    DOMAIN,
    O_GRID,
    OPTIONAL,
    WINDOW,
    X_GRID,
    type_by_o_bits,
    type_of_input,
    unary_schema,
    window_sizes,
)
from lightning_linger.export.schemas import CODE_TYPES, INT, INTS, STRING, Shape

# The packer looks pools up by the limits of its first chip unless the node names another.
_PLAIN_POOL_KERNEL, _PLAIN_POOL_PAD = 5, 4


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
    return common_attributes(call) | {
        "x_bits": call.bits,
        "scale_x": reciprocal(call, scale_x),
        "o_bits": call.bits,
        "scale_o": reciprocal(call, scale_o),
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
        refuse(call, f"a {dims}-dimensional average pool")
    _refuse_ceil_mode(call)
    _refuse_other_divisors(call)
    window = _window(call)
    shape, wanted = shape_of(call.x), shape_of(call.result)
    plane, pooled = (_plane(shape), _plane(wanted)) if dims == 1 else (shape, wanted)
    value = call.x if dims == 2 else reshape(builder, call.x, plane, "plane")
    attributes = _average_attributes(call, call.scale_x, call.scale_o, window["kernel_shape"])
    value = _average(builder, call, value, attributes | window, pooled)
    return value if dims == 2 else reshape(builder, value, wanted, "row")


def _refuse_other_divisors(call: Call) -> None:
    """Refuse averages whose divisor is not the size of the window, which the engine ignores."""
    if not call.count_include_pad and any(call.padding):
        refuse_because(
            call,
            "an average pool with count_include_pad=False",
            "the engine counts the zeros that it pads",
            "Set count_include_pad=True",
        )
    if call.divisor and call.divisor != math.prod(call.kernel_size):
        refuse_because(
            call,
            "an average pool with a divisor_override",
            "the engine divides by the size of the window",
            "Leave divisor_override away",
        )


def _window(call: Call) -> dict[str, list[int]]:
    """Return the geometry of a window on maps; rows are maps with a height of 1."""
    neutral = [] if len(call.kernel_size) == 2 else [1]
    pads = [*[0] * len(neutral), *call.padding]
    return {
        "kernel_shape": [*neutral, *call.kernel_size],
        "strides": [*neutral, *call.stride],
        "pads": [*pads, *pads],
    }


def _plane(shape: Sequence[int]) -> list[int]:
    return [*shape[:2], 1, *shape[2:]]


def _average(
    builder: Builder, call: Call, value: ir.Value, attributes: dict[str, Any], pooled: list[int]
) -> ir.Value:
    """Add an average pool, over repeated channels where the engine's own memory would not do."""
    repeats = _repeats(call, shape_of(value), attributes)
    if repeats == 1:
        return builder.node("QAvgPool2d", [value], attributes, domain=DOMAIN, shape=pooled)
    batch, channels, *sizes = shape_of(value)
    scale = attributes["scale_x"]
    join = common_attributes(call) | {"axis": 1, "o_bits": call.bits, "scale_o": scale}
    for index in range(repeats):
        join |= {f"scale_x_{index}": scale, f"x_{index}_bits": call.bits}
    many = repeats * channels
    value = builder.node(
        "QCat",
        [value] * repeats,
        join,
        domain=DOMAIN,
        suffix="repeat",
        shape=[batch, many, *sizes],
    )
    shape = [pooled[0], many, *pooled[2:]]
    value = builder.node("QAvgPool2d", [value], attributes, domain=DOMAIN, shape=shape)
    bounds = [
        builder.constant(np.array([number], np.int64), f"first/{name}")
        for name, number in (("starts", 0), ("ends", channels), ("axes", 1))
    ]
    return builder.node("Slice", [value, *bounds], suffix="first", shape=pooled)


def _repeats(call: Call, shape: list[int], attributes: Mapping[str, Any]) -> int:
    """Return how often the channels have to be there for the engine to find room to average.

    Over a whole map whose size is no power of two, it lays one byte per place into room for one
    32-bit number per channel.
    """
    kernel, pads = attributes["kernel_shape"], attributes["pads"]
    count: int = math.prod(kernel)
    whole = [size + pads[i] + pads[i + 2] for i, size in enumerate(shape[2:])] == kernel
    roomy = call.target is not None and call.target.engine_name == "venus"
    if roomy or not whole or count & (count - 1) == 0:
        return 1
    repeats = math.ceil(count / (4 * shape[1]))
    if repeats > MAX_CAT_OPERANDS:
        refuse_because(
            call,
            f"an average over {count} values of {shape[1]} channel(s)",
            "they do not fit into the engine's memory for it",
            "Use a power of two of values, or average more channels at once",
        )
    return repeats


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
        value = reshape(builder, value, [*pooled[:2], 1, count], "spread")
    attributes = _average_attributes(call, call.scale, call.scale, kernel)
    value = _average(builder, call, value, attributes, pooled)
    wanted = shape_of(call.result)
    if wanted == pooled:
        return value
    if wanted == pooled[:2]:
        return builder.node("Flatten", [value], {"axis": 1}, suffix="flatten")
    return reshape(builder, value, wanted, "reshape")


def _max_pool(builder: Builder, call: Call) -> ir.Value:
    dims = len(call.kernel_size)
    if dims > 2:
        refuse(call, f"a {dims}-dimensional max pool")
    _refuse_ceil_mode(call)
    if any(d != 1 for d in call.dilation):
        refuse_because(call, "a max pool with dilation", "the engine ignores it", "Set dilation=1")
    attributes: dict[str, Any] = _window(call)
    domain = ""
    wide = max(call.kernel_size) > _PLAIN_POOL_KERNEL or max(call.padding) > _PLAIN_POOL_PAD
    if wide or bits_of(call.x) != 8:
        # ONNX's own MaxPool takes no attribute that names the platform, and 8 bits only.
        domain = DOMAIN
        attributes["platform"] = common_attributes(call)["platform"]
    if dims == 2:
        return builder.node("MaxPool", [call.x], attributes, domain=domain)
    shape, wanted = shape_of(call.x), shape_of(call.result)
    value = reshape(builder, call.x, _plane(shape), "plane")
    value = builder.node("MaxPool", [value], attributes, domain=domain, shape=_plane(wanted))
    return reshape(builder, value, wanted, "row")


def _pool_shape(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    return [*shapes[0][:2], *window_sizes(attributes, shapes[0][2:])]


TABLE: dict[str, Translation] = {
    "avg_pool": _avg_pool,
    "mean": _mean,
    "max_pool": _max_pool,
}

_AVERAGE = {
    **{**COMMON, **X_GRID, **O_GRID, **WINDOW},
    **{"ceil_mode": INT, "count_include_pad": INT, "divisor_override": INT},
}

SCHEMAS: list[OpSchema] = [
    *(
        unary_schema(
            f"QAvgPool{d}d",
            CODE_TYPES,
            CODE_TYPES,
            _AVERAGE,
            OPTIONAL,
            _pool_shape,
            type_by_o_bits,
        )
        for d in (1, 2)
    ),
    unary_schema(
        "MaxPool",
        CODE_TYPES,
        CODE_TYPES,
        {"platform": STRING, **WINDOW},
        {"dilations": INTS},
        _pool_shape,
        type_of_input,
    ),
]
