"""Ops whose fake-quant value is that of their integer kernel, bit for bit by construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.fake_quantize import Scalar, straight_through
from lightning_linger.core.quantizer import Quantizer, readable
from lightning_linger.core.registry import Op
from lightning_linger.core.sites import Site, integer_codes, real_values
from lightning_linger.core.tags import Tag, tag_of, with_tag


@dataclass(frozen=True)
class Target:
    """What a kernel has to produce.

    Args:
        scale: Step of the result.
        bits: Width of the result.
        low: Smallest code.
        high: Largest code.
    """

    scale: float
    bits: int
    low: int
    high: int

    @staticmethod
    def of(quantizer: Quantizer, step: float) -> Target:
        """Return what a quantizer asks for at a step."""
        low, high = (int(bound) for bound in quantizer.code_bounds(step))
        return Target(step, quantizer.grid.bits, low, high)


class KernelOp(Op):
    """An op with an integer kernel that a chain of float roundings would not reproduce.

    In fake-quant the value is the kernel's and the gradient is that of the float function on the
    same grid values, zero where the result saturates. Where steps cannot be read (training on a
    GPU or in a capture), the float function's value is rounded instead, which is at most a code
    away; evaluation always takes the kernel.

    Without ``output_bits`` the result is the float function's, on quantized operands.
    """

    def with_operands(self, call: Any, operands: list[Tensor]) -> Any:
        """Return the call with other operands."""
        return call._replace(**{call._fields[0]: operands[0]})

    def real(self, site: Site, call: Any) -> Tensor:
        """Run the float function on real values; gradients flow through it."""
        raise NotImplementedError

    def kernel(self, site: Site, call: Any, target: Target) -> Tensor:
        """Run on codes: the operands are tagged payloads; return the payload of the result."""
        raise NotImplementedError

    def finest_step(self, site: Site, call: Any) -> Scalar | None:
        """Return the finest step the platform can give the result, None for no bound."""
        return None

    def run_fake(self, site: Site, call: Any) -> Any:
        """Take the kernel's value and the float function's gradient."""
        operands = self.quantized_operands(site, call)
        if operands is None:
            return NotImplemented
        call = self.with_operands(call, operands)
        dtype = _dtype(operands)
        output = site.output
        if output is None:
            return site.limit_output(self.real(site, call)).to(dtype)
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
        real = None
        if site.learning or differentiable:
            real = self.real(site, call)
        if site.learning and real is not None:
            output.observe(real.detach(), _cap(site))
        step = output.step(self.finest_step(site, call))
        if not (isinstance(step, float) and all(map(_has_readable_step, operands))):
            real = self.real(site, call) if real is None else real
            return output.round(real, step, dtype)
        value = self._exact(site, call, operands, step, dtype)
        if real is None or not differentiable:
            return with_tag(value, output.tag(step, dtype))
        low, high = (float(bound) * step for bound in output.code_bounds(step))
        passed = straight_through(value, real.clamp(low, high).to(dtype))
        return with_tag(passed, output.tag(step, dtype))

    def run_integer(self, site: Site, call: Any) -> Any:
        """Run the kernel."""
        operands = self.quantized_operands(site, call)
        if operands is None:
            return NotImplemented
        dtype = _dtype(operands)
        output = site.output
        if output is None:
            values = [real_values(x) for x in operands]
            return site.limit_output(self.real(site, self.with_operands(call, values))).to(dtype)
        coded = self.with_operands(call, [_coded(x) for x in operands])
        step = output.latest_step = float(output.step(self.finest_step(site, coded)))
        codes = self.kernel(site, coded, Target.of(output, step))
        return with_tag(codes, output.tag(step, dtype))

    def quantized_operands(self, site: Site, call: Any) -> list[Tensor] | None:
        """Return the operands on their grids, None if one is plain and was not planned to be."""
        operands = [site.operand(i, x) for i, x in enumerate(self.operands(call))]
        found = [x for x in operands if x is not None]
        return found if len(found) == len(operands) else None

    @torch.no_grad()
    def _exact(
        self, site: Site, call: Any, operands: list[Tensor], step: float, dtype: torch.dtype
    ) -> Tensor:
        output = site.output
        assert output is not None
        output.latest_step = step
        coded = self.with_operands(call, [_coded(x) for x in operands])
        codes = self.kernel(site, coded, Target.of(output, step))
        return codes.to(dtype).mul_(step)


def _coded(x: Tensor) -> Tensor:
    """Return the codes of a tagged tensor, with a tag whose step is a number."""
    tag = tag_of(x)
    assert tag is not None
    codes = integer_codes(x)
    step = float(tag.step)
    return with_tag(codes, Tag(step, tag.bits, tag.site, tag.dtype, tag.zero_point, tag.reach))


def _has_readable_step(x: Tensor) -> bool:
    tag = tag_of(x)
    return tag is not None and isinstance(readable(tag.step, x), float)


def _dtype(operands: list[Tensor]) -> torch.dtype:
    tag = tag_of(operands[0])
    assert tag is not None
    return tag.dtype


def _cap(site: Site) -> float:
    limit = site.output_limit()
    return math.inf if limit is None else limit
