"""Entering, leaving and changing the integer grid, as ops that every graph capture records."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from lightning_linger.core.capture import capturing
from lightning_linger.core.fixed_point import (
    multiply_by_quantized_multiplier,
    multiply_wide,
    quantize_multipliers,
)
from lightning_linger.core.platform import Platform, fixed_point_of
from lightning_linger.core.rounding import ROUNDINGS

P = ParamSpec("P")
R = TypeVar("R")

# float32 holds every integer below this magnitude.
EXACT_FLOAT32 = 2**24


class IntegerOp(Generic[P, R]):
    """A function on integers that a graph capture records as one custom op, exact under autocast.

    Outside a capture the function is called as it is: the dispatcher's layers around a custom op
    cost more than many of the kernels.
    """

    def __init__(self, name: str, function: Callable[P, R]) -> None:
        @functools.wraps(function)
        def exact(*args: P.args, **kwargs: P.kwargs) -> R:
            with contextlib.ExitStack() as stack:
                for device in ("cpu", "cuda"):
                    if torch.is_autocast_enabled(device):
                        stack.enter_context(torch.autocast(device, enabled=False))
                return function(*args, **kwargs)

        self._function = exact
        schema = torch.library.infer_schema(function, mutates_args=())
        self._op = torch.library.custom_op(name, exact, mutates_args=(), schema=schema)
        self.__doc__ = function.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function, or record the op."""
        run: Callable[P, R] = self._op if capturing() else self._function
        return run(*args, **kwargs)

    def register_fake(self, function: Callable[..., R]) -> Callable[..., R]:
        """Register what the op's result looks like, for captures.

        Args:
            function: Takes the op's arguments in their order, as many as it reads by name.
        """
        self._op.register_fake(function)
        return function


def integer_op(name: str) -> Callable[[Callable[P, R]], IntegerOp[P, R]]:
    """Make a function an :class:`IntegerOp`, e.g. ``@integer_op("linger::conv")``."""
    return lambda function: IntegerOp(name, function)


def payload_dtype(bits: int) -> torch.dtype:
    """Return the smallest integer dtype that holds ``bits``."""
    if bits <= 8:
        return torch.int8
    return torch.int16 if bits <= 16 else torch.int32


def code_limits(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest code of a width."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def float32_code_limits(bits: int) -> tuple[int, int]:
    """Return the code limits of a width, the upper one the largest that float32 holds exactly."""
    low, high = code_limits(bits)
    return low, high if bits <= 24 else high + 1 - (1 << (bits - 24))


def is_power_of_two(x: float) -> bool:
    """Whether a positive float is a power of two, so that multiplying by it is exact."""
    return x > 0 and x.hex().startswith("0x1.0000000000000p")


def rescale(acc: Tensor, ratio: Tensor | float, low: int, high: int, rounding: str) -> Tensor:
    """Return ``clamp(round(acc * ratio), low, high)`` as a float tensor; may overwrite ``acc``.

    Args:
        acc: Whole numbers in float32 (below 2^24 in magnitude, the half included) or float64.
        ratio: ``step_in / step_out``. Powers of two are exact (a shift); others multiply in the
            precision of ``acc``, float32 being what onnxruntime's kernels do.
        low: Smallest code of the result.
        high: Largest code of the result.
        rounding: A name from :mod:`lightning_linger.core.rounding`.
    """
    scaled = acc.mul_(ratio)
    if rounding == "half_up":
        return scaled.add_(0.5).floor_().clamp_(low, high)
    codes: Tensor = ROUNDINGS[rounding](scaled)
    return codes.clamp_(low, high)


def rescale_fixed_point(
    acc: Tensor, ratios: Sequence[float], engine: Platform, trailing: int = 0, wide: bool = False
) -> Tensor:
    """Return ``acc * ratio`` as whole numbers in int64, rounded as an engine's fixed point does.

    Args:
        acc: Whole numbers in any dtype, channels standing before ``trailing`` dimensions.
        ratios: ``step_in / step_out``, one or one per channel.
        engine: The target, whose rounding applies.
        trailing: Number of dimensions behind the channels.
        wide: Whether operands have 16 bits, whose sums need 64.
    """
    whole = acc.to(torch.int64)
    m, shift = quantize_multipliers(ratios, whole)
    along = (-1, *([1] * trailing)) if len(ratios) > 1 else ()
    m, shift = m.view(along), shift.view(along)
    if wide:
        return multiply_wide(whole, m, shift)
    return multiply_by_quantized_multiplier(whole, m, shift, engine.multiplier_rounding)


def multiplier(scale_a: float, scale_b: Sequence[float], scale_o: float) -> Tensor:
    """Return ``scale_a * scale_b / scale_o``, every step rounded to float32 as onnxruntime does it.

    Powers of two are exact either way. The result is on the CPU, where a division is a division: a
    GPU divides by a number through its reciprocal.
    """
    steps = torch.tensor(scale_b, dtype=torch.float32)
    return steps * steps.new_tensor(scale_a) / steps.new_tensor(scale_o)


def divide_by_scale(x: Tensor, scale: float) -> Tensor:
    """Return ``x / scale`` in float32, a true division on every device (see :func:`multiplier`)."""
    return x / torch.full((), scale, dtype=torch.float32, device=x.device)


def to_payload(codes: Tensor, bits: int) -> Tensor:
    """Store whole numbers of a float tensor in the payload dtype of ``bits``."""
    return codes.to(payload_dtype(bits))


def wide(x: Tensor, bits: int) -> Tensor:
    """Bring a payload to the float dtype in which it can be rescaled exactly."""
    return x.to(torch.float32 if bits <= 16 else torch.float64)


@integer_op("linger::quantize")
def quantize(
    x: Tensor, scale: float, bits: int, low: int, high: int, rounding: str, platform: str
) -> Tensor:
    """Round real values to codes: ``clamp(round(x / scale), low, high)``."""
    codes = ROUNDINGS[rounding](divide_by_scale(x, scale)).clamp_(low, high)
    return to_payload(codes, bits)


@quantize.register_fake
def _(x: Tensor, scale: float, bits: int, *_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits))


@integer_op("linger::dequantize")
def dequantize(x: Tensor, scale: float, platform: str) -> Tensor:
    """Return the real values ``x * scale`` in float32."""
    return x.float().mul_(scale)


@dequantize.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@integer_op("linger::requantize")
def requantize(
    x: Tensor,
    scale_x: float,
    scale_o: float,
    bits_x: int,
    bits: int,
    rounding: str,
    platform: str,
    low: int | None = None,
    high: int | None = None,
) -> Tensor:
    """Bring codes to another scale or width.

    Args:
        x: Codes.
        scale_x: Step of ``x``.
        scale_o: Step of the result.
        bits_x: Width of ``x``.
        bits: Width of the result.
        rounding: Rounding rule.
        platform: Name of the target.
        low: Smallest code of the result, if it is not that of the width.
        high: Largest code of the result, likewise.
    """
    lowest, highest = code_limits(bits)
    low, high = lowest if low is None else low, highest if high is None else high
    engine = fixed_point_of(platform)
    if engine is not None:
        return to_payload(
            rescale_fixed_point(x, [scale_x / scale_o], engine).clamp_(low, high), bits
        )
    codes = rescale(wide(x, bits_x), scale_x / scale_o, low, high, rounding)
    return to_payload(codes, bits)


@requantize.register_fake
def _(x: Tensor, scale_x: float, scale_o: float, bits_x: int, bits: int, *_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits))
