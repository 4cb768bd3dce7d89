"""Tagged tensors at another width, in every number system."""

import dataclasses

import torch
from torch import Tensor

from lightning_linger.core.capture import capturing
from lightning_linger.core.fake_quantize import Scalar, fake_quantize, straight_through
from lightning_linger.core.integer import code_limits, is_power_of_two, requantize
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.quantizer import readable
from lightning_linger.core.rounding import Rounding
from lightning_linger.core.tags import Tag, with_tag


def requantized(
    x: Tensor,
    tag: Tag,
    bits: int,
    *,
    site: str,
    rounding: Rounding,
    platform: str,
    fake: bool,
    training: bool,
) -> Tensor:
    """Round a tagged tensor to another width at the step shifted by the difference in bits.

    Args:
        x: Codes or real values.
        tag: Its tag.
        bits: The other width, 2 to 32.
        site: Key of the site that asks.
        rounding: Rounding rule.
        platform: Name of the target.
        fake: Whether real values stay real values, with a gradient.
        training: Whether this is a forward of training.

    Returns:
        Codes, or real values on the grid of the other width; tagged.
    """
    step = narrowed_step(tag, bits)
    tag_after = dataclasses.replace(
        tag, step=step, bits=bits, site=site, zero_point=None, rounded=True
    )
    usable = readable(step)
    real = fake and x.dtype.is_floating_point
    if real:
        y = fake_quantize(x, usable, *code_limits(bits), rounding)
        exact = training or not isinstance(usable, float) or is_power_of_two(usable)
        if exact or capturing():
            return with_tag(y, tag_after)
    # With a free scale, real values next to a tie are not as near to it as codes are.
    codes = requantize(
        integer_codes(x), float(tag.step), float(step), tag.bits, bits, rounding, platform
    )
    if real:
        codes = straight_through(codes.to(x.dtype).mul_(usable), y)
    return with_tag(codes, tag_after)


def narrowed_step(tag: Tag, bits: int) -> Scalar:
    """Return the step at which ``bits`` cover what the codes of a tag reach."""
    step = tag.step * 2.0 ** (tag.bits - bits)
    if bits > tag.bits or tag.reach is None:
        return step
    needed = tag.reach * 2.0 ** (1 - bits)
    if isinstance(step, float) and isinstance(needed, float):
        # Only by powers of two of the present step: a shift, also for a free scale.
        while step > tag.step and step * 0.5 >= needed:
            step *= 0.5
        return step
    shift = torch.ceil(torch.log2(torch.as_tensor(needed) / tag.step)).clamp(0, tag.bits - bits)
    return tag.step * torch.exp2(shift)
