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

MAX, MIN = 2**31 - 1, -(2**31)
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


# --- primitives ---------------------------------------------------------------------------------


def quantize_multiplier(real: float) -> tuple[int, int]:
    """Return ``(m, shift)`` with ``real`` about ``m * 2^(shift - 31)``, ``2^30 <= m < 2^31``.

    Args:
        real: Not negative.
    """
    if real == 0.0:
        return 0, 0
    fraction, shift = math.frexp(real)
    m = math.floor(fraction * 2**31 + 0.5)
    if m == 2**31:
        m, shift = 2**30, shift + 1
    return (0, 0) if shift < -31 else (m, shift)


def saturating_rounding_doubling_high_mul(a: Tensor, b: Tensor | int) -> Tensor:
    """Return ``a * b / 2^31``; halves go toward plus infinity."""
    product = a * b
    nudge = torch.where(product >= 0, 2**30, 1 - 2**30)
    high = torch.div(product + nudge, 2**31, rounding_mode="trunc")
    return high.clamp_(max=MAX)  # -2^31 * -2^31


def rounding_divide_by_power_of_two(x: Tensor, exponent: Tensor | int) -> Tensor:
    """Return ``x / 2^exponent``; halves go away from zero."""
    mask = (torch.ones_like(x) << exponent) - 1
    threshold = (mask >> 1) + (x < 0).long()
    return (x >> exponent) + ((x & mask) > threshold).long()


def multiply_by_quantized_multiplier(x: Tensor, m: int, shift: int) -> Tensor:
    """Return ``x * m * 2^(shift - 31)``, rounded twice."""
    high = saturating_rounding_doubling_high_mul(_wrapped(x << max(shift, 0)), m)
    return rounding_divide_by_power_of_two(high, max(-shift, 0))


def rescale(x: Tensor, source: int, target: int) -> Tensor:
    """Bring a fixed-point number from ``Q_source`` to ``Q_target``, with saturation."""
    if source <= target:
        return rounding_divide_by_power_of_two(x, target - source)
    return (x << (source - target)).clamp(MIN, MAX)


def _wrapped(x: Tensor) -> Tensor:
    return ((x + 2**31) & (2**32 - 1)) - 2**31


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
    """Return ``exp(a)`` in Q0 of numbers ``a <= 0`` in ``Q_integer_bits``."""
    fraction = 31 - integer_bits
    quarter = 1 << (fraction - 2)
    reduced = (a & (quarter - 1)) - quarter
    result = _exp_between_quarter_and_zero(rescale(reduced, integer_bits, 0))
    rest = reduced - a
    for exponent, factor in _EXPONENTIALS.items():
        if integer_bits > exponent:
            has_bit = (rest >> (fraction + exponent)) & 1 == 1
            result = torch.where(has_bit, _mul(result, factor), result)
    if integer_bits > 5:
        result = torch.where(a < -(1 << (fraction + 5)), 0, result)
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
    scale_x, scale_y, scale_o = map(_float32, scales)
    zero_x, zero_y, zero_o = zero_points
    twice = 2.0 * max(scale_x, scale_y)
    a = multiply_by_quantized_multiplier(
        (x.long() - zero_x) << 20, *quantize_multiplier(scale_x / twice)
    )
    b = multiply_by_quantized_multiplier(
        (y.long() - zero_y) << 20, *quantize_multiplier(scale_y / twice)
    )
    total = multiply_by_quantized_multiplier(a + b, *quantize_multiplier(twice / (2**20 * scale_o)))
    return _codes(total + zero_o)


def mul(
    x: Tensor,
    y: Tensor,
    scales: tuple[float, float, float],
    zero_points: tuple[int, int, int],
) -> Tensor:
    """Multiply int8 codes (arguments as :func:`add`)."""
    scale_x, scale_y, scale_o = map(_float32, scales)
    zero_x, zero_y, zero_o = zero_points
    product = (x.long() - zero_x) * (y.long() - zero_y)
    real = quantize_multiplier(scale_x * scale_y / scale_o)
    return _codes(multiply_by_quantized_multiplier(product, *real) + zero_o)


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


def l2_normalization(x: Tensor, zero_point: int) -> Tensor:
    """Return int8 codes divided by their norm over the last axis, at scale 1/128, zero point 0."""
    centered = x.long() - zero_point
    rows = centered.reshape(-1, centered.shape[-1])
    found = [_inverse_root(int(row.square().sum())) for row in rows]
    codes = [
        multiply_by_quantized_multiplier(row, m, shift + 7)
        for row, (m, shift) in zip(rows, found, strict=True)
    ]
    return _codes(torch.stack(codes).reshape(x.shape))


def _inverse_root(square: int) -> tuple[int, int]:
    """Return ``1 / sqrt(square)`` as a multiplier and a shift."""
    if square <= 1:
        return MAX, 0
    places = 11
    while square >= 2**29:
        square, places = square // 4, places + 1
    pairs = (32 - square.bit_length() - 1) // 2 - 1
    places -= pairs
    number = torch.tensor(square << (2 * pairs)) >> 1
    half = rounding_divide_by_power_of_two(number, 1)
    x = torch.tensor(2**28)
    for _ in range(5):
        cube = rescale(_mul(_mul(x, x), x), 9, 3)
        x = rescale(_mul(x, 2**28 + 2**27) - _mul(half, cube), 6, 3)
    m = int(_mul(x, _ROOT_OF_HALF))
    return (m << -places, 0) if places < 0 else (m, -places)


def hard_swish(x: Tensor, scales: tuple[float, float], zero_points: tuple[int, int]) -> Tensor:
    """Return ``x * relu6(x + 3) / 6`` of int8 codes, in 16-bit steps.

    Args:
        x: Codes.
        scales: Of ``x`` and the result.
        zero_points: Likewise.
    """
    fine = float(np.float32(_float32(scales[0]) * np.float32(1.0 / 128.0)))
    m_o, shift_o = quantize_multiplier(float(np.float32(fine) / np.float32(scales[1])))
    m_r, shift_r = quantize_multiplier(float(np.float32(fine) / np.float32(3.0 / 32768.0)))
    value = (x.long() - zero_points[0]) << 7
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
    return _codes(rounding_divide_by_power_of_two(product, -shift_o) + zero_points[1])


def _to_16_bits(m: int) -> int:
    return 2**15 - 1 if m >= MAX - 2**15 else (m + 2**15) >> 16


def _mul16(a: Tensor, b: int) -> Tensor:
    product = a * b
    nudge = torch.where(product >= 0, 2**14, 1 - 2**14)
    return torch.div(product + nudge, 2**15, rounding_mode="trunc").clamp(max=2**15 - 1)


def _saturated16(x: Tensor) -> Tensor:
    return x.clamp(-(2**15), 2**15 - 1)
