"""Extremes that a pool of the engine finds, and places; everything else is refused."""

from __future__ import annotations

import math

from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.export.dialect import Builder, Call, Translation, shape_of
from lightning_linger.export.linger.attributes import (
    bits_of,
    common_attributes,
    refuse_because,
    reshape,
)
from lightning_linger.export.linger.schema import DOMAIN

_NO_KERNEL = "the engine has no kernel for it"
_OUTSIDE = "Take it outside the model"


def _largest(builder: Builder, call: Call, dims: list[int], shape: list[int]) -> ir.Value:
    """Add a maximum over dimensions as a pool over the whole width of a map."""
    if not call.largest:
        refuse_because(call, "a minimum", _NO_KERNEL, "Use the maximum of the negated values")
    sizes = shape_of(call.x)
    kept = [d for d in range(len(sizes)) if d not in dims]
    value = call.x
    if kept + dims != list(range(len(sizes))):
        turned = [sizes[d] for d in kept + dims]
        value = builder.node(
            "Transpose", [value], {"perm": kept + dims}, suffix="transpose", shape=turned
        )
    count = math.prod(sizes[d] for d in dims)
    batch = sizes[kept[0]] if kept else 1
    rows = math.prod(sizes[d] for d in kept[1:])
    value = reshape(builder, value, [batch, rows, 1, count], "spread")
    attributes = {"kernel_shape": [1, count], "strides": [1, count], "pads": [0, 0, 0, 0]}
    domain = ""
    if bits_of(call.x) != 8:
        # ONNX's own MaxPool takes 8 bits only.
        domain = DOMAIN
        attributes["platform"] = common_attributes(call)["platform"]
    pooled = [batch, rows, 1, 1]
    value = builder.node("MaxPool", [value], attributes, domain=domain, suffix="pool", shape=pooled)
    return reshape(builder, value, shape, "shape")


def _amax(builder: Builder, call: Call) -> ir.Value:
    rank = len(shape_of(call.x))
    return _largest(builder, call, sorted(d % rank for d in call.dim), shape_of(call.result))


def _max(builder: Builder, call: Call) -> list[ir.Value]:
    values, index = call.results
    found = _largest(builder, call, [call.dim], shape_of(values))
    if not index.uses() and not index.is_graph_output():
        return [found, found]
    return [found, _place(builder, call, shape_of(index), "index")]


def _argmax(builder: Builder, call: Call) -> ir.Value:
    return _place(builder, call, shape_of(call.result), "")


def _place(builder: Builder, call: Call, shape: list[int], suffix: str) -> ir.Value:
    """Add ONNX's own search along the last axis.

    By its sources the engine writes the largest values in front of the places, in one int32 result;
    a reader of the image has to know. This was not measured.
    """
    if not call.largest:
        refuse_because(call, "argmin", _NO_KERNEL, "Use the argmax of the negated values")
    if call.dim != len(shape_of(call.x)) - 1:
        refuse_because(
            call, "argmax along this axis", "the engine searches the last one", "Move the axis"
        )
    if bits_of(call.x) != 8:
        refuse_because(
            call, "argmax of 16-bit codes", "the engine reads 8 bits", "Set activation_bits=8"
        )
    attributes = {"axis": -1, "keepdims": int(call.keepdim)}
    return builder.node(
        "ArgMax", [call.x], attributes, suffix=suffix, dtype=ir.DataType.INT64, shape=shape
    )


def _refused(what: str, why: str, remedy: str) -> Translation:
    def refuse(builder: Builder, call: Call) -> ir.Value:
        refuse_because(call, what, why, remedy)

    return refuse


TABLE: dict[str, Translation] = {
    "amax": _amax,
    "max": _max,
    "argmax": _argmax,
    "sum": _refused(
        "sum",
        "the engine's own one adds up the first row only",
        "Use a mean, whose scale its consumer takes in",
    ),
    "cumsum": _refused("cumsum", _NO_KERNEL, _OUTSIDE),
    "var": _refused(
        "var or std", "the engine's own one does not square the values it sums", _OUTSIDE
    ),
    "maximum": _refused("maximum or minimum", _NO_KERNEL, "Use a ReLU of the difference"),
    "topk": _refused("topk or sort", _NO_KERNEL, _OUTSIDE),
}

SCHEMAS: list[OpSchema] = []
