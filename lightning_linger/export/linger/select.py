"""Choosing by a mask that is a constant of the model: products with zeros and ones, and sums.

The engine has no selection. A code times 1 at scale 1 is the same code, times 0 it is 0, and the
sum of two operands of which one is 0 is the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.core.integer import code_limits
from lightning_linger.core.rounding import round_value
from lightning_linger.export.dialect import Builder, Call, Translation, shape_of
from lightning_linger.export.linger.attributes import (
    common_attributes,
    reciprocal,
    refuse_because,
    requant_attributes,
)
from lightning_linger.export.linger.schema import DOMAIN
from lightning_linger.export.runner.plain import run_plain
from lightning_linger.ops.select import INFINITE

Array = NDArray[Any]


def constant_of(value: ir.Value) -> Array | None:
    """Return a value that follows from constants of the graph, None for every other."""
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.domain != "" or value.graph is None:
        return None
    inputs: list[Array | None] = []
    for source in node.inputs:
        found = None if source is None else constant_of(source)
        if source is not None and found is None:
            return None
        inputs.append(found)
    results = run_plain(ir.to_proto(node), inputs, value.graph.opset_imports.get("", 18))
    return np.asarray(results[list(node.outputs).index(value)])


def _mask(call: Call) -> Array:
    """Return the mask in the shape of the result."""
    found = constant_of(call.mask)
    if found is None:
        refuse_because(
            call,
            f"`{call.op}` by a mask that is computed",
            "the engine has no selection; a mask that is a constant becomes a product",
            "Keep the mask in a buffer of the model",
        )
    return np.broadcast_to(found, tuple(shape_of(call.result)))


class _Selection:
    """Adds nodes on codes that have one scale.

    Args:
        builder: Of the op.
        call: The op.
        step: The scale.
    """

    def __init__(self, builder: Builder, call: Call, step: float) -> None:
        self.builder = builder
        self.call = call
        self.step = step
        self.bits: int = call.bits
        self.dtype = np.int8 if self.bits <= 8 else np.int16

    def at_scale(self, value: ir.Value, step: float, name: str) -> ir.Value:
        """Bring an operand to the scale."""
        if step == self.step:
            return value
        attributes = requant_attributes(self.call, step, self.step, self.bits, self.bits)
        return self.builder.node(
            "Requant",
            [value],
            attributes,
            domain=DOMAIN,
            suffix=f"{name}/requantize",
            shape=shape_of(value),
        )

    def kept(self, value: ir.Value, where: Array, name: str) -> ir.Value:
        """Put zeros where a mask is false."""
        factors = self.builder.constant(where.astype(self.dtype), f"{name}/mask")
        return self._pair("QMul", value, factors, 1.0, f"{name}/kept")

    def added(self, value: ir.Value, other: ir.Value | Array, name: str) -> ir.Value:
        """Add codes; the one that makes the result has no name of its own."""
        if not isinstance(other, ir.Value):
            other = self.builder.constant(other.astype(self.dtype), f"{name or 'sum'}/codes")
        return self._pair("QAdd", value, other, self.step, name)

    def filled(self, value: ir.Value, where: Array, code: int) -> ir.Value:
        """Put one code where a mask is true."""
        kept = self.kept(value, np.logical_not(where), "x")
        return self.added(kept, np.where(where, code, 0), "")

    def _pair(self, op_type: str, x: ir.Value, y: ir.Value, step_y: float, suffix: str) -> ir.Value:
        scale = reciprocal(self.call, self.step)
        attributes = common_attributes(self.call) | {
            "x_bits": self.bits,
            "scale_x": scale,
            "y_bits": self.bits,
            "scale_y": reciprocal(self.call, step_y),
            "o_bits": self.bits,
            "scale_o": scale,
        }
        return self.builder.node(op_type, [x, y], attributes, domain=DOMAIN, suffix=suffix)


def _where(builder: Builder, call: Call) -> ir.Value:
    mask = _mask(call)
    selection = _Selection(builder, call, call.scale_o)
    x = selection.kept(selection.at_scale(call.x, call.scale_x, "x"), mask, "x")
    y = selection.at_scale(call.y, call.scale_y, "y")
    return selection.added(x, selection.kept(y, np.logical_not(mask), "y"), "")


def _masked_fill(builder: Builder, call: Call) -> ir.Value:
    mask = _mask(call)
    selection = _Selection(builder, call, call.scale_o)
    return selection.filled(selection.at_scale(call.x, call.scale_x, "x"), mask, call.code)


def _add_mask(builder: Builder, call: Call) -> ir.Value:
    mask = _mask(call)
    low, high = code_limits(call.bits)
    hidden = mask <= -INFINITE
    finite = np.where(hidden, 0.0, mask.astype(np.float32)) / np.float32(call.scale)
    codes = np.clip(np.vectorize(round_value)(finite, call.rounding), low, high)
    selection = _Selection(builder, call, call.scale)
    value: ir.Value = call.x
    if codes.any():
        value = selection.added(value, codes, "bias" if hidden.any() else "")
    if hidden.any():
        return selection.filled(value, hidden, low)
    return value if codes.any() else builder.node("Identity", [value])


TABLE: dict[str, Translation] = {
    "where": _where,
    "masked_fill": _masked_fill,
    "add_mask": _add_mask,
}

SCHEMAS: list[OpSchema] = []
