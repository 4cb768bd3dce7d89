"""Division of activations.

Two tensors, or a number and a tensor, are divided code by code: the quotient is rounded once, with
no rounding in between. A division *by a number* is the multiplication with its reciprocal, a
constant of the output's width as in :mod:`lightning_linger.ops.mul`, because that is what engines
have.

Where the divisor's code is 0, the result saturates with the sign of the dividend; 0 / 0 is 0.
Such elements say nothing about the range and let no gradient through. A float result
(``output_bits=None``) is that of the float division there: infinite, or NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.integer import integer_op, payload_dtype
from lightning_linger.core.payload import step_of
from lightning_linger.core.registry import register
from lightning_linger.core.sites import Site
from lightning_linger.ops.exact import to_codes
from lightning_linger.ops.kernel import KernelOp, Target
from lightning_linger.ops.mul import MulOp
from lightning_linger.ops.pairs import Factor, PairCall, PairOp, as_factor, factor_codes
from lightning_linger.ops.refused import RefusedOp

# Takes the place of a divisor of 0: any dividend but 0 then saturates.
ZERO_DIVISOR = 2.0**-200
# What the float function gives there; its square is a float32 too.
SATURATED = 1e18


@integer_op("linger::div")
def integer_div(
    x: Tensor,
    y: Tensor,
    scale_x: float,
    scale_y: float,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Divide codes and round once: ``clamp(round(x * scale_x / (y * scale_y) / scale_o))``.

    In float64 the product with ``scale_x / (scale_y * scale_o)`` is exact for powers of two, and
    the quotient of two codes of 16 bits is farther from a rounding tie than float64 is coarse: the
    result is that of whole-number arithmetic. Free scales take two IEEE operations.

    Args:
        x: Codes of at most 16 bits.
        y: Codes that broadcast with ``x``.
        scale_x: Step of ``x``.
        scale_y: Step of ``y``.
        scale_o: Step of the result.
        bits_o: Width of the result.
        low: Smallest code of the result.
        high: Largest code of the result.
        rounding: Rounding rule.
        platform: Name of the target.
    """
    scaled = x.double() * div_ratio(scale_x, scale_y, scale_o)
    divisor = torch.where(y == 0, ZERO_DIVISOR, y.double())
    return to_codes(scaled / divisor, bits_o, low, high, rounding)


def div_ratio(scale_x: float, scale_y: float, scale_o: float) -> float:
    """Return by how much a quotient of codes is multiplied to be in steps of the result."""
    return scale_x / (scale_y * scale_o)


@integer_div.register_fake
def _(
    x: Tensor, y: Tensor, scale_x: float, scale_y: float, scale_o: float, bits_o: int, *_: object
) -> Tensor:
    shape = torch.broadcast_shapes(x.shape, y.shape)
    return x.new_empty(shape, dtype=payload_dtype(bits_o))


class _QuotientOp(KernelOp):
    """A division by a tensor; a number that is divided is a constant."""

    def quantized_operands(self, site: Site, call: PairCall) -> list[Tensor] | None:
        """Return the tensors on their grids."""
        pair = enumerate((call.input, call.other))
        operands = [site.operand(i, x) for i, x in pair if isinstance(x, Tensor)]
        found = [x for x in operands if x is not None]
        return found if len(found) == len(operands) else None

    def with_operands(self, call: PairCall, operands: list[Tensor]) -> PairCall:
        """Put tensors back to where they were."""
        given = iter(operands)
        x, y = (next(given) if isinstance(v, Tensor) else v for v in (call.input, call.other))
        return PairCall(x, y)

    def real(self, site: Site, call: PairCall) -> Tensor:
        """Divide; what a zero divides saturates."""
        if site.output is None:
            return torch.true_divide(call.input, call.other)
        zero = call.other == 0
        quotient = torch.true_divide(call.input, torch.where(zero, 1.0, call.other))
        sign = torch.sign(torch.as_tensor(call.input, device=call.other.device))
        return torch.where(zero, sign.to(quotient.dtype) * SATURATED, quotient)

    def observed(self, site: Site, call: PairCall, real: Tensor) -> Tensor:
        """Leave out what a zero divides."""
        return torch.where(call.other == 0, 0.0, real)

    def kernel(self, site: Site, call: PairCall, target: Target) -> Tensor:
        """Call ``linger::div``."""
        assert site.output is not None  # a target comes from it
        x = as_factor(call.input, site.output)
        return integer_div(
            factor_codes(x, call.other),
            factor_codes(call.other, call.other),
            x.step if isinstance(x, Factor) else float(step_of(x)),
            float(step_of(call.other)),
            target.scale,
            target.bits,
            target.low,
            target.high,
            site.output.grid.rounding,
            site.platform_name,
        )


class DivOp(PairOp):
    """``div`` of two activations, of a number and an activation, or by a number."""

    exact_with_free_scales = True

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self._product = MulOp(kind)
        self._quotient = _QuotientOp(kind)

    def variant(self, call: PairCall) -> str:
        """A division by a number is a product."""
        return "mul" if _is_number(call.other) else self.kind

    def obstacle(self, call: PairCall) -> str | None:
        """A quotient that is rounded to whole numbers is no longer on a grid of its own."""
        if call.refused is None and _is_number(call.other) and float(call.other) == 0.0:
            return "divides by zero"
        return call.refused

    def run_fake(self, site: Site, call: PairCall) -> Any:
        """Divide on the grid."""
        if _is_number(call.other):
            return self._product.run_fake(site, _by_reciprocal(call))
        return self._quotient.run_fake(site, call)

    def run_integer(self, site: Site, call: PairCall) -> Any:
        """Call ``linger::div``, or ``linger::mul`` for a division by a number."""
        if _is_number(call.other):
            return self._product.run_integer(site, _by_reciprocal(call))
        return self._quotient.run_integer(site, call)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _by_reciprocal(call: PairCall) -> PairCall:
    return call._replace(other=1.0 / float(call.other))


register(DivOp("div"), "div", "divide", "true_divide", "__truediv__", "__div__")
_JUMPS = "a remainder jumps from one end of its range to the other"
_THREE = "is several ops in one call; write"
register(
    RefusedOp("floor_divide", "rounds to whole numbers, which have no scale; write `x / y`"),
    *("floor_divide", "__floordiv__"),
)
register(RefusedOp("remainder", _JUMPS), "remainder", "__mod__")
register(RefusedOp("fmod", _JUMPS))
register(RefusedOp("addcmul", f"{_THREE} `x + a * b`"))
register(RefusedOp("addcdiv", f"{_THREE} `x + a / b`"))
register(RefusedOp("lerp", f"{_THREE} `x + weight * (y - x)`"))
