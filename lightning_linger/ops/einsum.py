"""``einsum`` of two operands that is one matrix product."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_linger.core.capture import capturing
from lightning_linger.core.registry import register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import with_tag_of
from lightning_linger.ops.contraction import Contraction, contraction
from lightning_linger.ops.matmul import ProductCall, ProductOp, last_product, run_layer


class EinsumOp(ProductOp):
    """``einsum`` of two operands that is one (batched) matrix product."""

    def bind(self, equation: Any, *operands: Any) -> ProductCall:
        """Bind ``(equation, *operands)`` or ``(equation, [operands])``."""
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        if not isinstance(equation, str):
            return ProductCall(None, None, unsupported="einsum with lists of indices")
        if len(operands) != 2:
            first = operands[0] if operands else None
            reason = "einsum with other than two operands; write it as matrix products"
            return ProductCall(first, None, equation, reason)
        return ProductCall(operands[0], operands[1], equation)

    def obstacle(self, call: ProductCall) -> str | None:
        """What is no matrix product of two activations, or of one and a weight."""
        if call.unsupported is None:
            found = contraction(call.equation, call.input.shape, call.other.shape)
            if isinstance(found, str):
                return found
        return super().obstacle(call)

    def is_weight(self, call: ProductCall, side: int) -> bool:
        """Whether no product of a batch is asked for, which a linear layer has not."""
        found = contraction(call.equation, call.input.shape, call.other.shape)
        return isinstance(found, Contraction) and not found.batch

    def multiply(self, site: Site, call: ProductCall, x: Tensor, y: Tensor) -> Any:
        """Permute, multiply, permute."""
        found = contraction(call.equation, x.shape, y.shape)
        if isinstance(found, str):
            return NotImplemented
        sizes = _sizes(found, x, y)
        batch = (found.batch,) if found.batch else ()
        a = _arranged(x, found.x, (*batch, found.left, found.summed), sizes)
        b = _arranged(y, found.y, (*batch, found.summed, found.right), sizes)
        y = last_product(site, a, b)
        return _spread(y, found.batch + found.left + found.right, found.result, sizes)

    def _run_layer(self, site: Site, call: ProductCall, side: int, quantized: bool) -> Any:
        pair: list[Any] = [call.input, call.other]
        weight, x = pair[side], pair[1 - side]
        found = contraction(call.equation, call.input.shape, call.other.shape)
        if isinstance(found, str):
            return NotImplemented
        if side == 0:
            found = found.swapped
        sizes = _sizes(found, x, weight)
        matrix = _arranged(weight, found.y, (found.right, found.summed), sizes)
        if not capturing() and matrix.data_ptr() != weight.data_ptr():
            site.weight_is_computed = True  # a copy: its memory does not tell whether it is valid
        rows = _arranged(x, found.x, (*found.left, found.summed), sizes)
        y = run_layer(site, rows, matrix, None, quantized)
        if y is NotImplemented:
            return NotImplemented
        return _spread(y, found.left + found.right, found.result, sizes)


def _arranged(x: Tensor, indices: str, groups: tuple[str, ...], sizes: dict[str, int]) -> Tensor:
    """Permute a tensor so that its indices stand in groups, one dimension each."""
    order = "".join(groups)
    shape = [math.prod([sizes[i] for i in group]) for group in groups]
    return with_tag_of(x, x.permute([indices.index(i) for i in order]).reshape(shape))


def _spread(x: Tensor, indices: str, result: str, sizes: dict[str, int]) -> Tensor:
    """Give every index its dimension again, in the order of the result."""
    full_shape = x.reshape([sizes[i] for i in indices])
    return with_tag_of(x, full_shape.permute([indices.index(i) for i in result]))


def _sizes(found: Contraction, x: Tensor, y: Tensor) -> dict[str, int]:
    pairs = (*zip(found.x, x.shape, strict=True), *zip(found.y, y.shape, strict=True))
    return dict(pairs)


register(EinsumOp("einsum"))
