"""Entering, leaving and changing the grid."""

from __future__ import annotations

from onnxscript import ir

from lightning_linger.core.integer import code_limits
from lightning_linger.export.dialect import Boundary, shape_of
from lightning_linger.export.qdq.writer import Write, Writer


def _quantize(w: Writer) -> ir.Value:
    call = w.call
    return w.result(call.x, call.scale, call.bits, call.low, call.high)


def _dequantize(w: Writer) -> ir.Value:
    return w.real(w.call.x, w.call.scale, "x")


def _requantize(w: Writer) -> ir.Value:
    call = w.call
    ratio = w.number(call.scale_x / call.scale_o, "ratio")
    value = w.node("Mul", [w.real(call.x, 1.0, "x"), ratio], shape_of(call.x))
    return w.result(value, 1.0, call.bits, *code_limits(call.bits), fused=False)


def _grid(node: ir.Node) -> tuple[float, int]:
    step, zero_point = (v.const_value for v in node.inputs[1:3] if v is not None)
    assert step is not None
    assert zero_point is not None
    return float(step.numpy()), int(zero_point.numpy())


BOUNDARY = Boundary("QuantizeLinear", "DequantizeLinear", _grid)

TABLE: dict[str, Write] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "requantize": _requantize,
}
