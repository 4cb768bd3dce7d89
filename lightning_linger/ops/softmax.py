"""Softmax and its logarithms: the engine's kernel where it has one, exact integer steps elsewhere.

Without an engine kernel every exponential is an entry of a table of whole numbers, their sum is
exact, and one division rounds. Nothing depends on how a machine computes ``exp`` or ``log``, or in
which order it adds.
"""

from __future__ import annotations

import dataclasses
import decimal
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.integer import integer_op, is_power_of_two, payload_dtype
from lightning_linger.core.payload import integer_codes, step_of
from lightning_linger.core.platform import Platform, arithmetic_of
from lightning_linger.core.registry import register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by, tag_of, with_tag
from lightning_linger.ops import luna, tflite, tflite_curves
from lightning_linger.ops.arguments import to_tuple
from lightning_linger.ops.exact import quotient, to_codes
from lightning_linger.ops.kernel import KernelOp, Target

# Fraction bits of exponentials: a sum of up to 2^22 of them is exact in float64.
FRACTION = 30
# The logarithm of a mantissa is a straight line between 2^10 + 1 points.
LOG_POINTS = 10
# Fraction bits of those points.
LOG_FRACTION = 40

# Entries of a table that are computed one by one, in bits; all others are products of two.
_ROW_BITS = 8
# exp(-22) * 2^30 rounds to 0.
_VANISHED = 22.0

# Decimal arithmetic is the same everywhere, unlike a machine's `exp` and `log`.
_DIGITS = decimal.Context(prec=60, rounding=decimal.ROUND_HALF_EVEN)

# Widths of the engines' own kernels, operands and results.
ENGINE_BITS = 8
_ENGINE_INPUT, _ENGINE_OUTPUT = 25, 15


class SoftmaxCall(NamedTuple):
    """Bound arguments of ``F.softmax`` and its relatives; ``dim`` counts from the front."""

    input: Tensor
    dim: int
    dtype: torch.dtype | None = None


class LogSumExpCall(NamedTuple):
    """Bound arguments of ``torch.logsumexp``; ``dim`` counts from the front."""

    input: Tensor
    dim: tuple[int, ...]
    keepdim: bool = False


# --- exact steps ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def exponentials(scale: float, bits: int) -> NDArray[np.int64]:
    """Return ``round(exp(-d * scale) * 2^30)`` for the distances ``d`` between two codes.

    Up to 8 bits the roundings are those of the exact numbers. Beyond, an entry is the product of
    two numbers in Q62, which differs next to ties (closer than 2^-29) at most.

    Args:
        scale: Step of the codes.
        bits: Width of the codes.

    Returns:
        ``[n]`` whole numbers. The last is 0, and so are those of all greater distances; or ``n`` is
        ``2^bits``, the number of distances.
    """
    powers = _powers(scale, 1 << min(bits, _ROW_BITS))
    if bits > _ROW_BITS:
        row = scale * (1 << _ROW_BITS)
        rows = _powers(row, min(1 << (bits - _ROW_BITS), int(_VANISHED / row) + 2))
        powers = _product(rows[:, None], powers).ravel()
    table: NDArray[np.int64] = (powers + (1 << (61 - FRACTION))) >> (62 - FRACTION)
    vanished = np.flatnonzero(table == 0)
    if len(vanished):
        table = table[: vanished[0] + 1].copy()
    table.setflags(write=False)
    return table


def _powers(scale: float, count: int) -> NDArray[np.int64]:
    """Return ``exp(-d * scale)`` for the first ``d``, in Q62."""
    fraction = 128
    with decimal.localcontext(_DIGITS):
        ratio = int((-decimal.Decimal(scale)).exp() * (1 << fraction))
    powers, power = [], 1 << fraction
    for _ in range(count):
        powers.append((power + (1 << (fraction - 63))) >> (fraction - 62))
        power = power * ratio >> fraction
    return np.array(powers, np.int64)


def _product(x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.int64]:
    """Multiply Q62 numbers from 0 to 1, rounding down, in halves of 31 bits."""
    half, mask = 31, (1 << 31) - 1
    x1, x0, y1, y0 = x >> half, x & mask, y >> half, y & mask
    middle = x1 * y0 + x0 * y1 + (x0 * y0 >> half)
    product: NDArray[np.int64] = x1 * y1 + (middle >> half)
    return product


@functools.cache
def logarithms() -> NDArray[np.float64]:
    """Return ``log(1 + j / 2^10)`` for ``j`` from 0 to 2^10, rounded to 40 fraction bits."""
    points = 1 << LOG_POINTS
    with decimal.localcontext(_DIGITS):
        exact = [(1 + decimal.Decimal(j) / points).ln() for j in range(points + 1)]
        whole = [int((x * (1 << LOG_FRACTION)).to_integral_value()) for x in exact]
    table = np.array(whole, np.float64) / 2.0**LOG_FRACTION
    table.setflags(write=False)
    return table


def exponential_sums(
    x: Tensor, dim: Sequence[int], scale: float, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``2^30 * exp`` of the distances to the maximum, and what they are made of.

    Args:
        x: Codes.
        dim: Dimensions to reduce.
        scale: Step of ``x``.
        bits: Width of ``x``.

    Returns:
        In float64: the distances of the codes to their maximum, the exponentials of their
        negatives (whole numbers, see :func:`exponentials`), and the sums of these over ``dim``,
        which keep the reduced dimensions.
    """
    whole = x.to(torch.int32)
    distances = whole.amax(list(dim), keepdim=True) - whole
    table = torch.tensor(exponentials(scale, bits), dtype=torch.float64, device=x.device)
    terms = table[distances.clamp(max=len(table) - 1).long()]
    return distances.double(), terms, terms.sum(list(dim), keepdim=True)


def log_of_sums(sums: Tensor) -> Tensor:
    """Return ``log(sums / 2^30)`` of whole numbers from 2^30 on, off by at most 1.3e-7.

    The mantissa's logarithm is interpolated; each step is one IEEE float64 operation, so that every
    machine gives the same bits.
    """
    table = torch.tensor(logarithms(), device=sums.device)
    mantissa, exponent = torch.frexp(sums)
    position = (mantissa * 2.0 - 1.0) * (1 << LOG_POINTS)
    index = position.floor()
    low, high = table[index.long()], table[index.long() + 1]
    octaves = (exponent - 1 - FRACTION).double() * math.log(2.0)
    return (low + (position - index) * (high - low)) + octaves


def _engine_of(platform: str, scales: Sequence[float], bits: Sequence[int]) -> Platform | None:
    """Return the target if it has a kernel of its own for these widths and steps."""
    target = arithmetic_of(platform)
    if target is None or target.curves not in luna.CURVES or max(bits) > ENGINE_BITS:
        return None
    return target if all(map(is_power_of_two, scales)) else None


def _fraction(scale: float) -> int:
    """Return ``q`` of a step ``2^-q``."""
    return 1 - math.frexp(scale)[1]


def _on_last_axis(x: Tensor, dim: int, scale: float) -> Tensor:
    """Return codes as the engine's operands, the reduced dimension last."""
    whole = x.movedim(dim, -1).to(torch.int64)
    return luna.align(whole, _fraction(scale), _ENGINE_INPUT, 32)


def _softmax(
    x: Tensor,
    dim: int,
    scale_x: float,
    bits_x: int,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    fixed = tflite_curves.narrow_engine("softmax", platform, scale_o, bits_x, bits_o)
    if fixed is not None:
        function = tflite.softmax_in_float if fixed.curves == "tflite_float" else tflite.softmax
        found = function(x.movedim(dim, -1), scale_x).long() - tflite.LOW
        codes = found.clamp_(low, high).movedim(-1, dim).contiguous()
        return codes.to(payload_dtype(bits_o))
    engine = _engine_of(platform, (scale_x, scale_o), (bits_x, bits_o))
    if engine is None:
        _, terms, sums = exponential_sums(x, [dim], scale_x, bits_x)
        return to_codes(terms / (sums * scale_o), bits_o, low, high, rounding)
    found = luna.softmax(_on_last_axis(x, dim, scale_x), engine.curves)
    codes = luna.align(found, _ENGINE_OUTPUT, _fraction(scale_o), 32)
    return codes.clamp_(low, high).movedim(-1, dim).contiguous().to(payload_dtype(bits_o))


# --- integer kernels --------------------------------------------------------------------------


@integer_op("linger::softmax")
def integer_softmax(
    x: Tensor,
    dim: int,
    scale_x: float,
    bits_x: int,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Softmax of codes along one dimension.

    A LUNA engine's own kernel runs where all widths are 8 bits or fewer (within 1.7e-5 of the real
    function before the last rounding). Elsewhere the exponentials are whole numbers from a table,
    ``e`` of the distance to the maximum, and the result is ``round(e / (sum * scale_o))`` with one
    float64 division: within ``(n + 1) * 2^-31`` of the real function of ``n`` values before the
    last rounding, and with power-of-two steps the same as exact integers would round it.

    No code is special. A code that stands for minus infinity weighs ``exp(-distance)`` like every
    other; where all codes along the dimension are alike (a fully masked row) the result is uniform,
    ``1 / n``.

    Args:
        x: Codes, any shape.
        dim: Dimension along which results add up to one.
        scale_x: Step of ``x``.
        bits_x: Width of ``x``.
        scale_o: Step of the result, which lies in [0, 1].
        bits_o: Width of the result.
        low: Smallest code of the result.
        high: Largest code of the result.
        rounding: Rounding rule; an engine's kernel rounds half up.
        platform: Name of the target.
    """
    return _softmax(x, dim, scale_x, bits_x, scale_o, bits_o, low, high, rounding, platform)


@integer_softmax.register_fake
def _(
    x: Tensor, dim: int, scale_x: float, bits_x: int, scale_o: float, bits_o: int, *_: object
) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits_o))


@integer_op("linger::softmin")
def integer_softmin(
    x: Tensor,
    dim: int,
    scale_x: float,
    bits_x: int,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Softmax of negated codes: that of ``-1 - x``, which has as many bits as ``x``."""
    return _softmax(~x, dim, scale_x, bits_x, scale_o, bits_o, low, high, rounding, platform)


@integer_softmin.register_fake
def _(
    x: Tensor, dim: int, scale_x: float, bits_x: int, scale_o: float, bits_o: int, *_: object
) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits_o))


@integer_op("linger::log_softmax")
def integer_log_softmax(
    x: Tensor,
    dim: int,
    scale_x: float,
    bits_x: int,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Logarithm of the softmax of codes along one dimension (arguments as ``linger::softmax``).

    venus has a kernel of its own for 8 bits: the logarithm of a probability in Q15, which is
    ``-2^31`` in Q25 (-64) for a probability of 0. Elsewhere the result is
    ``round(-(distance * scale_x + log(sum)) / scale_o)``, within ``(n + 1) * 2^-31 + 1.3e-7`` of
    the real function before the last rounding.
    """
    if tflite_curves.narrow_engine("log_softmax", platform, scale_o, bits_x, bits_o) is not None:
        found = tflite.log_softmax(x.movedim(dim, -1), scale_x).long() - tflite.HIGH
        codes = found.clamp_(low, high).movedim(-1, dim).contiguous()
        return codes.to(payload_dtype(bits_o))
    engine = _engine_of(platform, (scale_x, scale_o), (bits_x, bits_o))
    if engine is None or engine.curves != "venus":
        distances, _, sums = exponential_sums(x, [dim], scale_x, bits_x)
        real = quotient(-(distances * scale_x + log_of_sums(sums)), scale_o)
        return to_codes(real, bits_o, low, high, rounding)
    found = luna.log_softmax(_on_last_axis(x, dim, scale_x))
    codes = luna.align(found, _ENGINE_INPUT, _fraction(scale_o), 32)
    return codes.clamp_(low, high).movedim(-1, dim).contiguous().to(payload_dtype(bits_o))


@integer_log_softmax.register_fake
def _(
    x: Tensor, dim: int, scale_x: float, bits_x: int, scale_o: float, bits_o: int, *_: object
) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits_o))


@integer_op("linger::logsumexp")
def integer_logsumexp(
    x: Tensor,
    dim: Sequence[int],
    keepdim: bool,
    scale_x: float,
    bits_x: int,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Logarithm of the sum of exponentials: ``round((max * scale_x + log(sum)) / scale_o)``.

    Within ``(n + 1) * 2^-31 + 1.3e-7`` of the real function of ``n`` values before the last
    rounding, on every platform: no engine has a kernel for it. Arguments as ``linger::softmax``.
    """
    _, _, sums = exponential_sums(x, dim, scale_x, bits_x)
    top = x.to(torch.int32).amax(list(dim), keepdim=True).double()
    real = quotient(top * scale_x + log_of_sums(sums), scale_o)
    if not keepdim:
        real = real.squeeze(tuple(dim))
    return to_codes(real, bits_o, low, high, rounding)


@integer_logsumexp.register_fake
def _(
    x: Tensor,
    dim: Sequence[int],
    keepdim: bool,
    scale_x: float,
    bits_x: int,
    scale_o: float,
    bits_o: int,
    *_: object,
) -> Tensor:
    shape = x.float().sum(list(dim), keepdim=keepdim).shape
    return x.new_empty(shape, dtype=payload_dtype(bits_o))


# --- ops --------------------------------------------------------------------------------------


_KERNELS: dict[str, Any] = {
    "softmax": (F.softmax, integer_softmax),
    "softmin": (F.softmin, integer_softmin),
    "log_softmax": (F.log_softmax, integer_log_softmax),
}


class SoftmaxOp(KernelOp):
    """``softmax``, ``softmin`` and ``log_softmax``.

    Args:
        kind: Canonical op name.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.function, self.integer_kernel = _KERNELS[kind]

    def bind(self, input: Tensor, dim: int | None = None, *rest: Any, **kwargs: Any) -> SoftmaxCall:
        """Bind ``F.softmax(input, dim, _stacklevel, dtype)`` or ``torch.softmax(..., dtype)``."""
        rank = len(input.shape)
        if dim is None:  # torch's deprecated choice
            dim = 0 if rank in (0, 1, 3) else 1
        dtypes = [value for value in rest if isinstance(value, torch.dtype)]
        return SoftmaxCall(input, dim % max(rank, 1), kwargs.get("dtype", *dtypes))

    def obstacle(self, call: SoftmaxCall) -> str | None:
        """A single number has nothing to add up."""
        return None if call.input.shape else "a softmax of a single number is always 1"

    def output_range(
        self, call: Any, config: QuantConfig, platform: Platform
    ) -> float | tuple[float, float] | None:
        """Probabilities lie in [0, 1]; their logarithms are observed."""
        fixed = tflite_curves.fixed_range(self.kind, config, platform)
        if fixed is not None:
            return fixed
        return None if self.kind == "log_softmax" else 1.0

    def real(self, site: Site, call: SoftmaxCall) -> Tensor:
        """Run the function of PyTorch."""
        result: Tensor = self.function(call.input, call.dim)
        return result

    def kernel(self, site: Site, call: SoftmaxCall, target: Target) -> Tensor:
        """Call the integer op."""
        tag = tag_held_by(call.input)
        codes: Tensor = self.integer_kernel(
            integer_codes(call.input),
            call.dim,
            float(tag.step),
            tag.bits,
            target.scale,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )
        return codes

    def run_fake(self, site: Site, call: SoftmaxCall) -> Any:
        """Take the kernel's value, in the dtype that the call asks for."""
        return _in_dtype(super().run_fake(site, call), call.dtype)

    def run_integer(self, site: Site, call: SoftmaxCall) -> Any:
        """Run the kernel; the dtype says what real values will be."""
        return _in_dtype(super().run_integer(site, call), call.dtype)


class LogSumExpOp(KernelOp):
    """``logsumexp`` over given dimensions."""

    def bind(self, input: Tensor, dim: Any, keepdim: bool = False) -> LogSumExpCall:
        """Bind ``(input, dim, keepdim)``."""
        rank = len(input.shape)
        return LogSumExpCall(input, tuple(d % rank for d in to_tuple(dim, 1)), keepdim)

    def real(self, site: Site, call: LogSumExpCall) -> Tensor:
        """Run the function of PyTorch."""
        return torch.logsumexp(call.input, call.dim, call.keepdim)

    def kernel(self, site: Site, call: LogSumExpCall, target: Target) -> Tensor:
        """Call ``linger::logsumexp``."""
        tag = tag_held_by(call.input)
        return integer_logsumexp(
            integer_codes(call.input),
            call.dim,
            call.keepdim,
            float(step_of(call.input)),
            tag.bits,
            target.scale,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )


def _in_dtype(y: Any, dtype: torch.dtype | None) -> Any:
    if y is NotImplemented or dtype is None:
        return y
    tag = tag_of(y)
    converted = y.to(dtype) if y.dtype.is_floating_point else y
    return converted if tag is None else with_tag(converted, dataclasses.replace(tag, dtype=dtype))


register(SoftmaxOp("softmax"))
register(SoftmaxOp("softmin"))
register(SoftmaxOp("log_softmax"))
register(LogSumExpOp("logsumexp"))
