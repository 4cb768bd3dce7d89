"""Embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.export.dialect import Builder, Call, Translation
from lightning_linger.export.linger.attributes import common_attributes, reciprocal
from lightning_linger.export.linger.schema import (
    COMMON,
    DOMAIN,
    O_GRID,
    OPTIONAL,
    W_GRID,
    type_of_input,
)
from lightning_linger.export.schemas import INT, Shape, input_of, schema_of


def _embedding(builder: Builder, call: Call) -> ir.Value:
    scale = reciprocal(call, call.scale)
    attributes = common_attributes(call) | {
        "axis": 0,
        "w_bits": call.bits,
        "scale_w": scale,
        "o_bits": call.bits,
        "scale_o": scale,
    }
    inputs = [builder.parameter(call.weight, "weight"), call.indices]
    return builder.node("Gather", inputs, attributes, domain=DOMAIN)


def _rows_shape(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    table, indices = shapes
    return [*indices, *table[1:]]


TABLE: dict[str, Translation] = {"embedding": _embedding}

SCHEMAS: list[OpSchema] = [
    schema_of(
        "Gather",
        DOMAIN,
        [
            input_of("weight", ["tensor(int8)", "tensor(int16)"]),
            input_of("indices", ["tensor(int32)", "tensor(int64)"]),
        ],
        ["tensor(int8)", "tensor(int16)"],
        {**COMMON, **W_GRID, **O_GRID, "axis": INT},
        OPTIONAL,
        _rows_shape,
        type_of_input,
    )
]
