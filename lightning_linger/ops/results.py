"""The result of an accumulation: its limit, its step and its codes, in every number system."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_linger.core.capture import capturing
from lightning_linger.core.fake_quantize import Scalar, straight_through, straight_through_within
from lightning_linger.core.integer import code_limits
from lightning_linger.core.rounding import ROUNDINGS, round_value
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import WIDEST_OPERAND, Tag, with_tag


@dataclass(frozen=True)
class IntegerResult:
    """What an integer kernel has to produce.

    Args:
        scale: Step of the result; 0 asks for real values in float32.
        bits: Width of the result.
        low: Smallest code.
        high: Largest code.
        tag: Tag of the result, None for real values.
    """

    scale: float
    bits: int
    low: int
    high: int
    tag: Tag | None


def integer_result(site: Site, product: float, tag: Tag) -> IntegerResult:
    """Return what a kernel has to produce from an accumulator of step ``product``.

    Args:
        site: The layer.
        product: Step of the accumulator, the coarsest of its channels.
        tag: Tag of the input.
    """
    output = site.output
    if output is None:
        if site.config is not None and site.config.output_bits == 32:
            limits = _limited_codes(site, product, *code_limits(32))
            return IntegerResult(product, 32, *limits, Tag(product, 32, site.key, tag.dtype))
        return IntegerResult(0.0, 0, 0, 0, None)
    step = output.latest_step = float(output.step(minimum_step(site, product)))
    low, high = (int(bound) for bound in output.code_bounds(step))
    if not _only_caps(site):
        low, high = _limited_codes(site, step, low, high)
    return IntegerResult(step, output.grid.code_bits, low, high, output.tag(step, tag.dtype))


def minimum_step(site: Site, product: Scalar | None) -> Scalar | None:
    """Return the finest step a result may have, given the step of its accumulator."""
    return product if site.platform is not None and site.platform.right_shift_only else None


def finish(
    site: Site,
    y: Tensor,
    product: Scalar | None,
    quantized: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Limit and quantize the result of a layer.

    Args:
        site: The layer.
        y: Its result, float64 where float32 could not hold the accumulator.
        product: Step of the accumulator, or those of its channels as they broadcast to ``y``; None
            if not quantized.
        quantized: Whether the layer is quantized now.
        dtype: The dtype the model expects.
    """
    coarsest = product.amax() if isinstance(product, Tensor) else product
    limits = site.active_limits
    static = limits is not None and limits.output is not None and limits.output.kind == "static"
    if not (quantized and site.output is not None and static):
        y = site.limit_output(y)
    if not quantized:
        if site.watching:
            site.watch_result(y)
        return y.to(dtype)
    if site.output is None:
        if site.config is not None and site.config.output_bits == 32 and coarsest is not None:
            return _accumulator_output(site, y, coarsest, dtype)
        return y.to(dtype)
    cap = limits.output.value if static and limits and limits.output else math.inf
    if site.learning:
        site.output.observe(y, cap)
    step = site.output.step(minimum_step(site, coarsest))
    if product is not None and site.training and site.rounds_twice:
        y = y + outward_by_rounding_twice(y.detach(), product, step)
    return site.output.round(y, step, dtype, overwrite=not capturing())


def outward_by_rounding_twice(y: Tensor, product: Scalar, step: Scalar) -> Tensor:
    """Return what makes one rounding of real values the two of a fixed-point engine.

    The engine rounds ``acc * m / 2^31`` to steps that are ``2^-n`` of the result's, and these to
    the result's (:mod:`lightning_linger.core.fixed_point`). Values just inside the middle of two
    codes are taken onto it first and outward then: it is as if they were half a finer step further
    out. The fewer bits, the smaller is ``n``.

    Args:
        y: Real values of any shape.
        product: Step of the accumulator, which broadcasts to ``y``.
        step: Step of the result.
    """
    ratio = torch.as_tensor(product / step, dtype=y.dtype, device=y.device)
    exponent = torch.frexp(ratio).exponent
    half = torch.ldexp(torch.full_like(ratio, 0.5), exponent) * step
    return torch.copysign(torch.where(exponent < 0, half, 0.0), y)


def finish_codes(
    site: Site,
    codes: Tensor,
    result: IntegerResult,
    dtype: torch.dtype,
    real: Callable[[], Tensor],
) -> Tensor:
    """Return what an integer kernel produced as the site's result, in evaluation.

    Args:
        site: The site.
        codes: Codes, or real values if ``result`` asks for them.
        result: What the kernel had to produce.
        dtype: The dtype the model expects.
        real: The float function, for its gradient.
    """
    integers = site.switches.system == "integer"
    if result.tag is None:
        value = site.limit_output(codes).to(dtype)
    elif integers:
        value = codes
    else:
        wide = codes.double() if result.bits > WIDEST_OPERAND else codes.to(dtype)
        value = (wide * result.scale).to(dtype)
    if torch.is_grad_enabled() and not integers:
        carrier = site.limit_output(real())
        if result.tag is None:
            value = straight_through(value, carrier.to(dtype))
        else:
            low, high = result.low * result.scale, result.high * result.scale
            value = straight_through_within(value, carrier, low, high)
    return value if result.tag is None else with_tag(value, result.tag)


def _only_caps(site: Site) -> bool:
    """Whether an output limit cuts the observed range instead of the values (a static one)."""
    limits = site.active_limits
    return limits is None or limits.output is None or limits.output.kind == "static"


def _limited_codes(site: Site, step: float, low: int, high: int) -> tuple[int, int]:
    """Cut code bounds at the output limit; rounding is monotone, so this is limiting first."""
    bound = site.output_limit()
    if bound is None:
        return low, high
    # Without a tensor, whose values a graph capture would hide.
    lowest, highest = (round_value(edge / step, site.rounding) for edge in (-bound, bound))
    return max(low, lowest), min(high, highest)


def _accumulator_output(site: Site, y: Tensor, product: Scalar, dtype: torch.dtype) -> Tensor:
    """Round a result to the 32-bit grid of its accumulator, with the gradient of the identity."""
    with torch.no_grad():
        low, high = code_limits(32)
        codes = ROUNDINGS[site.rounding](y.double() / product)
        values = (codes.clamp_(low, high) * product).to(dtype)
    y = straight_through(values, y.to(dtype))
    return with_tag(y, Tag(product, 32, site.key, dtype))
