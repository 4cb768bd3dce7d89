"""Adding nodes around stored codes, which every op of the ``qdq`` dialect does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import code_limits
from lightning_linger.export.dialect import Builder, Call, Results, dtype_of, shape_of

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32

# Marks a value that holds stored codes.
_STORED = "lightning_linger.stored"

_WIDTHS = {
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
    ir.DataType.INT16: 16,
    ir.DataType.UINT16: 16,
}
# The types of codes: as they are recorded and as they are stored.
CODES = frozenset(_WIDTHS)


# --- stored codes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """How codes of one width are stored: ``stored = code + zero``."""

    bits: int
    dtype: ir.DataType
    numpy: type[np.integer[Any]]
    zero: int

    def store(self, codes: NDArray[Any]) -> NDArray[Any]:
        """Return codes as they are stored."""
        return (codes.astype(np.int64) + self.zero).astype(self.numpy)


UNSIGNED = {
    8: Storage(8, ir.DataType.UINT8, np.uint8, 2**7),
    16: Storage(16, ir.DataType.UINT16, np.uint16, 2**15),
}
SIGNED = {
    8: Storage(8, ir.DataType.INT8, np.int8, 0),
    16: Storage(16, ir.DataType.INT16, np.int16, 0),
}


@dataclass(frozen=True)
class Form:
    """What an export may choose.

    Args:
        storages: How codes are stored, by width.
        int4_weights: Whether weights of up to 4 bits are stored as int4.
        wide: Whether the opset quantizes to 16 bits.
    """

    storages: dict[int, Storage]
    int4_weights: bool = False
    wide: bool = True


def width_of(value: ir.Value) -> int:
    """Return the width that codes are stored in."""
    return _WIDTHS[dtype_of(value)]


def payload_width(bits: int) -> int:
    """Return the width of the storage of codes."""
    return 8 if bits <= 8 else 16


class Writer:
    """Adds the nodes of one recorded op.

    Args:
        builder: Of the op.
        call: The op.
        form: What the export has chosen.
    """

    def __init__(self, builder: Builder, call: Call, form: Form) -> None:
        self.builder = builder
        self.call = call
        self.form = form
        self.storages = form.storages

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int],
        attributes: dict[str, Any] | None = None,
        suffix: str = "",
        dtype: ir.DataType = FLOAT,
    ) -> ir.Value:
        """Add a node; the op's main one has no suffix."""
        return self.builder.node(
            op_type, inputs, attributes, suffix=suffix, dtype=dtype, shape=shape
        )

    def constant(self, value: Any, suffix: str) -> ir.Value:
        """Add an initializer."""
        return self.builder.constant(np.asarray(value), suffix)

    def number(self, value: Any, suffix: str) -> ir.Value:
        """Add float32 numbers."""
        return self.constant(np.asarray(value, np.float32), suffix)

    def storage(self, bits: int) -> Storage:
        """Return how codes of a width are stored."""
        width = payload_width(bits)
        if width > 8 and not self.form.wide:
            msg = (
                f"`{self.call.site}`: codes of {bits} bits need opset_version=21 or later. Leave "
                "`opset_version` out, or use 8 bits."
            )
            raise UnsupportedError(msg)
        return self.storages[width]

    # --- entering and leaving the grid ------------------------------------------------------

    def real(self, value: ir.Value, scale: float, suffix: str) -> ir.Value:
        """Dequantize stored codes, with scale 1 to compute on the codes themselves."""
        if dtype_of(value) == INT32:
            return self._dequantize(value, scale, np.int32(0), suffix)
        storage = self.storages[width_of(value)]
        return self._dequantize(value, scale, storage.numpy(storage.zero), suffix)

    def _dequantize(
        self, value: ir.Value, scale: Any, zero: Any, suffix: str, axis: int | None = None
    ) -> ir.Value:
        # Always with a zero point: onnxruntime does not fuse every operator without.
        inputs = [
            value,
            self.number(scale, f"{suffix}/scale"),
            self.constant(zero, f"{suffix}/zero_point"),
        ]
        attributes = None if axis is None else {"axis": axis}
        return self.node(
            "DequantizeLinear", inputs, shape_of(value), attributes, f"{suffix}/dequantize"
        )

    def parameter(
        self, codes: NDArray[Any], scales: NDArray[np.float32], suffix: str, axis: int = 0
    ) -> ir.Value:
        """Add a dequantized weight or bias, with one scale or one per entry of ``axis``."""
        if codes.dtype == np.int8 and self.form.int4_weights and _fits_int4(self.call, codes):
            codes = codes.astype(ir.DataType.INT4.numpy())
        zeros = np.zeros(scales.shape, codes.dtype)
        per_axis = axis if scales.ndim else None
        return self._dequantize(self.constant(codes, suffix), scales, zeros, suffix, per_axis)

    def quantize(
        self, value: ir.Value, scale: float, bits: int, suffix: str = "quantize"
    ) -> ir.Value:
        """Round real values to stored codes; the storage saturates."""
        storage = self.storage(bits)
        inputs = [
            value,
            self.number(scale, f"{suffix}/scale"),
            self.constant(storage.numpy(storage.zero), f"{suffix}/zero_point"),
        ]
        return mark(
            self.node("QuantizeLinear", inputs, shape_of(value), None, suffix, storage.dtype)
        )

    def result(
        self, value: ir.Value, scale: float, bits: int, low: int, high: int, fused: bool = True
    ) -> ir.Value:
        """Quantize the result of the main operator, and clamp it if the storage does not.

        Between a fused operator and its QuantizeLinear nothing may stand. A clamp behind them is
        exact: a code that is dequantized and quantized with one scale is the same code.
        """
        clamped = (low, high) != code_limits(payload_width(bits))
        if clamped and not fused:
            value = self.clip(value, scale, bits, low, high)
        codes = self.quantize(value, scale, bits)
        if clamped and fused:
            return self.clamp(codes, scale, bits, low, high)
        return codes

    def clamp(self, codes: ir.Value, scale: float, bits: int, low: int, high: int) -> ir.Value:
        """Clamp stored codes."""
        real = self.real(codes, scale, "clamp")
        return self.quantize(self.clip(real, scale, bits, low, high), scale, bits, "clamp/quantize")

    def clip(self, value: ir.Value, scale: float, bits: int, low: int, high: int) -> ir.Value:
        """Clamp real values between two codes; a ReLU where only negative values go."""
        if (low, high) == (0, code_limits(payload_width(bits))[1]):
            return self.node("Relu", [value], shape_of(value), suffix="relu")
        edges = [
            self.number(np.float32(edge) * np.float32(scale), f"clip/{name}")
            for edge, name in ((low, "min"), (high, "max"))
        ]
        return self.node("Clip", [value, *edges], shape_of(value), suffix="clip")

    def reshape(self, value: ir.Value, shape: Sequence[int], suffix: str) -> ir.Value:
        """Reshape; stored codes stay stored codes."""
        if shape_of(value) == list(shape):
            return value
        target = self.constant(np.array(shape, np.int64), f"{suffix}/shape")
        width = dtype_of(value)
        dtype = self.storages[_WIDTHS[width]].dtype if width in CODES else width
        reshaped = self.node("Reshape", [value, target], shape, suffix=suffix, dtype=dtype)
        return mark(reshaped) if width in CODES else reshaped


# How one recorded op is written.
Write = Callable[[Writer], Results]


def _fits_int4(call: Call, codes: NDArray[Any]) -> bool:
    low, high = code_limits(4)
    return bool(call.arguments.get("bits_w", 8) <= 4 and low <= codes.min() <= codes.max() <= high)


# --- values -------------------------------------------------------------------------------------


def mark(value: ir.Value) -> ir.Value:
    """Note that a value holds stored codes."""
    value.meta[_STORED] = True
    return value


def is_stored(value: ir.Value) -> bool:
    """Whether a value holds stored codes."""
    return _STORED in value.meta


def scale_of(value: ir.Value) -> float:
    """Return the scale that stored codes were quantized with, wherever they were moved since."""
    node = value.producer()
    while node is not None and node.op_type != "QuantizeLinear":
        source = node.inputs[0] if node.inputs else None
        node = None if source is None else source.producer()
    scale = None if node is None or node.inputs[1] is None else node.inputs[1].const_value
    # Clamps and maxima do not depend on the scale; 1 is right for any.
    return 1.0 if scale is None else float(scale.numpy())


def array_of(value: ir.Value) -> NDArray[Any]:
    """Return a parameter, which is a constant of the graph."""
    if value.const_value is None:
        msg = f"internal: the parameter {value.name!r} is not a constant of the graph."
        raise RuntimeError(msg)
    return value.const_value.numpy()


def batched_shape(value: ir.Value, dims: int) -> list[int]:
    """Return a shape with the batch dimension."""
    shape = shape_of(value)
    return shape if len(shape) == dims + 2 else [1, *shape]


def batched(w: Writer, value: ir.Value, dims: int) -> ir.Value:
    """Give an input without batch dimension one, which ONNX asks for."""
    return w.reshape(value, batched_shape(value, dims), "batched")
