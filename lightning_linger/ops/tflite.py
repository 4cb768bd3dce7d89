"""Integer arithmetic of TFLite's reference kernels: 32-bit fixed point with double rounding.

Whole numbers live in int64 tensors and stay within 32 bits, as the kernels' do. ``Qi`` is a format
with ``i`` integer bits and ``31 - i`` fraction bits. Scales are float32 numbers, and
``real = scale * (code - zero_point)``.

The formulas are those of gemmlowp's fixed-point library and of TFLite's reference kernels
(Jacob et al. 2018, https://arxiv.org/abs/1712.05877); every function equals the compiled kernels on
the recorded vectors. A build may round once instead, or use tables in floating point: these are
other variants, with other results.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_linger.core.fixed_point import (
    MAX,
    MIN,
    FixedPointRounding,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    rounding_divide_by_power_of_two,
    saturating_rounding_doubling_high_mul,
)
from lightning_linger.core.platform import Averaging
from lightning_linger.core.rounding import half_away

LOW, HIGH = -128, 127

# e^-(2^k) in Q0, for k from -2 to 4.
_EXPONENTIALS = {
    -2: 1672461947,
    -1: 1302514674,
    0: 790015084,
    1: 290630308,
    2: 39332535,
    3: 720401,
    4: 242,
}
_EXP_MINUS_EIGHTH, _ONE_THIRD = 1895147668, 715827883
_48_17, _MINUS_32_17 = 1515870810, -1010580540  # Q2
_LN_2, _ROOT_4_OF_HALF, _ROOT_OF_HALF = 1488522236, 1805811301, 1518500250
_ALPHA_N, _ALPHA_D, _ALPHA_I, _ALPHA_F = 117049297, 127690142, 1057819769, 638450708

# Integer bits of the operand of exp in a softmax, and of its sum.
_SOFTMAX_INPUT, _SOFTMAX_SUM = 5, 12


# --- fixed-point numbers ------------------------------------------------------------------------


def rescale(x: Tensor, source: int, target: int) -> Tensor:
    """Bring a fixed-point number from ``Q_source`` to ``Q_target``, with saturation."""
    if source <= target:
        return rounding_divide_by_power_of_two(x, target - source)
    return (x << (source - target)).clamp(MIN, MAX)


def _rounding_half_sum(a: Tensor, b: int) -> Tensor:
    total = a + b
    return torch.div(total + torch.where(total >= 0, 1, -1), 2, rounding_mode="trunc")


def _leading_zeros(x: Tensor) -> Tensor:
    """Count the leading zeros of positive 32-bit numbers."""
    return 32 - torch.frexp(x.double())[1].long()


_mul = saturating_rounding_doubling_high_mul


def _codes(x: Tensor) -> Tensor:
    return x.clamp(LOW, HIGH).to(torch.int8)


def _float32(x: float) -> float:
    return float(np.float32(x))


def _radius(integer_bits: int, shift: int) -> int:
    """Return the largest difference of codes that a fixed-point format still holds."""
    return math.floor(((1 << integer_bits) - 1) * 2.0 ** (31 - integer_bits) / 2.0**shift)


# --- functions in fixed point -------------------------------------------------------------------


def exp_on_negative(a: Tensor, integer_bits: int) -> Tensor:
    """Return ``exp(a)`` in Q0 of numbers ``a <= 0`` in ``Q_integer_bits``, 5 bits at most."""
    fraction = 31 - integer_bits
    quarter = 1 << (fraction - 2)
    reduced = (a & (quarter - 1)) - quarter
    result = _exp_between_quarter_and_zero(rescale(reduced, integer_bits, 0))
    rest = reduced - a
    for exponent, factor in _EXPONENTIALS.items():
        if integer_bits > exponent:
            has_bit = (rest >> (fraction + exponent)) & 1 == 1
            result = torch.where(has_bit, _mul(result, factor), result)
    return torch.where(a == 0, MAX, result)


def _exp_between_quarter_and_zero(a: Tensor) -> Tensor:
    x = a + 2**28
    x2 = _mul(x, x)
    x3, x4 = _mul(x2, x), _mul(x2, x2)
    tail = _mul(rounding_divide_by_power_of_two(x4, 2) + x3, _ONE_THIRD) + x2
    tail = rounding_divide_by_power_of_two(tail, 1)
    return _EXP_MINUS_EIGHTH + _mul(x + tail, _EXP_MINUS_EIGHTH)


def _reciprocal_core(a: Tensor) -> Tensor:
    """Return ``2 / (1 + a)`` in Q2 for ``a`` in [0, 1) in Q0, by three steps of Newton."""
    half = _rounding_half_sum(a, MAX)
    x = _48_17 + _mul(half, _MINUS_32_17)
    for _ in range(3):
        error = 2**29 - _mul(half, x)
        x = x + rescale(_mul(x, error), 4, 2)
    return x


def one_over_one_plus(a: Tensor) -> Tensor:
    """Return ``1 / (1 + a)`` in Q0 for ``a`` in [0, 1) in Q0."""
    return rescale(_reciprocal_core(a), 1, 0)


def one_minus_over_one_plus(a: Tensor) -> Tensor:
    """Return ``(1 - a) / (1 + a)`` in Q0 for ``a`` in [0, 1) in Q0."""
    return rescale(_reciprocal_core(a) - 2**29, 2, 0)


def log_of_sum(v: Tensor) -> Tensor:
    """Return ``log(v)`` in Q5 of numbers ``v >= 1`` in Q12."""
    half, quarter = torch.full_like(v, _ROOT_OF_HALF), 2**29
    zeros = _leading_zeros(v)
    residual_a = rescale(_mul(_shifted(v, zeros - 1), half), 1, 0)
    exponent_a = _saturated(((_SOFTMAX_SUM - zeros) << 25) + rescale(v.new_tensor(quarter), 0, 6))
    places = _leading_zeros(_mul(v, half)) - 1
    residual_b = _shifted(v, places)
    exponent_b = _saturated(((_SOFTMAX_SUM - places) << 25) - rescale(v.new_tensor(quarter), 0, 6))
    residual = torch.minimum(residual_a, residual_b)
    exponent = torch.maximum(exponent_a, exponent_b)
    p = _rounding_half_sum(residual, _ROOT_4_OF_HALF)
    q = (residual - _ROOT_4_OF_HALF) * 2
    square = _mul(q, q)
    numerator = _mul(q, residual) + _mul(_mul(q, square), _ALPHA_N)
    denominator = _mul(p, _ALPHA_I + q + _mul(square, _ALPHA_D)) + _mul(q, _ALPHA_F)
    small = _mul(rescale(numerator, 0, 6), one_over_one_plus(denominator))
    return rescale(_saturated(_mul(exponent, _LN_2) + small), 6, 5)


def _shifted(x: Tensor, places: Tensor) -> Tensor:
    return _saturated(x << places)


def _saturated(x: Tensor) -> Tensor:
    return x.clamp(MIN, MAX)


# --- operators ----------------------------------------------------------------------------------


def add(
    x: Tensor,
    y: Tensor,
    scales: tuple[float, float, float],
    zero_points: tuple[int, int, int],
) -> Tensor:
    """Add int8 codes.

    Args:
        x: Codes.
        y: Codes that broadcast with ``x``.
        scales: Of ``x``, ``y`` and the result.
        zero_points: Likewise.
    """
    zero_x, zero_y, zero_o = zero_points
    return _codes(centred_sum(x.long() - zero_x, y.long() - zero_y, 1, scales) + zero_o)


def centred_sum(
    x: Tensor,
    y: Tensor,
    sign: int,
    scales: tuple[float, float, float],
    left_shift: int = 20,
    rounding: FixedPointRounding = "double",
) -> Tensor:
    """Add (``sign`` 1) or subtract (``sign`` -1) codes without their zero points.

    Args:
        x: Codes.
        y: Codes that broadcast with ``x``.
        sign: The factor of ``y``. The ratios of scales are float64 numbers in the kernel of a sum,
            and float32 numbers in that of a difference.
        scales: Of ``x``, ``y`` and the result.
        left_shift: Bits that operands have more at their common scale: 20, of int16 codes 15.
        rounding: Of fixed-point products.

    Returns:
        Codes of the result, not clamped, in int64.
    """
    number = float if sign > 0 else np.float32
    scale_x, scale_y, scale_o = (number(_float32(scale)) for scale in scales)
    twice = number(2.0) * max(scale_x, scale_y)
    ratios = (scale_x / twice, scale_y / twice, twice / (number(2.0**left_shift) * scale_o))
    of_x, of_y, of_o = (quantize_multiplier(float(ratio)) for ratio in ratios)
    a = multiply_by_quantized_multiplier(x.long() << left_shift, *of_x, rounding)
    b = multiply_by_quantized_multiplier(y.long() << left_shift, *of_y, rounding)
    return multiply_by_quantized_multiplier(a + b if sign > 0 else a - b, *of_o, rounding)


def mul(
    x: Tensor,
    y: Tensor,
    scales: tuple[float, float, float],
    zero_points: tuple[int, int, int],
) -> Tensor:
    """Multiply int8 codes (arguments as :func:`add`)."""
    zero_x, zero_y, zero_o = zero_points
    return _codes(centred_product(x.long() - zero_x, y.long() - zero_y, scales) + zero_o)


def centred_product(
    x: Tensor,
    y: Tensor,
    scales: tuple[float, float, float],
    rounding: FixedPointRounding = "double",
) -> Tensor:
    """Multiply codes without their zero points (see :func:`centred_sum`)."""
    scale_x, scale_y, scale_o = map(_float32, scales)
    real = quantize_multiplier(scale_x * scale_y / scale_o)
    return multiply_by_quantized_multiplier(x.long() * y.long(), *real, rounding)


def average(sums: Tensor, count: Tensor | int, zero_point: Tensor | int) -> Tensor:
    """Divide sums of codes without their zero points; halves of *stored* codes go away from zero.

    Args:
        sums: Sums over windows, in int64.
        count: How many codes each holds.
        zero_point: Of the codes.

    Returns:
        Codes without zero point, in int64.
    """
    stored = sums + count * zero_point
    half = torch.as_tensor(count, device=sums.device) // 2
    away = torch.where(stored > 0, stored + half, stored - half)
    return torch.div(away, count, rounding_mode="trunc") - zero_point


def centred_mean(
    sums: Tensor,
    count: int,
    scales: tuple[float, float],
    averaging: Averaging = "scaled",
    rounding: FixedPointRounding = "double",
) -> Tensor:
    """Divide sums of codes without their zero points and bring them to the output scale.

    Args:
        sums: Sums over the axes, in int64.
        count: How many codes each holds.
        scales: Of the codes and the result.
        averaging: ``scaled`` puts the count into the multiplier; ``divided``, the older kernel for
            axes of an image, divides behind it, halves away from zero.
        rounding: Of fixed-point products.

    Returns:
        Codes of the result, not clamped, in int64.
    """
    scale_x, scale_o = map(_float32, scales)
    m, shift = quantize_multiplier(scale_x / scale_o)
    if averaging == "divided":
        return average(multiply_by_quantized_multiplier(sums, m, shift, rounding), count, 0)
    places = min(count.bit_length() - 1, 32, 31 + shift)
    return multiply_by_quantized_multiplier(sums, (m << places) // count, shift - places, rounding)


def slopes(
    x: Tensor,
    slope: Tensor,
    scales: tuple[float, float, float],
    rounding: FixedPointRounding = "double",
) -> Tensor:
    """Multiply negative codes by codes of slopes (PRELU); all without zero points.

    Args:
        x: Codes.
        slope: Codes that broadcast to ``x``.
        scales: Of ``x``, the slopes and the result.
        rounding: Of fixed-point products.

    Returns:
        Codes of the result, not clamped, in int64.
    """
    scale_x, scale_w, scale_o = map(_float32, scales)
    positive = quantize_multiplier(scale_x / scale_o)
    negative = quantize_multiplier(scale_x * scale_w / scale_o)
    whole = x.long()
    return torch.where(
        whole >= 0,
        multiply_by_quantized_multiplier(whole, *positive, rounding),
        multiply_by_quantized_multiplier(whole * slope.long(), *negative, rounding),
    )


def leaky_relu(
    x: Tensor,
    slope: float,
    scales: tuple[float, float],
    rounding: FixedPointRounding = "double",
) -> Tensor:
    """Multiply negative codes by a number; all without zero points.

    Args:
        x: Codes.
        slope: The number, a float32.
        scales: Of ``x`` and the result, whose ratios are float32 numbers.
        rounding: Of fixed-point products.

    Returns:
        Codes of the result, not clamped, in int64.
    """
    scale_x, scale_o = (np.float32(scale) for scale in scales)
    positive = quantize_multiplier(float(scale_x / scale_o))
    negative = quantize_multiplier(abs(float(scale_x * np.float32(slope) / scale_o)))
    whole = x.long()
    below = multiply_by_quantized_multiplier(whole, *negative, rounding)
    return torch.where(
        whole >= 0,
        multiply_by_quantized_multiplier(whole, *positive, rounding),
        -below if slope < 0 else below,
    )


def logistic(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Return the sigmoid of int8 codes, at scale 1/256 and zero point -128."""
    inside, a, low, high = _centered(x, scale, zero_point)
    positive = one_over_one_plus(exp_on_negative(-a.abs(), 4))
    value = torch.where(a < 0, MAX - positive, positive)
    value = torch.where(a == 0, 2**30, value)
    codes = rounding_divide_by_power_of_two(value, 23) - 128
    return _codes(torch.where(inside, codes, torch.where(low, LOW, high)))


def tanh(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Return the tanh of int8 codes, at scale 1/128 and zero point 0."""
    inside, a, low, high = _centered(x, scale, zero_point)
    # The same bits with one integer bit more are twice the number.
    positive = one_minus_over_one_plus(exp_on_negative(-a.abs(), 5))
    value = torch.where(a < 0, -positive, positive)
    value = torch.where(a == 0, 0, value)
    codes = rounding_divide_by_power_of_two(value, 24)
    return _codes(torch.where(inside, codes, torch.where(low, LOW, high)))


def _centered(x: Tensor, scale: float, zero_point: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return where codes are within the format, their values in Q4, where they are below, 127."""
    m, shift = quantize_multiplier(_float32(scale) * 2**27)
    radius = _radius(4, shift)
    distance = x.long() - zero_point
    low, inside = distance <= -radius, distance.abs() < radius
    a = multiply_by_quantized_multiplier(distance.clamp(-radius, radius), m, shift)
    return inside, a, low, torch.full_like(distance, HIGH)


def softmax(x: Tensor, scale: float, beta: float = 1.0) -> Tensor:
    """Return the softmax of int8 codes over the last axis, at scale 1/256 and zero point -128."""
    m, shift = _softmax_multiplier(scale, beta)
    distance = x.long() - x.long().amax(-1, keepdim=True)
    near = distance >= -_radius(_SOFTMAX_INPUT, shift)
    terms, total = _exponentials(distance, near, m, shift)
    zeros = _leading_zeros(total)
    reciprocal = one_over_one_plus((total << zeros) - 2**31)
    product = _mul(reciprocal, terms)
    codes = rounding_divide_by_power_of_two(product, _SOFTMAX_SUM - zeros + 23) - 128
    return _codes(torch.where(near, codes, LOW))


def softmax_in_float(x: Tensor, scale: float) -> Tensor:
    """Return :func:`softmax` by a table of float32 exponentials, as desktop builds do.

    Which order such a build adds in is not known for sure, nor is its ``exp``.
    """
    distance = x.long().amax(-1, keepdim=True) - x.long()
    table = torch.exp(torch.arange(512, device=x.device).float() * -_float32(scale))
    terms = table[distance]
    total = terms.sum(-1, keepdim=True) * 2.0**-8
    return _codes(half_away(terms * (1.0 / total)) + LOW)


def log_softmax(x: Tensor, scale: float, beta: float = 1.0) -> Tensor:
    """Return the log-softmax of int8 codes over the last axis, at scale 16/256, zero point 127."""
    m, shift = _softmax_multiplier(scale, beta)
    reverse = quantize_multiplier(2.0 ** (31 - shift) / m)
    least = -_radius(_SOFTMAX_INPUT, shift)
    distance = x.long() - x.long().amax(-1, keepdim=True)
    _, total = _exponentials(distance, distance >= least, m, shift)
    logarithm = log_of_sum(total)
    adjusted = multiply_by_quantized_multiplier(logarithm - 2**31, *reverse)
    near = distance > adjusted.clamp(min=least - 1)
    scaled = multiply_by_quantized_multiplier(torch.where(near, distance, 0), m, shift)
    codes = rounding_divide_by_power_of_two(scaled - logarithm, 22) + 127
    return _codes(torch.where(near, codes, LOW))


def _softmax_multiplier(scale: float, beta: float) -> tuple[int, int]:
    real = min(_float32(beta) * _float32(scale) * 2.0 ** (31 - _SOFTMAX_INPUT), float(MAX))
    return quantize_multiplier(real)


def _exponentials(distance: Tensor, near: Tensor, m: int, shift: int) -> tuple[Tensor, Tensor]:
    scaled = multiply_by_quantized_multiplier(torch.where(near, distance, 0), m, shift)
    terms = exp_on_negative(scaled, _SOFTMAX_INPUT)
    counted = torch.where(near, rescale(terms, 0, _SOFTMAX_SUM), 0)
    return terms, counted.sum(-1, keepdim=True)


def resize_bilinear(
    x: Tensor, size: tuple[int, int], align_corners: bool, zero_point: int
) -> Tensor:
    """Interpolate codes ``[N, C, H, W]`` with positions of 10 fraction bits.

    Args:
        x: Codes without their zero point.
        size: Of the result.
        align_corners: Whether the outermost centers stay; otherwise pixels have half centers.
        zero_point: Of the codes; halves of stored codes go away from zero.

    Returns:
        Codes without zero point, in int64.
    """
    mixed = x.long() + zero_point
    for dim, target in zip((2, 3), size, strict=True):
        first, second, far = (
            torch.tensor(values, device=x.device)
            for values in _taps(x.shape[dim], target, align_corners)
        )
        shares = far.view(-1, *[1] * (3 - dim))
        near, next_ = mixed.index_select(dim, first), mixed.index_select(dim, second)
        mixed = near * (1024 - shares) + next_ * shares
    nudge = torch.where(mixed > 0, 2**19, -(2**19))
    return torch.div(mixed + nudge, 2**20, rounding_mode="trunc") - zero_point


def _taps(source: int, target: int, align_corners: bool) -> tuple[list[int], list[int], list[int]]:
    """Return the two neighbours of each place, and the weights of the second ones."""
    scale = (1024 * source + target // 2) // target
    if align_corners and target > 1:
        scale = (1024 * (source - 1) + (target - 1) // 2) // (target - 1)
    first, second, far = [], [], []
    for place in range(target):
        position = place * scale + (0 if align_corners else scale // 2 - 512)
        low = max(int(position / 1024), 0)
        first.append(low)
        second.append(min(int((position + 1023) / 1024), source - 1))
        far.append(position - 1024 * low)
    return first, second, far


def l2_normalization(x: Tensor, zero_point: int) -> Tensor:
    """Return int8 codes divided by their norm over the last axis, at scale 1/128, zero point 0."""
    centered = x.long() - zero_point
    m, shift = _inverse_roots(centered.square().sum(-1, keepdim=True))
    return _codes(multiply_by_quantized_multiplier(centered, m, shift + 7))


def _inverse_roots(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``1 / sqrt(square)`` of whole numbers as multipliers and shifts."""
    number, places = squares.clamp(min=2), torch.full_like(squares, 11)
    while bool((large := number >= 2**29).any()):
        number, places = torch.where(large, number >> 2, number), places + large.long()
    pairs = (_leading_zeros(number) - 1) // 2 - 1
    places = places - pairs
    half = rounding_divide_by_power_of_two((number << (2 * pairs)) >> 1, 1)
    x = torch.full_like(number, 2**28)
    for _ in range(5):
        cube = rescale(_mul(_mul(x, x), x), 9, 3)
        x = rescale(_mul(x, 2**28 + 2**27) - _mul(half, cube), 6, 3)
    m = _mul(x, _ROOT_OF_HALF) << (-places).clamp(min=0)
    is_one = squares <= 1
    return torch.where(is_one, MAX, m), torch.where(is_one, 0, (-places).clamp(max=0))


def hard_swish(x: Tensor, scales: tuple[float, float], zero_points: tuple[int, int]) -> Tensor:
    """Return ``x * relu6(x + 3) / 6`` of int8 codes, in 16-bit steps.

    Args:
        x: Codes.
        scales: Of ``x`` and the result.
        zero_points: Likewise.
    """
    centred = centred_hard_swish(x.long() - zero_points[0], scales)
    return _codes(centred + zero_points[1])


def centred_hard_swish(x: Tensor, scales: tuple[float, float]) -> Tensor:
    """Return :func:`hard_swish` of codes without zero points, not clamped, in int64."""
    fine = float(np.float32(_float32(scales[0]) * np.float32(1.0 / 128.0)))
    m_o, shift_o = quantize_multiplier(float(np.float32(fine) / np.float32(scales[1])))
    m_r, shift_r = quantize_multiplier(float(np.float32(fine) / np.float32(3.0 / 32768.0)))
    value = x.long() << 7
    scaled = _mul16(value, _to_16_bits(m_o))
    relu = value
    if shift_r > 0:
        relu = _saturated16(relu << (shift_r - 1))
    relu = _mul16(relu, _to_16_bits(m_r))
    if shift_r > 0:
        relu = _saturated16(relu << 1)
    elif shift_r < 0:
        relu = rounding_divide_by_power_of_two(relu, -shift_r)
    relu = (relu + 2**15) >> 1
    product = torch.div(relu * scaled, 2**15, rounding_mode="trunc").clamp(max=2**15 - 1)
    return rounding_divide_by_power_of_two(product, -shift_o)


def _to_16_bits(m: int) -> int:
    return 2**15 - 1 if m >= MAX - 2**15 else (m + 2**15) >> 16


def _mul16(a: Tensor, b: int) -> Tensor:
    product = a * b
    nudge = torch.where(product >= 0, 2**14, 1 - 2**14)
    return torch.div(product + nudge, 2**15, rounding_mode="trunc").clamp(max=2**15 - 1)


def _saturated16(x: Tensor) -> Tensor:
    return x.clamp(-(2**15), 2**15 - 1)
