"""Averages of codes: an exact sum, divided and rounded once; the scale stays."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_linger.core.fake_quantize import Bound, straight_through
from lightning_linger.core.integer import code_limits
from lightning_linger.core.quantizer import clamped
from lightning_linger.core.rounding import ROUNDINGS
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, storable_codes, with_tag
from lightning_linger.ops import tflite


def divide(sums: Tensor, count: int | Tensor, low: int, high: int, rounding: str) -> Tensor:
    """Return ``clamp(round(sums / count))`` of whole numbers, exactly.

    The quotient of a half-integer tie by ``count`` differs from every other quotient by at least
    ``1 / (2 * count)``, which float64 resolves for all sums below 2^50.
    """
    if rounding == "half_up":
        quotient = torch.floor((sums.double() + 0.5 * count) / count)
    else:
        quotient = ROUNDINGS[rounding](sums.double() / count)
    return quotient.clamp_(low, high)


def summable(x: Tensor, tag: Tag) -> Tensor:
    """Return grid values in a dtype that holds their sums exactly.

    Args:
        x: Grid values.
        tag: Their tag.
    """
    # 2^17 codes of 8 bits fit a float32 sum, 512 of 16 bits do not always.
    return x if tag.bits <= 8 else x.double()


def averaged(site: Site, sums: Tensor, count: int | Tensor, tag: Tag) -> Tensor:
    """Divide sums of grid values and round to the same grid, straight-through.

    Args:
        site: The site.
        sums: Exact.
        count: By what they are divided: a number, or one per sum.
        tag: Tag of the values.

    Returns:
        The averages in the model's dtype, tagged.
    """
    average = sums / count
    with torch.no_grad():
        codes = torch.round(sums.double() / tag.step)
        if site.fixed_point:
            divided = stored_average(codes.long(), count, tag.bits, tag.zero_point).double()
        else:
            divided = divide(codes, count, *code_limits(tag.bits), site.rounding)
        rounded = divided * tag.step
    value = straight_through(rounded.to(average.dtype), average).to(tag.dtype)
    return with_tag(value, tag.at(site.key))


def stored_average(
    sums: Tensor, count: int | Tensor, bits: int, zero_point: Bound | None
) -> Tensor:
    """Return what TFLite's kernel stores, without the zero point.

    Args:
        sums: Of codes, int64.
        count: By what they are divided: a number, or one per sum.
        bits: Width of the codes.
        zero_point: What is added to a code to store it, None on a symmetric grid.
    """
    whole = count.long() if isinstance(count, Tensor) else count
    average = tflite.average(sums, whole, 0 if zero_point is None else zero_point)
    return clamped(average, *storable_codes(bits, zero_point))
