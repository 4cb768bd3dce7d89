"""The steps of attention: scores, masks, probabilities."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.integer import (
    code_limits,
    divide_by_scale,
    integer_op,
    is_power_of_two,
    payload_dtype,
)
from lightning_linger.core.payload import real_values
from lightning_linger.core.rounding import ROUNDINGS
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by, with_tag_of
from lightning_linger.ops.kernel import Target, run_kernel, run_on_grid
from lightning_linger.ops.matmul import product
from lightning_linger.ops.mul import integer_mul
from lightning_linger.ops.select import FLOAT_LIMIT, INFINITE, integer_masked_fill, kept_range
from lightning_linger.ops.softmax import integer_softmax

SCORES, PROBABILITIES = "scores", "probabilities"


@integer_op("linger::add_mask")
def integer_add_mask(
    x: Tensor, mask: Tensor, scale: float, bits: int, rounding: str, platform: str
) -> Tensor:
    """Add a mask of real values to codes, at their scale.

    A place of the mask at -1000 or below becomes the lowest code. Every other one is rounded to the
    scale and saturated, then added with saturation.

    Args:
        x: Codes.
        mask: Real values that broadcast to ``x``.
        scale: Step of ``x`` and of the result.
        bits: Width of both.
        rounding: Rounding rule.
        platform: Name of the target.
    """
    low, high = code_limits(bits)
    added = ROUNDINGS[rounding](divide_by_scale(mask.float(), scale)).clamp_(low, high)
    total = (x.float() + added).clamp_(low, high)
    return torch.where(mask <= -INFINITE, low, total).to(payload_dtype(bits))


@integer_add_mask.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


class Mask(NamedTuple):
    """What keeps scores from counting.

    Args:
        blocked: Boolean, true where a score does not count, or None.
        added: Real values to add to the scores, or None.
    """

    blocked: Tensor | None = None
    added: Tensor | None = None

    def hidden(self) -> Tensor | None:
        """Return where a score does not count."""
        if self.added is None:
            return self.blocked
        infinite = self.added <= -INFINITE
        return infinite if self.blocked is None else infinite | self.blocked


def masked_scores(site: Site, q: Tensor, k: Tensor, factor: float, mask: Mask) -> Tensor:
    """Return the tagged scores ``q @ k^T * factor``, masked.

    Args:
        site: The site, which has the part ``scores``.
        q: Tagged ``[..., L, E]``.
        k: Tagged ``[..., S, E]``.
        factor: Positive; see the package.
        mask: What keeps scores from counting, in a shape that broadcasts to ``[..., L, S]``.
    """
    if factor != 1.0 and not (is_power_of_two(factor) or _multiplies(site)):
        q, factor = _scaled(site, q, factor), 1.0

    def observe(scores: Tensor) -> Tensor:
        hidden = mask.hidden()
        if mask.added is not None:
            scores = torch.stack([scores, scores + mask.added])
        return scores if hidden is None else kept_range(scores, hidden, site.part(SCORES).grid.bits)

    scores = product(site, q, with_tag_of(k, k.mT), site.part(SCORES), factor, observe)
    if mask.added is not None:
        scores = _add_mask(site, scores, mask.added)
    return scores if mask.blocked is None else _block(site, scores, mask.blocked)


def probabilities_of(site: Site, scores: Tensor) -> Tensor:
    """Return the tagged softmax of tagged scores over the last dimension."""
    tag = tag_held_by(scores)
    dim = scores.dim() - 1

    def kernel(target: Target, codes: Tensor) -> Tensor:
        return integer_softmax(
            codes,
            dim,
            float(tag.step),
            tag.bits,
            target.scale,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )

    return run_kernel(site, site.part(PROBABILITIES), [scores], lambda x: x.softmax(dim), kernel)


def dropped(site: Site, x: Tensor, p: float) -> Tensor:
    """Drop in training; what a consumer sees in evaluation is on the grid."""
    if p == 0.0 or not site.training or site.switches.system == "integer":
        return x
    return with_tag_of(x, F.dropout(x, p, True))


def causally_blocked(site: Site, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return what a causal mask blocks; in evaluation the same tensor every time."""
    key = f"causal {rows} {columns} {device}"
    found: Tensor | None = site.prepared.get(key)
    if found is None:
        allowed = torch.ones(rows, columns, dtype=torch.bool, device=device).tril()
        found = allowed.logical_not()
        if not site.training:
            site.prepared[key] = found
    return found


def _scaled(site: Site, q: Tensor, factor: float) -> Tensor:
    """Multiply by a constant of the operand's width; no code saturates, and none is lost."""
    tag = tag_held_by(q)
    whole = 2.0 ** math.ceil(math.log2(factor))
    unit = whole * 2.0 ** (1 - tag.bits)
    code = min(round(factor / unit), code_limits(tag.bits)[1])
    scaled = dataclasses.replace(
        tag,
        step=tag.step * whole,
        site=site.key,
        reach=None if tag.reach is None else tag.reach * factor,
    )

    def kernel(step: float, codes: Tensor) -> Tensor:
        constant = torch.full((), code, dtype=codes.dtype, device=codes.device)
        limits = code_limits(tag.bits)
        return integer_mul(
            codes,
            constant,
            float(tag.step),
            unit,
            step,
            tag.bits,
            *limits,
            site.rounding,
            site.platform_name,
        )

    return run_on_grid(site, [q], scaled, lambda: q * (code * unit), kernel)


def _add_mask(site: Site, scores: Tensor, mask: Tensor) -> Tensor:
    tag = dataclasses.replace(tag_held_by(scores), site=site.key, reach=None)
    added = real_values(mask)

    def kernel(step: float, codes: Tensor) -> Tensor:
        return integer_add_mask(codes, added, step, tag.bits, site.rounding, site.platform_name)

    def real() -> Tensor:
        return scores + added.clamp(min=-FLOAT_LIMIT)

    return run_on_grid(site, [scores], tag, real, kernel)


def _block(site: Site, scores: Tensor, blocked: Tensor) -> Tensor:
    tag = dataclasses.replace(tag_held_by(scores), site=site.key, reach=None)
    low, _ = code_limits(tag.bits)

    def kernel(step: float, codes: Tensor) -> Tensor:
        return integer_masked_fill(
            codes, blocked, low, step, step, tag.bits, site.rounding, site.platform_name
        )

    return run_on_grid(
        site, [scores], tag, lambda: scores.masked_fill(blocked, -FLOAT_LIMIT), kernel
    )


def _multiplies(site: Site) -> bool:
    return site.platform is not None and site.platform.rescale == "multiply"
