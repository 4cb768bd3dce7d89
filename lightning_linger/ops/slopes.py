"""Slopes for negative values: the kernel of ``prelu`` and ``leaky_relu``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.integer import integer_op, multiplier, payload_dtype, rescale
from lightning_linger.core.platform import arithmetic_of
from lightning_linger.core.rounding import ROUNDINGS
from lightning_linger.ops import tflite


@integer_op("linger::prelu")
def integer_prelu(
    x: Tensor,
    slopes: Tensor,
    scale_x: float,
    scale_w: float,
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Multiply negative codes by the slope of their channel; round once.

    Args:
        x: Codes ``[N, C, ...]``.
        slopes: Codes, one or ``[C]``.
        scale_x: Step of ``x``.
        scale_w: Step of the slopes.
        scale_o: Step of the result.
        bits_x: Width of ``x``.
        bits_w: Width of the slopes.
        bits_o: Width of the result.
        low: Smallest code of the result.
        high: Largest code of the result.
        rounding: Rounding rule.
        platform: Name of the target. Where it multiplies by float32 numbers instead of shifting,
            each code is multiplied once, by :func:`factors`; where it works in fixed point, the
            kernel is TFLite's.
    """
    shape = [-1, *[1] * (x.dim() - 2)] if slopes.numel() > 1 else []
    slopes = slopes.reshape(shape)
    engine = arithmetic_of(platform)
    if engine is not None and engine.fixed_point:
        scales = (scale_x, scale_w, scale_o)
        codes = tflite.slopes(x, slopes, scales, engine.multiplier_rounding).clamp_(low, high)
    elif engine is not None and engine.rescale == "multiply":
        positive, negative = factors(slopes, scale_x, scale_w, scale_o)
        product = x.float() * torch.where(x < 0, negative, positive)
        codes = ROUNDINGS[rounding](product).clamp_(low, high)
    else:
        wide = x.double()
        positive = wide * (scale_x / scale_o)
        negative = wide * slopes * (scale_x * scale_w / scale_o)
        codes = rescale(torch.where(x < 0, negative, positive), 1.0, low, high, rounding)
    return codes.to(payload_dtype(bits_o))


@integer_prelu.register_fake
def _(
    x: Tensor,
    slopes: Tensor,
    scale_x: float,
    scale_w: float,
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    *_: object,
) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits_o))


def factors(
    slopes: Tensor, scale_x: float, scale_w: float, scale_o: float
) -> tuple[Tensor, Tensor]:
    """Return what positive and negative codes are multiplied by, in float32.

    Args:
        slopes: Codes of the slopes, any shape.
        scale_x: Step of the operand.
        scale_w: Step of the slopes.
        scale_o: Step of the result.
    """
    positive = multiplier(scale_x, [1.0], scale_o)[0].to(slopes.device)
    negative = multiplier(scale_x, [scale_w], scale_o)[0].to(slopes.device)
    return positive, slopes.float() * negative


def finest_of_slopes(step_x: Scalar, step_w: Scalar) -> Scalar:
    """Return the finest step of a result to which codes and their products are shifted right."""
    if isinstance(step_x, float) and isinstance(step_w, float):
        return max(step_x, step_x * step_w)
    return step_x * torch.clamp(torch.as_tensor(step_w), min=1.0)
