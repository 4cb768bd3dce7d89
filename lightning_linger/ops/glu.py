"""``glu``: one half of a tensor times the sigmoid of the other half.

On LUNA platforms it is one step of the engine's arithmetic: the sigmoid in Q15, the product rounded
once. Elsewhere the sigmoid is a table with 16-bit results, and the product is that of ``mul``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.integer import integer_op, payload_dtype, rescale
from lightning_linger.core.payload import integer_codes, step_of
from lightning_linger.core.platform import Platform, arithmetic_of, rounding_of
from lightning_linger.core.registry import Part, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by
from lightning_linger.ops import luna
from lightning_linger.ops.curves import CurveFunction, fraction_of
from lightning_linger.ops.kernel import KernelOp, Target
from lightning_linger.ops.mul import integer_mul
from lightning_linger.ops.results import minimum_step
from lightning_linger.ops.table import Tabulation, find_table, table_of

GATE = "gate"
GATE_BITS = 16
# Fraction bits of the gate on engines.
_GATE_FRACTION = 15
_SIGMOID = CurveFunction("sigmoid")


class GLUCall(NamedTuple):
    """Bound arguments of ``F.glu``."""

    input: Tensor
    dim: int = -1


@integer_op("linger::glu")
def integer_glu(
    x: Tensor,
    dim: int,
    scale_x: float,
    scale_o: float,
    bits_x: int,
    bits_o: int,
    low: int,
    high: int,
    platform: str,
) -> Tensor:
    """Multiply the first half of the codes by the engine's sigmoid of the second, in Q15.

    Args:
        x: Codes.
        dim: The dimension that is cut into halves.
        scale_x: Step of ``x``, a power of two like the step of the result.
        scale_o: Step of the result, at least ``scale_x * 2^-15``.
        bits_x: Width of ``x``.
        bits_o: Width of the result.
        low: Smallest code of the result.
        high: Largest code of the result.
        platform: Name of the target, one with engine kernels.
    """
    engine = arithmetic_of(platform)
    curves = "" if engine is None else engine.curves
    formats = luna.curves_of(curves)
    linear, gate = x.long().chunk(2, dim)
    operand = luna.align(gate, fraction_of(scale_x), formats.input_fraction, formats.input_bits)
    # A gate of exactly one stays one: the product has room for it.
    shift = formats.output_fraction - _GATE_FRACTION
    opened = luna.rounding_shift(luna.sigmoid(operand, curves), shift)
    product = (linear * opened).double()
    ratio = scale_x * 2.0**-_GATE_FRACTION / scale_o
    return rescale(product, ratio, low, high, "half_up").to(payload_dtype(bits_o))


@integer_glu.register_fake
def _(
    x: Tensor, dim: int, scale_x: float, scale_o: float, bits_x: int, bits_o: int, *_: object
) -> Tensor:
    return x.chunk(2, dim)[0].to(payload_dtype(bits_o))


class GLUOp(KernelOp):
    """``glu``; where it is not an engine's step, its gate has a quantizer."""

    def bind(self, *args: Any, **kwargs: Any) -> GLUCall:
        """Bind ``(input, dim=-1)``."""
        return GLUCall(*args, **kwargs)

    def parts(self, call: GLUCall, config: QuantConfig, platform: Platform) -> Mapping[str, Part]:
        """The sigmoid of the gate, where the platform's own, which rounds half up, is not it."""
        rounding = rounding_of(config, platform)
        if platform.curves in luna.CURVES and rounding == "half_up":
            return {}
        return {GATE: Part(bits=GATE_BITS, range=1.0)}

    def finest_step(self, site: Site, call: GLUCall) -> Scalar | None:
        """A product is only shifted right."""
        return minimum_step(site, step_of(call.input) * 2.0**-_GATE_FRACTION)

    def real(self, site: Site, call: GLUCall) -> Tensor:
        """Run the function."""
        return F.glu(call.input, call.dim)

    def can_run(self, site: Site, call: GLUCall, target: Target) -> bool:
        """A capture finds its table, or computes without."""
        if _on_engine(site):
            return True
        asked = _gate_table(site, call.input)
        return find_table(site, GATE, _SIGMOID, asked, call.input.device) is not None

    def kernel(self, site: Site, call: GLUCall, target: Target) -> Tensor:
        """Call ``linger::glu``, or the table and ``linger::mul``."""
        tag = tag_held_by(call.input)
        codes, step = integer_codes(call.input), float(tag.step)
        if _on_engine(site):
            return integer_glu(
                codes,
                call.dim,
                step,
                target.scale,
                tag.bits,
                target.bits,
                target.low,
                target.high,
                site.platform_name,
            )
        linear, gate = codes.chunk(2, call.dim)
        asked = _gate_table(site, call.input)
        table = table_of(site, GATE, _SIGMOID, asked, codes.device)
        return integer_mul(
            linear,
            table(gate, site.platform_name),
            step,
            asked.step_o,
            target.scale,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )


def _on_engine(site: Site) -> bool:
    """Whether the platform's own sigmoid computes the gate."""
    return GATE not in site.parts


def _gate_table(site: Site, x: Tensor) -> Tabulation:
    tag = tag_held_by(x)
    quantizer = site.part(GATE)
    step = float(quantizer.step())
    low, high = (int(bound) for bound in quantizer.code_bounds(step))
    return Tabulation(
        step_x=float(tag.step),
        bits_x=tag.bits,
        step_o=step,
        bits_o=quantizer.grid.bits,
        low=low,
        high=high,
        rounding=quantizer.grid.rounding,
    )


register(GLUOp("glu"))
