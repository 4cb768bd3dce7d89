"""Operands of different steps at one, so that their codes can be compared and put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_linger.core.fake_quantize import Scalar, fake_quantize, straight_through
from lightning_linger.core.grid import Grid
from lightning_linger.core.integer import requantize
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.quantizer import readable
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_of


def at_common_step(site: Site, operands: Sequence[Tensor]) -> tuple[list[Tensor], Tag]:
    """Round operands of one width to the coarsest step among them, so that none loses its range.

    With a zero point among them, they meet on a grid that covers the ranges of all.

    Args:
        site: The site.
        operands: Tagged tensors.

    Returns:
        The operands, in the number system of the moment (payloads in integers), and the tag of
        what is selected from them. Gradients pass unchanged: nothing saturates.
    """
    tags = [tag for tag in map(tag_of, operands) if tag is not None]
    if any(tag.affine for tag in tags):
        common = _covering(site, tags)
        moved = [_at_step(site, x, tag, common) for x, tag in zip(operands, tags, strict=True)]
        return moved, common
    step = _coarsest([tag.step for tag in tags])
    known = [tag.reach for tag in tags if tag.reach is not None]
    reach = _coarsest(known) if len(known) == len(tags) else None
    common = dataclasses.replace(tags[0], step=step, site=site.key, reach=reach)
    moved = [_at_step(site, x, tag, common) for x, tag in zip(operands, tags, strict=True)]
    return moved, common


def _covering(site: Site, tags: Sequence[Tag]) -> Tag:
    """Return a grid that covers what the codes of all tags stand for: one of theirs if it does."""
    ends = [[tag.step * code for code in tag.limits] for tag in tags]
    config = site.config
    assert config is not None  # a quantized site
    kind = config.scale or (site.platform.scale if site.platform is not None else "free")
    grid = Grid(tags[0].width, kind, symmetry="affine")
    common = dataclasses.replace(tags[0], bits=grid.code_bits, site=site.key, reach=None)
    if any(isinstance(end, Tensor) for pair in ends for end in pair):
        lows, highs = (
            torch.stack([torch.as_tensor(end, dtype=torch.float32) for end in side])
            for side in zip(*ends, strict=True)
        )
        low, high = lows.amin(), highs.amax()
        step = grid.step_of_range(low, high)
        place = grid.zero_point_of_range(low, step)
        return dataclasses.replace(common, step=step, zero_point=place)
    lowest, highest = min(float(low) for low, _ in ends), max(float(high) for _, high in ends)
    for tag, (low_end, high_end) in zip(tags, ends, strict=True):
        if tag.affine and low_end <= lowest and high_end >= highest:
            return dataclasses.replace(common, step=tag.step, zero_point=tag.zero_point)
    value = grid.step_value_of_range(lowest, highest)
    zero_point = grid.zero_point_value_of_range(lowest, value)
    return dataclasses.replace(common, step=value, zero_point=zero_point)


def _at_step(site: Site, x: Tensor, tag: Tag, common: Tag) -> Tensor:
    step = common.step
    integer = site.switches.system == "integer"
    if tag.step is step or (isinstance(step, float) and tag.step == step):
        return integer_codes(x) if integer else x
    source, wanted = readable(tag.step), readable(step)
    if not (isinstance(source, float) and isinstance(wanted, float)):
        return fake_quantize(x, wanted, *common.limits, site.rounding)
    limits = [int(code) for code in common.limits] if common.affine else []
    codes = requantize(
        integer_codes(x),
        source,
        wanted,
        tag.bits,
        common.bits,
        site.rounding,
        site.platform_name,
        *limits,
    )
    return codes if integer else straight_through(codes.to(x.dtype).mul_(wanted), x)


def _coarsest(steps: Sequence[Scalar]) -> Scalar:
    numbers = [step for step in steps if isinstance(step, float)]
    if len(numbers) == len(steps):
        return max(numbers)
    coarsest = torch.as_tensor(steps[0])
    for step in steps[1:]:
        coarsest = torch.maximum(coarsest, torch.as_tensor(step, device=coarsest.device))
    return coarsest
