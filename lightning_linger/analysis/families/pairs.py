"""Sums, products, joins, signs and choices."""

from __future__ import annotations

import math

from lightning_linger.analysis.families.convolutions import pointwise
from lightning_linger.analysis.layers import Data, Shape
from lightning_linger.analysis.walk import Reader, Visit
from lightning_linger.core.graph import TensorSpec


def read_add(visit: Visit) -> None:
    """Read a sum. That with a number is written as a convolution with weights of one."""
    operands, out = visit.operands(), visit.result()
    tensors = [data for data in operands if data is not None and data.elements > 1]
    if len(tensors) == 1:
        x = tensors[0]
        channels = x.shape[1] if len(x.shape) == 4 else 1
        pointwise(visit, x, out, channels)
        return
    x, y = (data for data in operands if data is not None)
    traits = () if x.shape == y.shape else ("broadcast",)
    visit.add("add", (x, y), (out,), traits, facts={"shapes": (x.shape, y.shape)})


def read_sub(visit: Visit) -> None:
    """Read a difference with a number, which is a sum; the engine has no other."""
    operands = visit.operands()
    tensors = [data for data in operands if data is not None and data.elements > 1]
    if len(tensors) == 1 or not visit.shifts:
        read_add(visit)
    else:
        visit.refuse("use an addition with the weights of one side negated")


def read_mul(visit: Visit) -> None:
    """Read a product: of tensors of one shape, with a number, or of maps with a number each."""
    operands, out = visit.operands(), visit.result()
    tensors = [data for data in operands if data is not None]
    if len(tensors) == 1 or tensors[0] is tensors[1]:
        add_number_product(visit, tensors[0], out)
        return
    x, y = sorted(tensors, key=lambda data: data.elements, reverse=True)
    traits = [] if _multiplies(x.shape, y.shape, out.shape) else ["broadcast"]
    if x.shape != y.shape:
        traits.append("spread")
    visit.add("mul", (x, y), (out,), traits, facts={"shapes": (x.shape, y.shape)})


def add_number_product(visit: Visit, x: Data, out: Data) -> None:
    """Add a product with a number, or of a tensor with itself."""
    visit.add("mul", (x,), (out,), facts={"shapes": (x.shape, x.shape)})


def _multiplies(x: Shape, y: Shape, out: Shape) -> bool:
    """Whether the engine can multiply: element by element, or leading axes with a number each."""
    if x != out:
        return False
    y = (*(1,) * (len(x) - len(y)), *y)
    alike = next((i for i, size in enumerate(y) if size != x[i]), len(y))
    return math.prod(y[alike:]) == 1


def read_div(visit: Visit) -> None:
    """Read a quotient; a division by a number is a product."""
    call = visit.call
    if isinstance(call.other, TensorSpec) or not isinstance(call.input, TensorSpec):
        visit.refuse("use a product with a constant, or divide outside the model")
        return
    add_number_product(visit, visit.operand(0), visit.result())


def read_neg(visit: Visit) -> None:
    """Read a negation: a product with -1."""
    add_number_product(visit, visit.operand(0), visit.result())


def read_square(visit: Visit) -> None:
    """Read a square, or another power, which the engine does not have."""
    given = (*visit.node.args[1:], *visit.node.kwargs.values())
    if visit.node.op == "pow" and (given != (2,) or visit.node.function == "__rpow__"):
        visit.refuse("use products")
        return
    x = visit.operand(0)
    visit.add("mul", (x, x), (visit.result(),), facts={"shapes": (x.shape, x.shape)})


def read_abs(visit: Visit) -> None:
    """Read an absolute value: what is positive of the value and of its negative."""
    x, out = visit.operand(0), visit.result()
    positive, negated, negative = (visit.inner(x.shape, x.bits) for _ in range(3))
    visit.add("relu", (x,), (positive,))
    visit.add("mul", (x,), (negated,), facts={"shapes": (x.shape, x.shape)})
    visit.add("relu", (negated,), (negative,))
    shapes = (x.shape, x.shape)
    visit.add("add", (positive, negative), (out,), facts={"shapes": shapes})


def read_slopes(visit: Visit) -> None:
    """Read a leaky ReLU: its two sides are summed, one of them multiplied by the slope."""
    x, out = visit.operand(0), visit.result()
    shapes = (x.shape, x.shape)
    positive, minus, negative = (visit.inner(x.shape, x.bits) for _ in range(3))
    scaled = visit.inner(x.shape, out.bits)
    visit.add("relu", (x,), (positive,))
    visit.add("mul", (positive,), (minus,), facts={"shapes": shapes})
    visit.add("add", (x, minus), (negative,), facts={"shapes": shapes})
    visit.add("mul", (negative,), (scaled,), facts={"shapes": shapes})
    visit.add("add", (positive, scaled), (out,), facts={"shapes": shapes})


def read_cat(visit: Visit) -> None:
    """Read a join."""
    found = [data for data in visit.operands() if data is not None]
    visit.add("cat", found, (visit.result(),), facts={"operands": len(found)})


def read_select(visit: Visit) -> None:
    """Read a choice by a mask; one that is constant becomes products and a sum."""
    mask = visit.call.mask
    computed = isinstance(mask, TensorSpec) and visit.walk.is_computed(mask)
    inputs = [data for data in visit.operands() if data is not None]
    visit.add("select", inputs, (visit.result(),), facts={"computed": computed})


def read_triangle(visit: Visit) -> None:
    """Read ``tril`` or ``triu``: a choice by a constant mask."""
    visit.add("select", (visit.operand(0),), (visit.result(),), facts={"computed": False})


READERS: dict[str, Reader] = {
    "add": read_add,
    "sub": read_sub,
    "mul": read_mul,
    "div": read_div,
    "neg": read_neg,
    "abs": read_abs,
    **dict.fromkeys(("square", "pow"), read_square),
    **dict.fromkeys(("leaky_relu", "prelu"), read_slopes),
    **dict.fromkeys(("cat", "stack", "hstack", "vstack", "dstack", "column_stack"), read_cat),
    **dict.fromkeys(("where", "masked_fill"), read_select),
    **dict.fromkeys(("tril", "triu"), read_triangle),
}
