"""Vectors of length one: ``F.normalize`` with the Euclidean norm.

The sum of squares is a whole number. TFLite has a fixed-point kernel; elsewhere one root, one
product and one quotient in float64 follow, which every machine rounds alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.integer import integer_op, payload_dtype
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.platform import Platform
from lightning_linger.core.registry import register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by
from lightning_linger.ops import tflite, tflite_curves
from lightning_linger.ops.arguments import refused_arguments
from lightning_linger.ops.exact import to_codes
from lightning_linger.ops.kernel import KernelOp, Target

# What an engine that divides by the norm itself may leave out.
NEGLIGIBLE_EPS = 1e-6


class NormalizeCall(NamedTuple):
    """Bound arguments of ``F.normalize``; ``dim`` counts from the front."""

    input: Tensor
    dim: int
    eps: float
    refused: str | None = None


def shortest(eps: float, scale_x: float) -> float:
    """Return the norm, in steps of the operand, that shorter vectors are divided by."""
    return eps / scale_x


@integer_op("linger::normalize")
def integer_normalize(
    x: Tensor,
    dim: int,
    eps: float,
    scale_x: float,
    bits_x: int,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Divide codes by their Euclidean norm along one dimension.

    TFLite's kernel multiplies by the inverse root in fixed point and knows no ``eps``. Elsewhere
    the result is ``round(x / (max(norm, eps / scale_x) * scale_o))`` in float64.

    Args:
        x: Codes, any shape.
        dim: Dimension along which the norm is taken.
        eps: Shorter vectors are divided by it.
        scale_x: Step of ``x``.
        bits_x: Width of ``x``.
        scale_o: Step of the result, which lies in [-1, 1].
        bits_o: Width of the result.
        low: Smallest code of the result.
        high: Largest code of the result.
        rounding: Rounding rule.
        platform: Name of the target.
    """
    if tflite_curves.narrow_engine("normalize", platform, scale_o, bits_x, bits_o) is not None:
        found = tflite.l2_normalization(x.movedim(dim, -1), 0).long()
        codes = found.clamp_(low, high).movedim(-1, dim).contiguous()
        return codes.to(payload_dtype(bits_o))
    norms = x.long().square().sum(dim, keepdim=True).double().sqrt()
    divisor = norms.clamp(min=shortest(eps, scale_x)) * scale_o
    return to_codes(x.double() / divisor, bits_o, low, high, rounding)


@integer_normalize.register_fake
def _(
    x: Tensor,
    dim: int,
    eps: float,
    scale_x: float,
    bits_x: int,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits_o))


class NormalizeOp(KernelOp):
    """``F.normalize`` with ``p=2``."""

    def bind(
        self,
        input: Tensor,
        p: float = 2.0,
        dim: Any = 1,
        eps: float = 1e-12,
        out: Tensor | None = None,
    ) -> NormalizeCall:
        """Bind ``F.normalize``."""
        refused = refused_arguments({} if out is None else {"out": out})
        if p != 2:
            refused = f"the norm of p={p} has no integer form; use p=2"
        elif not isinstance(dim, int):
            refused = f"the norm over the dimensions {dim} has no integer form; flatten them first"
        elif not eps > 0:
            refused = "eps must be positive, or a row of zeros divides by zero"
        place = dim % max(len(input.shape), 1) if isinstance(dim, int) else 0
        return NormalizeCall(input, place, eps, refused)

    def obstacle(self, call: NormalizeCall) -> str | None:
        """Other norms than the Euclidean one along a dimension."""
        return call.refused

    def variant(self, call: NormalizeCall) -> str:
        """An eps that shows is another function to an engine that has none."""
        return self.kind if call.eps <= NEGLIGIBLE_EPS else "normalize with a large eps"

    def output_range(
        self, call: Any, config: QuantConfig, platform: Platform
    ) -> float | tuple[float, float] | None:
        """No entry of a vector is longer than the vector."""
        fixed = tflite_curves.fixed_range(self.kind, config, platform)
        return 1.0 if fixed is None else fixed

    def real(self, site: Site, call: NormalizeCall) -> Tensor:
        """Run the function of PyTorch."""
        return F.normalize(call.input, dim=call.dim, eps=call.eps)

    def kernel(self, site: Site, call: NormalizeCall, target: Target) -> Tensor:
        """Call ``linger::normalize``."""
        tag = tag_held_by(call.input)
        return integer_normalize(
            integer_codes(call.input),
            call.dim,
            call.eps,
            float(tag.step),
            tag.bits,
            target.scale,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )


register(NormalizeOp("normalize"))
