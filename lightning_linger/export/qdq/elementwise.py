"""Sums, products, joins and clamps."""

from __future__ import annotations

from onnxscript import ir

from lightning_linger.core.integer import code_limits
from lightning_linger.export.dialect import shape_of
from lightning_linger.export.qdq.writer import Write, Writer, array_of, scale_of, width_of


def operand(w: Writer, name: str, rank: int) -> ir.Value:
    """Dequantize an operand after bringing it to ``rank`` dimensions.

    Operands of one rank meet in one code path of onnxruntime's addition, whatever layout it has
    chosen for them.
    """
    value: ir.Value = w.call.arguments[name]
    scale = w.call.arguments[f"scale_{name}"]
    shape = shape_of(value)
    shape = [*[1] * (rank - len(shape)), *shape]
    if value.const_value is not None:
        codes = w.storages[width_of(value)].store(array_of(value)).reshape(shape)
        return w.real(w.constant(codes, name), scale, name)
    return w.real(w.reshape(value, shape, f"{name}/rank"), scale, name)


def pair(w: Writer) -> list[ir.Value]:
    """Dequantize two operands of one op."""
    rank = max(len(shape_of(w.call.x)), len(shape_of(w.call.y)))
    return [operand(w, name, rank) for name in ("x", "y")]


def _add(w: Writer) -> ir.Value:
    call = w.call
    x, y = pair(w)
    if call.sign > 0 and shape_of(x)[::-1] < shape_of(y)[::-1]:
        x, y = y, x  # the kernel's order: what is broadcast stands second
    value = w.node("Add" if call.sign > 0 else "Sub", [x, y], shape_of(call.result))
    return w.result(value, call.scale_o, call.bits_o, call.low, call.high)


def _mul(w: Writer) -> ir.Value:
    call = w.call
    value = w.node("Mul", pair(w), shape_of(call.result))
    return w.result(value, call.scale_o, call.bits_o, call.low, call.high)


def _cat(w: Writer) -> ir.Value:
    call = w.call
    parts = [
        w.real(x, scale, f"x{index}")
        for index, (x, scale) in enumerate(zip(call.tensors, call.scales, strict=True))
    ]
    shape = shape_of(call.result)
    value = w.node("Concat", parts, shape, {"axis": call.dim % len(shape)})
    return w.result(value, call.scale_o, call.bits_o, *code_limits(call.bits_o))


def _clamp(w: Writer) -> ir.Value:
    call = w.call
    return w.clamp(call.x, scale_of(call.x), call.bits, call.low, call.high)


TABLE: dict[str, Write] = {
    "add": _add,
    "mul": _mul,
    "cat": _cat,
    "clamp": _clamp,
}
