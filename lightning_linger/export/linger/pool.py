"""Pools and means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.dialect import Builder, Call, Translation, shape_of
from lightning_linger.export.linger.attributes import (
    bits_of,
    common_attributes,
    reciprocal,
    refuse,
    reshape,
)
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
        value = reshape(builder, value, [*pooled[:2], 1, count], "spread")
    attributes = _average_attributes(call, call.scale, call.scale, kernel)
    value = builder.node("QAvgPool2d", [value], attributes, domain=DOMAIN, shape=pooled)
    wanted = shape_of(call.result)
    if wanted == pooled:
        return value
    if wanted == pooled[:2]:
        return builder.node("Flatten", [value], {"axis": 1}, suffix="flatten")
    return reshape(builder, value, wanted, "reshape")


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
    if wide or bits_of(call.x) != 8:
        # ONNX's own MaxPool takes no attribute that names the platform, and 8 bits only.
        domain = DOMAIN
        attributes["platform"] = common_attributes(call)["platform"]
    return builder.node("MaxPool", [call.x], attributes, domain=domain)


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
