"""Ops whose fake-quant value is that of their integer kernel, bit for bit by construction."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.capture import without_autocast
from lightning_linger.core.fake_quantize import Scalar, fake_quantize, straight_through_within
from lightning_linger.core.integer import code_limits
from lightning_linger.core.payload import integer_codes, real_values
from lightning_linger.core.quantizer import Quantizer, readable
from lightning_linger.core.registry import Op
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_held_by, tag_of, with_tag


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
        return Target(step, quantizer.grid.code_bits, low, high)


class KernelOp(Op, ABC):
    """An op with an integer kernel that a chain of float roundings would not reproduce.

    In fake-quant the value is the kernel's and the gradient is that of the float function on the
    same grid values, zero where the result saturates. Where steps cannot be read (training on a
    GPU or in a capture), the float function's value is rounded instead, which is at most a code
    away; evaluation always takes the kernel.

    Without ``output_bits`` the result is the float function's, on quantized operands.
    """

    exact_with_free_scales = True

    def with_operands(self, call: Any, operands: list[Tensor]) -> Any:
        """Return the call with other operands."""
        return call._replace(**{call._fields[0]: operands[0]})

    @abstractmethod
    def real(self, site: Site, call: Any) -> Tensor:
        """Run the float function on real values; gradients flow through it."""

    @abstractmethod
    def kernel(self, site: Site, call: Any, target: Target) -> Tensor:
        """Run on codes: the operands are tagged payloads; return the payload of the result."""

    def finest_step(self, site: Site, call: Any) -> Scalar | None:
        """Return the finest step the platform can give the result, None for no bound."""
        return None

    def sources(self, call: Any) -> Sequence[Tensor | None]:
        """Return further tensors that :meth:`real` passes gradients to, e.g. weights."""
        return ()

    def can_run(self, site: Site, call: Any, target: Target) -> bool:
        """Whether the kernel can run now; a graph capture cannot make the tables it would read."""
        return True

    def observed(self, site: Site, call: Any, real: Tensor) -> Tensor:
        """Return what the range of the result has to cover, given the float function's value."""
        return real

    def run_fake(self, site: Site, call: Any) -> Any:
        """Take the kernel's value and the float function's gradient."""
        operands = self.quantized_operands(site, call)
        if operands is None:
            return NotImplemented
        call = self.with_operands(call, operands)
        if site.output is None:
            return site.limit_output(self.real(site, call)).to(_dtype(operands))
        return self._quantized(site, call, operands, site.output)

    def run_integer(self, site: Site, call: Any) -> Any:
        """Run the kernel."""
        operands = self.quantized_operands(site, call)
        if operands is None:
            return NotImplemented
        if site.output is None:
            values = [real_values(x) for x in operands]
            real = self.real(site, self.with_operands(call, values))
            return site.limit_output(real).to(_dtype(operands))
        return self._quantized(site, self.with_operands(call, operands), operands, site.output)

    def _quantized(
        self, site: Site, call: Any, operands: list[Tensor], output: Quantizer
    ) -> Tensor:
        return run_kernel(
            site,
            output,
            operands,
            real=lambda *values: self.real(site, self.with_operands(call, list(values))),
            kernel=lambda target, *codes: self.kernel(
                site, self.with_operands(call, list(codes)), target
            ),
            finest=self.finest_step(site, call),
            cap=_cap(site),
            observe=lambda seen: self.observed(site, call, seen),
            sources=self.sources(call),
            can_run=lambda target: self.can_run(site, call, target),
        )

    def quantized_operands(self, site: Site, call: Any) -> list[Tensor] | None:
        """Return the operands on their grids, None if one is plain and was not planned to be."""
        operands = [site.operand(i, x) for i, x in enumerate(self.operands(call))]
        found = [x for x in operands if x is not None]
        return found if len(found) == len(operands) else None


def run_kernel(
    site: Site,
    output: Quantizer,
    operands: Sequence[Tensor],
    real: Callable[..., Tensor],
    kernel: Callable[..., Tensor],
    finest: Scalar | None = None,
    cap: float = math.inf,
    observe: Callable[[Tensor], Tensor] | None = None,
    sources: Sequence[Tensor | None] = (),
    rounds_in_training: bool = False,
    can_run: Callable[[Target], bool] | None = None,
) -> Tensor:
    """Run one quantized step in the number system of the moment; an op may have several.

    In fake-quant the value is the kernel's and the gradient that of the float function, zero where
    the result saturates. Where steps cannot be read (training on a GPU or in a capture) the float
    function's value is rounded instead.

    Args:
        site: The site.
        output: What the result is rounded with.
        operands: Tagged tensors.
        real: ``real(*values) -> value``: the float function.
        kernel: ``kernel(target, *codes) -> codes``: its integer form on tagged payloads.
        finest: The finest step the platform can give the result, None for no bound.
        cap: Range limit: what lies beyond is not covered by the range.
        observe: Returns what of the real result the range has to cover; None for all of it.
        sources: Further tensors that ``real`` passes gradients to, e.g. weights.
        rounds_in_training: Round the float function's value in training too, where its float32
            accumulation is good enough: a product then runs once.
        can_run: Says whether the kernel can run now; otherwise the float function's value is
            rounded. None where it always can.

    Returns:
        The tagged result: real values on the grid in fake-quant, the payload in integers.
    """
    dtype = _dtype(operands)
    if site.switches.system == "integer":
        step = output.latest_step = float(output.step(finest))
        codes = kernel(Target.of(output, step), *map(_coded, operands))
        return with_tag(codes, output.tag(step, dtype))
    tensors = [x for x in (*operands, *sources) if x is not None]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    differentiable = differentiable or output.learns_now
    rounds = rounds_in_training and site.training
    result = real(*operands) if site.learning or differentiable or rounds else None
    if site.learning and result is not None:
        seen = result.detach()
        output.observe(seen if observe is None else observe(seen), cap)
    usable = output.step(finest)
    if rounds or not (isinstance(usable, float) and all(map(_has_readable_step, operands))):
        result = real(*operands) if result is None else result
        return output.round(result, usable, dtype)
    target = Target.of(output, usable)
    if can_run is not None and not can_run(target):
        return output.round(real(*operands) if result is None else result, usable, dtype)
    output.latest_step = usable
    with torch.no_grad():
        codes = kernel(target, *map(_coded, operands))
        value = codes.to(dtype).mul_(usable)
    if result is not None and differentiable:
        value = output.with_gradient(value, result, usable)
    return with_tag(value, output.tag(usable, dtype))


def run_on_grid(
    site: Site,
    operands: Sequence[Tensor],
    tag: Tag,
    real: Callable[[], Tensor],
    kernel: Callable[..., Tensor],
) -> Tensor:
    """Run a step whose result has a step that follows from its operands.

    Args:
        site: The site.
        operands: Tagged tensors.
        tag: Of the result.
        real: The float function, for its gradient and where steps cannot be read.
        kernel: ``kernel(step, *codes) -> codes``: its integer form on tagged payloads.
    """
    integers = site.switches.system == "integer"
    usable = readable(tag.step)
    limits = code_limits(tag.bits)
    if not integers and not (isinstance(usable, float) and all(map(_has_readable_step, operands))):
        return with_tag(fake_quantize(real(), usable, *limits, site.rounding).to(tag.dtype), tag)
    step = float(usable)
    tag = dataclasses.replace(tag, step=step)
    with without_gradients(site):
        codes = kernel(step, *map(_coded, operands))
    if integers:
        return with_tag(codes, tag)
    value = codes.to(tag.dtype).mul_(step)
    if torch.is_grad_enabled():
        value = straight_through_within(value, real(), *(edge * step for edge in limits))
    return with_tag(value, tag)


def without_gradients(site: Site) -> contextlib.AbstractContextManager[None]:
    """Return a context for an integer kernel on real values, which is left out of the gradient.

    Integers have no gradient, and a graph capture would put the context's content into a graph of
    its own.
    """
    integers = site.switches.system == "integer"
    return contextlib.nullcontext() if integers else torch.no_grad()


def in_full_precision(site: Site, x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context without autocast for steps on real values (see :func:`without_gradients`).

    Integer ops look after themselves.
    """
    integers = site.switches.system == "integer"
    return contextlib.nullcontext() if integers else without_autocast(x.device.type)


def _coded(x: Tensor) -> Tensor:
    """Return the codes of a tagged tensor, with a tag whose step is a number."""
    tag = tag_held_by(x)
    codes = integer_codes(x)
    step = float(tag.step)
    return with_tag(codes, Tag(step, tag.bits, tag.site, tag.dtype, tag.zero_point, tag.reach))


def _has_readable_step(x: Tensor) -> bool:
    """Whether there are codes, and a number that they stand for."""
    tag = tag_of(x)
    return tag is not None and tag.rounded and isinstance(readable(tag.step), float)


def _dtype(operands: Sequence[Tensor]) -> torch.dtype:
    tag = tag_held_by(operands[0])
    return tag.dtype


def _cap(site: Site) -> float:
    limit = site.output_limit()
    return math.inf if limit is None else limit
