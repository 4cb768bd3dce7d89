"""What a tagged tensor holds, as codes or as real values."""

import torch
from torch import Tensor

from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.integer import dequantize, float32_code_limits, payload_dtype
from lightning_linger.core.tags import tag_held_by, tag_of


def step_of(x: Tensor) -> Scalar:
    """Return the step of a tensor that must be tagged."""
    return tag_held_by(x).step


def real_values(x: Tensor) -> Tensor:
    """Return the real values of a tensor: integers are dequantized, everything else passes."""
    tag = tag_of(x)
    if tag is None or x.dtype.is_floating_point:
        return x
    return dequantize(x, float(tag.step), "").to(tag.dtype)


def integer_codes(x: Tensor) -> Tensor:
    """Return the payload of a tagged tensor, which may hold the codes or the real values.

    Real values on the grid come from a fake-quant forward, or left an instrumented module and
    enter the next one.
    """
    tag = tag_of(x)
    if tag is None or not x.dtype.is_floating_point:
        return x
    # In training a dropout in front scales values beyond their grid.
    codes = torch.round(x / tag.step).clamp_(*float32_code_limits(tag.bits))
    return codes.to(payload_dtype(tag.bits))
