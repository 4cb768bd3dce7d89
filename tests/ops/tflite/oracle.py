"""TFLite's int8 kernels in plain loops over stored codes, written down from their description.

Nothing here comes from the library: arrays are int64, layouts are torch's, taps outside an image
are skipped, and every rounding is spelled out.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def quantized_multiplier(real: float) -> tuple[int, int]:
    if real == 0:
        return 0, 0
    fraction, shift = math.frexp(real)
    m = math.floor(fraction * 2.0**31 + 0.5)
    if m == 2**31:
        m, shift = 2**30, shift + 1
    return (0, 0) if shift < -31 else (m, shift)


def truncated(a: int, b: int) -> int:
    return abs(a) // b * (1 if a >= 0 else -1)


def high_mul(a: int, b: int) -> int:
    if a == b == -(2**31):
        return 2**31 - 1
    product = a * b
    return truncated(product + (2**30 if product >= 0 else 1 - 2**30), 2**31)


def rounding_shift(x: int, exponent: int) -> int:
    rest, threshold = x & (2**exponent - 1), ((2**exponent - 1) >> 1) + (x < 0)
    return (x >> exponent) + (rest > threshold)


def multiplied(x: int, real: float, single: bool = False) -> int:
    m, shift = quantized_multiplier(real)
    if single:
        return (x * m + 2 ** (30 - shift)) >> (31 - shift)
    return rounding_shift(high_mul(x * 2 ** max(shift, 0), m), max(-shift, 0))


def multiplied_wide(x: int, real: float) -> int:
    m, shift = quantized_multiplier(real)
    reduced = (m + 2**15) >> 16 if m < 0x7FFF0000 else 0x7FFF
    return (x * reduced + 2 ** (14 - shift)) >> (15 - shift)


def each(function: Any, *arrays: Any) -> Ints:
    return np.vectorize(function, otypes=[np.int64])(*arrays)


def requantized(acc: Ints, reals: Sequence[float], zero: int, low: int, high: int) -> Ints:
    """Bring accumulators ``[N, C, ...]`` to the output."""
    out = np.empty_like(acc)
    for channel in range(acc.shape[1]):
        real = reals[channel % len(reals)]
        out[:, channel] = each(lambda a, real=real: multiplied(int(a), real), acc[:, channel])
    return np.clip(out + zero, low, high)


def convolved(
    q: Ints,
    w: Ints,
    bias: Ints | None,
    zero: int,
    stride: tuple[int, int],
    before: tuple[int, int],
    size: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Ints:
    """Accumulate stored codes ``[N, C, H, W]`` with weights ``[O, C / groups, KH, KW]``."""
    batch, _, height, width = q.shape
    outputs, inputs, kernel_h, kernel_w = w.shape
    acc = np.zeros((batch, outputs, *size), np.int64)
    for o in range(outputs):
        group = o // (outputs // groups)
        for y in range(size[0]):
            for x in range(size[1]):
                for ky in range(kernel_h):
                    for kx in range(kernel_w):
                        py = y * stride[0] - before[0] + ky * dilation[0]
                        px = x * stride[1] - before[1] + kx * dilation[1]
                        if 0 <= py < height and 0 <= px < width:
                            taps = q[:, group * inputs : (group + 1) * inputs, py, px] - zero
                            acc[:, o, y, x] += (taps * w[o, :, ky, kx]).sum(1)
        if bias is not None:
            acc[:, o] += bias[o]
    return acc


def same_padding(source: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return the size of the result and the padding in front."""
    size = -(-source // stride)
    total = max((size - 1) * stride + (kernel - 1) * dilation + 1 - source, 0)
    return size, total // 2


def scattered(
    q: Ints,
    w: Ints,
    bias: Ints | None,
    zero: int,
    stride: tuple[int, int],
    before: tuple[int, int],
    size: tuple[int, int],
) -> Ints:
    """Accumulate a transposed convolution with weights ``[C, O, KH, KW]``."""
    batch, inputs, height, width = q.shape
    _, outputs, kernel_h, kernel_w = w.shape
    acc = np.zeros((batch, outputs, *size), np.int64)
    for c in range(inputs):
        for y in range(height):
            for x in range(width):
                for ky in range(kernel_h):
                    for kx in range(kernel_w):
                        py, px = y * stride[0] - before[0] + ky, x * stride[1] - before[1] + kx
                        if 0 <= py < size[0] and 0 <= px < size[1]:
                            acc[:, :, py, px] += (q[:, c, y, x] - zero)[:, None] * w[c, :, ky, kx]
    return acc if bias is None else acc + bias[None, :, None, None]


def averaged(
    q: Ints, kernel: tuple[int, int], stride: tuple[int, int], before: tuple[int, int]
) -> Ints:
    """Average stored codes over the taps of a window that lie in the image."""
    batch, channels, height, width = q.shape
    size = [
        (n + 2 * b - k) // s + 1
        for n, b, k, s in zip((height, width), before, kernel, stride, strict=True)
    ]
    out = np.zeros((batch, channels, *size), np.int64)
    for y in range(size[0]):
        for x in range(size[1]):
            top, left = y * stride[0] - before[0], x * stride[1] - before[1]
            window = q[:, :, max(top, 0) : top + kernel[0], max(left, 0) : left + kernel[1]]
            count = window.shape[2] * window.shape[3]
            out[:, :, y, x] = each(
                lambda total, count=count: truncated(
                    int(total) + (count // 2 if total > 0 else -(count // 2)), count
                ),
                window.sum((2, 3)),
            )
    return out


def mean(sums: Ints, count: int, scale_x: float, scale_o: float) -> Ints:
    """Return the mean, without the zero point of the result."""
    m, shift = quantized_multiplier(scale_x / scale_o)
    places = min(count.bit_length() - 1, 32, 31 + shift)
    m, shift = (m << places) // count, shift - places
    return each(
        lambda s: rounding_shift(high_mul(int(s) * 2 ** max(shift, 0), m), max(-shift, 0)), sums
    )


def older_mean(sums: Ints, count: int, scale_x: float, scale_o: float) -> Ints:
    def one(s: int) -> int:
        acc = multiplied(int(s), scale_x / scale_o)
        return truncated(acc + (count // 2 if acc > 0 else -(count // 2)), count)

    return each(one, sums)


def added(
    a: Ints, b: Ints, sign: int, scales: Sequence[float], left: int = 20, single: bool = False
) -> Ints:
    """Add codes without zero points; the result has none either."""
    number = np.float64 if sign > 0 else np.float32
    x, y, o = (number(np.float32(scale)) for scale in scales)
    twice = number(2) * max(x, y)
    reals = float(x / twice), float(y / twice), float(twice / (number(2**left) * o))

    def one(p: int, q: int) -> int:
        p = multiplied(int(p) << left, reals[0], single)
        q = multiplied(int(q) << left, reals[1], single)
        return multiplied(p + sign * q, reals[2], single)

    return each(one, *np.broadcast_arrays(a, b))
