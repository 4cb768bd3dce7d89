"""What ops on two activations share: their arguments, numbers as constants, free scales."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.grid import Grid
from lightning_linger.core.integer import payload_dtype
from lightning_linger.core.payload import integer_codes, step_of
from lightning_linger.core.platform import arithmetic_of
from lightning_linger.core.quantizer import Quantizer
from lightning_linger.core.registry import Op
from lightning_linger.core.rounding import round_value
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of
from lightning_linger.ops.arguments import refused_arguments


class PairCall(NamedTuple):
    """Bound arguments of ``torch.add``, ``torch.sub``, ``torch.mul`` and ``torch.div``."""

    input: Any
    other: Any
    refused: str | None = None


class PairOp(Op):
    """An op on two activations, or on an activation and a number."""

    def bind(self, input: Any, other: Any, *more: Any, **kwargs: Any) -> PairCall:
        """Bind ``(input, other)``."""
        if more or kwargs.pop("alpha", 1) != 1:
            return PairCall(
                input, other, "`alpha` other than 1 has no integer form; multiply first"
            )
        return PairCall(input, other, refused_arguments(kwargs))

    def operands(self, call: PairCall) -> list[Any]:
        """Both sides, numbers included."""
        return [call.input, call.other]

    def obstacle(self, call: PairCall) -> str | None:
        """Arguments that scale an operand, or ask for another kind of result."""
        return call.refused

    def operand_pair(self, site: Site, call: PairCall) -> list[Any] | None:
        """Return both sides on their grids, numbers as they are; None if one stays plain."""
        pair: list[Any] = []
        for position, value in enumerate((call.input, call.other)):
            if isinstance(value, Tensor):
                operand = site.operand(position, value)
                if operand is None:
                    return None
                pair.append(operand)
            else:
                pair.append(value)
        return pair


# --- free scales ------------------------------------------------------------------------------


def stored_zero(platform: str, *dtypes: torch.dtype) -> int | None:
    """Return the zero point of stored codes where all are of 8 bits, else None."""
    engine = arithmetic_of(platform)
    if engine is None or any(dtype != torch.int8 for dtype in dtypes):
        return None
    return engine.zero_point


def computes_with_ratios(platform: str) -> bool:
    """Whether scales are free numbers, whose products round where shifts would not."""
    engine = arithmetic_of(platform)
    return engine is not None and engine.rescale != "shift"


def multiplies(platform: str) -> bool:
    """Whether the engine computes in float32 with steps, rather than in integers with shifts."""
    engine = arithmetic_of(platform)
    return engine is not None and engine.rescale == "multiply"


# --- numbers ----------------------------------------------------------------------------------


class Factor(NamedTuple):
    """A number as a constant on a grid of its own."""

    value: float
    code: int
    step: float
    bits: int


def as_factor(value: Any, output: Quantizer) -> Any:
    """Return a number as a constant of the output's width, tensors as they are.

    The step is the finest power of two, not below ``2^-30``, at which the number fits. The constant
    is off by at most half a step: of the number, one part in ``2^(bits - 1) - 1``.

    On an affine grid the number is one end of a range whose other end is zero, as TFLite's
    converter has it: a constant that is exact.
    """
    if isinstance(value, Tensor):
        return value
    if output.grid.affine:
        return affine_constant(float(value), output.grid)
    bits = output.grid.bits
    top = 2 ** (bits - 1) - 1
    number = float(value)
    step = 2.0 ** (1 - bits)
    while abs(number) > top * step:
        step *= 2.0
    while number != 0.0 and abs(number) * 2.0 <= top * step and step > 2.0**-30:
        step /= 2.0
    code = max(-top - 1, min(top, math.floor(number / step + 0.5)))
    return Factor(code * step, code, step, bits)


def affine_constant(number: float, grid: Grid) -> Factor:
    """Return a number as the last code of an affine grid that begins at zero."""
    low, high = min(number, 0.0), max(number, 0.0)
    step = grid.step_value_of_range(low, high)
    code = round_value(number / step, "half_away")
    return Factor(code * step, code, step, grid.code_bits)


def step_or(value: Any) -> Scalar:
    """Return the step of a constant or of a tagged tensor."""
    return value.step if isinstance(value, Factor) else step_of(value)


def factor_codes(value: Any, like: Tensor) -> Tensor:
    """Return the code of a constant, on the device of a tensor, or the payload of a tensor."""
    if isinstance(value, Factor):
        return torch.full((), value.code, dtype=payload_dtype(value.bits), device=like.device)
    return integer_codes(value)


# --- of either operand ------------------------------------------------------------------------


def device_type(x: Any, y: Any) -> str:
    """Return where a pair of operands lies, one of which may be a number."""
    tensor: Tensor = x if isinstance(x, Tensor) else y
    return tensor.device.type


def real_dtype(x: Any, y: Any) -> torch.dtype:
    """Return the floating dtype that the model sees."""
    tag = tag_of(x) or tag_of(y)
    return tag.dtype if tag is not None else torch.float32
