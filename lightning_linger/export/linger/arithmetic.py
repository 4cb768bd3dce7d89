"""Quotients. A division by a number is recorded as a product."""

from __future__ import annotations

from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.export.dialect import Builder, Call, Translation
from lightning_linger.export.linger.attributes import pair_attributes, pair_inputs, window
from lightning_linger.export.linger.schema import DOMAIN, pair_schema


def _div(builder: Builder, call: Call) -> ir.Value:
    # The name of the older generation: the newer one has no division.
    inputs, attributes = pair_inputs(builder, call), pair_attributes(call)
    value = builder.node("iqDiv", inputs, attributes, domain=DOMAIN)
    return window(builder, value, call.low, call.high, call.bits_o)


TABLE: dict[str, Translation] = {"div": _div}

SCHEMAS: list[OpSchema] = [pair_schema("iqDiv")]
