"""Whole numbers and float64 between stored codes, the ONNX form of what is exact in our kernels.

Sums are taken in integers or in float64 below 2^53, where their order does not matter. Quotients,
roots and products are single IEEE operations on float64, which onnxruntime has on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnxscript import ir

from lightning_linger.core.integer import code_limits
from lightning_linger.export.dialect import shape_of
from lightning_linger.export.qdq.writer import FLOAT, INT32, Writer

DOUBLE, INT64 = ir.DataType.DOUBLE, ir.DataType.INT64


class Steps:
    """Adds nodes one after the other, each named by what it computes.

    Args:
        w: Of the op.
    """

    def __init__(self, w: Writer) -> None:
        self.w = w

    def add(
        self,
        suffix: str,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Sequence[int] | None = None,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node; its shape and type are those of its first input unless given."""
        sizes = shape_of(inputs[0]) if shape is None else shape
        kind = inputs[0].dtype if dtype is None else dtype
        assert kind is not None
        return self.w.node(op_type, inputs, sizes, attributes, suffix, kind)

    def cast(self, suffix: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Convert whole numbers that the type holds."""
        return self.add(suffix, "Cast", [value], dtype=dtype, to=dtype)

    def codes(self, value: ir.Value, dtype: ir.DataType = INT32, name: str = "x") -> ir.Value:
        """Return stored codes as whole numbers."""
        return self.cast(f"{name}/codes", self.w.real(value, 1.0, name), dtype)

    def reduce(
        self, suffix: str, op_type: str, value: ir.Value, dims: Sequence[int], keep: bool = True
    ) -> ir.Value:
        """Add a reduction."""
        sizes = shape_of(value)
        axes = [d % len(sizes) for d in dims]
        shape = [1 if d in axes else size for d, size in enumerate(sizes)]
        if not keep:
            shape = [size for d, size in enumerate(sizes) if d not in axes]
        given = self.w.constant(np.array(axes, np.int64), f"{suffix}/axes")
        return self.add(suffix, op_type, [value, given], shape, keepdims=int(keep))

    def number(self, suffix: str, value: Any, dtype: type[np.generic] = np.float64) -> ir.Value:
        """Add constants."""
        return self.w.constant(np.asarray(value, dtype), suffix)

    def gather(self, suffix: str, table: ir.Value, index: ir.Value) -> ir.Value:
        """Look up entries of a one-dimensional table."""
        return self.add(suffix, "Gather", [table, index], shape_of(index))

    def rounded(self, real: ir.Value, bits: int, low: int, high: int) -> ir.Value:
        """Round float64 in units of the output step, half to even, to stored codes."""
        whole = self.add("round", "Round", [real])
        return self.stored(self.cast("whole", whole, FLOAT), bits, low, high)

    def stored(self, whole: ir.Value, bits: int, low: int, high: int) -> ir.Value:
        """Store whole numbers in float32 as codes."""
        return self.w.result(whole, 1.0, bits, low, high, fused=False)

    def selected(self, codes: ir.Value, bits: int) -> ir.Value:
        """Store codes that were selected among codes."""
        return self.stored(self.cast("selected", codes, FLOAT), bits, *code_limits(bits))
