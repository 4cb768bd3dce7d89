"""Equations of ``einsum`` that are one matrix product."""

from __future__ import annotations

from typing import NamedTuple


class Contraction(NamedTuple):
    """The indices of a two-operand ``einsum`` by what becomes of them.

    Args:
        x: Indices of the first operand, one per dimension.
        y: Indices of the second.
        batch: In both operands and the result.
        left: In the first operand and the result.
        right: In the second operand and the result.
        summed: In both operands only.
        result: Indices of the result.
    """

    x: str
    y: str
    batch: str
    left: str
    right: str
    summed: str
    result: str

    @property
    def swapped(self) -> Contraction:
        """The same with the operands exchanged."""
        return self._replace(x=self.y, y=self.x, left=self.right, right=self.left)


def contraction(equation: str, x: tuple[int, ...], y: tuple[int, ...]) -> Contraction | str:
    """Read an ``einsum`` equation as one matrix product.

    Args:
        equation: With two operands; ``...`` stands for leading dimensions that both share.
        x: Shape of the first operand.
        y: Shape of the second operand.

    Returns:
        The contraction, or why it is no matrix product.
    """
    operands, arrow, result = equation.replace(" ", "").partition("->")
    terms = operands.split(",")
    if len(terms) != 2:
        return "einsum with other than two operands; write it as matrix products"
    unused = [chr(code) for code in range(ord("A"), ord("Z") + 1) if chr(code) not in equation]
    rank = max(
        len(shape) - len(term.replace("...", "")) if "..." in term else 0
        for term, shape in zip(terms, (x, y), strict=True)
    )
    dots = "".join(unused[:rank])
    named = []
    for term, shape in zip(terms, (x, y), strict=True):
        own = len(shape) - len(term.replace("...", ""))
        named.append(term.replace("...", dots[rank - own :] if own else ""))
    a, b = named
    if arrow:
        result = result.replace("...", dots)
    else:
        once = [i for i in sorted(set(a + b)) if (a + b).count(i) == 1 and i not in dots]
        result = dots + "".join(once)
    if any(len(set(term)) != len(term) for term in (a, b, result)):
        return "einsum with an index twice in one operand; take the diagonal first"
    sizes = dict(zip(a, x, strict=True))
    if any(sizes.get(i, size) != size for i, size in zip(b, y, strict=True)):
        return "einsum that broadcasts sizes of 1; expand the operand first"
    if any(i not in result for i in set(a) ^ set(b)):
        return "einsum that sums an index of one operand alone; sum it first"
    return Contraction(
        x=a,
        y=b,
        batch="".join(i for i in result if i in a and i in b),
        left="".join(i for i in result if i in a and i not in b),
        right="".join(i for i in result if i in b and i not in a),
        summed="".join(i for i in a if i in b and i not in result),
        result=result,
    )
