"""Interpolation: nearest neighbours are moved codes, weights have no place."""

from __future__ import annotations

from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.export.dialect import Builder, Call, Translation
from lightning_linger.export.linger.attributes import refuse_because


def _resize_linear(builder: Builder, call: Call) -> ir.Value:
    refuse_because(
        call,
        "a linear interpolation",
        "the engine moves whole values only",
        "Use mode='nearest' or a transposed convolution",
    )


TABLE: dict[str, Translation] = {"resize_linear": _resize_linear}

SCHEMAS: list[OpSchema] = []
