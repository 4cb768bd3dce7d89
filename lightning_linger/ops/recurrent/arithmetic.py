"""Fixed-point arithmetic that every recurrent cell is built from.

==================  ==================  =====================  ==================================
platforms' curves   gates               sigmoid, tanh          cell state (LSTM)
==================  ==================  =====================  ==================================
arcs, venusa        Q27, 32 bits        the engine's, to Q15   Q15; each product saturates at 2
venus               Q11, 16 bits        the engine's, to Q15   Q15, 24 bits
table               Q11, 16 bits        one entry per code     Q15, 24 bits
==================  ==================  =====================  ==================================

``Qn`` means ``real = code * 2^-n``. Accumulators are exact; each is brought to the gates' format by
the platform's rounding and saturates, and so does the sum of the two. Shifts between the formats of
the cell itself round half up everywhere.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lightning_linger.core.integer import EXACT_FLOAT32, code_limits, is_power_of_two
from lightning_linger.core.platform import arithmetic_of
from lightning_linger.core.rounding import ROUNDINGS
from lightning_linger.ops import luna
from lightning_linger.ops.table import Tabulation, integer_interpolate, tabulate

# Fraction bits of curves and cell states.
UNIT = 15
CELL_STEP = 2.0**-UNIT


@dataclass(frozen=True)
class Formats:
    """The formats of one generation of engines.

    Args:
        gate_fraction: Fraction bits of gates before their curve.
        gate_bits: Their width.
        product_bits: Width at which each of the two products of a cell state saturates, None if
            they do not.
        cell_bits: Width of the cell state.
    """

    gate_fraction: int
    gate_bits: int
    product_bits: int | None
    cell_bits: int

    @property
    def product_limit(self) -> float:
        """Real value at which a product saturates."""
        return math.inf if self.product_bits is None else 2.0 ** (self.product_bits - 1 - 2 * UNIT)

    @property
    def cell_limit(self) -> float:
        """Real value at which the cell state saturates."""
        return 2.0 ** (self.cell_bits - 1 - UNIT)


def formats_of(curves: str) -> Formats:
    """Return the formats that go with a platform's curves."""
    if curves in luna.CURVES and luna.CURVES[curves].input_bits == 32:
        return Formats(gate_fraction=27, gate_bits=32, product_bits=32, cell_bits=32)
    # The state is as wide as float32 holds it.
    return Formats(gate_fraction=11, gate_bits=16, product_bits=None, cell_bits=24)


def curves_of(platform: str) -> str:
    """Return the curves of a platform by the name that an integer op carries."""
    known = arithmetic_of(platform)
    return "table" if known is None else known.curves


# --- curves -----------------------------------------------------------------------------------


class Curves(Protocol):
    """Sigmoid and tanh from the gates' format to Q15, mixed in one tensor."""

    def base(self, functions: Sequence[str], size: int) -> Tensor:
        """Return what tells which function a column takes: ``size`` columns for each name."""
        ...

    def __call__(self, x: Tensor, base: Tensor) -> Tensor:
        """Apply the functions of the columns to an int64 tensor ``[rows, columns]``."""
        ...


# The pieces of both functions lie in one table, sigmoid first.
_FUNCTIONS = ("sigmoid", "tanh")
# Two edges of a curve are further apart than 2^24, so a cell of that size holds one at most.
_CELL_SHIFT = 24
_CELLS = 1 << (32 - _CELL_SHIFT)


_Held = TypeVar("_Held", bound="Holder")


class Holder:
    """Something that holds tensors, which can be exchanged for others like them."""

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def holding(self: _Held, tensors: Mapping[str, Tensor]) -> _Held:
        """Return a copy with other tensors."""
        moved = copy.copy(self)
        vars(moved).update(tensors)
        return moved

    def constants(self) -> Hashable:
        """Return all else that it computes with."""
        tensors = self.tensors()
        return tuple((name, value) for name, value in vars(self).items() if name not in tensors)


class _Lines(Holder):
    """Straight lines on 32-bit numbers.

    The high bits of a number find its cell, and one comparison which of the cell's two lines it is
    on. That is several times faster than a search through the edges.
    """

    def __init__(self, curves: str, device: torch.device) -> None:
        edges, slopes, constants = [], [], []
        half = 1 << (58 - UNIT - 1)
        for function in _FUNCTIONS:
            lines = luna.straight_lines(function, curves)
            ends = [end for end, _, _ in lines]
            for cell in range(-_CELLS // 2, _CELLS // 2):
                first, last = cell << _CELL_SHIFT, ((cell + 1) << _CELL_SHIFT) - 1
                pair = [
                    lines[next(i for i, end in enumerate(ends) if x <= end)] for x in (first, last)
                ]
                edges.append(pair[0][0])
                slopes += [slope for _, slope, _ in pair]
                constants += [constant + half for _, _, constant in pair]
        self._edges, self._slopes, self._constants = (
            torch.tensor(values, dtype=torch.int64, device=device)
            for values in (edges, slopes, constants)
        )

    def base(self, functions: Sequence[str], size: int) -> Tensor:
        starts = [_FUNCTIONS.index(name) * _CELLS + _CELLS // 2 for name in functions]
        return torch.tensor(starts, device=self._edges.device).repeat_interleave(size)

    def __call__(self, x: Tensor, base: Tensor) -> Tensor:
        x = x.contiguous()
        cell = torch.bitwise_right_shift(x, _CELL_SHIFT).add_(base)
        beyond = x > self._edges.index_select(0, cell.view(-1)).view(x.shape)
        line = cell.mul_(2).add_(beyond).view(-1)
        y = self._slopes.index_select(0, line).view(x.shape).mul_(x)
        y = y.add_(self._constants.index_select(0, line).view(x.shape))
        return y.bitwise_right_shift_(58 - UNIT).clamp_(max=(1 << UNIT) - 1)


class _Entries(Holder):
    """One entry per 16-bit number."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def base(self, functions: Sequence[str], size: int) -> Tensor:
        starts = [(2 * _FUNCTIONS.index(name) + 1) << 15 for name in functions]
        return torch.tensor(starts, device=self._values.device).repeat_interleave(size)

    def __call__(self, x: Tensor, base: Tensor) -> Tensor:
        index = (x + base).reshape(-1)
        return self._values.index_select(0, index).view(x.shape)


@functools.lru_cache(maxsize=16)
def _engine_curves(curves: str, device: torch.device) -> Curves:
    if luna.CURVES[curves].input_bits == 32:
        return _Lines(curves, device)
    codes = torch.arange(*_ALL_CODES, device=device)
    values = [
        luna.to_fraction(function(codes, curves), curves, UNIT)
        for function in (luna.sigmoid, luna.tanh)
    ]
    return _Entries(torch.cat(values))


_ALL_CODES = (-(1 << 15), 1 << 15)


def curves_for(platform: str, tables: Tensor | None, device: torch.device) -> Curves:
    """Return the curves of an integer op.

    Args:
        platform: Its platform.
        tables: What :func:`curve_tables` gave, None for an engine with kernels of its own.
        device: Where to compute.
    """
    if tables is None:
        return _engine_curves(curves_of(platform), device)
    return _Entries(tables.to(torch.int64).view(-1))


@functools.lru_cache(maxsize=16)
def curve_tables(rounding: str, device: torch.device) -> Tensor:
    """Return sigmoid and tanh of every 16-bit code of Q11 in Q15, int16 ``[2, 65536]``.

    Exported graphs carry this tensor, so that no other machine has to compute it again.
    """
    formats = formats_of("table")
    low, high = code_limits(UNIT + 1)
    asked = Tabulation(
        step_x=2.0**-formats.gate_fraction,
        bits_x=formats.gate_bits,
        step_o=2.0**-UNIT,
        bits_o=UNIT + 1,
        low=low,
        high=high,
        rounding=rounding,
    )
    codes = torch.arange(*_ALL_CODES, dtype=torch.int16)
    rows = []
    for name, function in (("sigmoid", torch.sigmoid), ("tanh", torch.tanh)):
        knots, offsets, shifts = tabulate(function, asked).tensors()
        rows.append(
            integer_interpolate(
                codes,
                knots,
                offsets,
                shifts,
                name,
                asked.step_x,
                asked.step_o,
                asked.bits_x,
                asked.bits_o,
                "",
            )
        )
    return torch.stack(rows).to(device)


# --- from accumulators to gates, from the cell to codes ---------------------------------------


class Product(Holder):
    """``x W^T + b`` of codes, in units of a fixed step.

    Args:
        weight: ``[O, K]`` codes.
        bias: ``[O]`` codes at the step of the accumulator, or None.
        scale_x: Step of the operand.
        scale_w: Steps of the weight, one or ``[O]``.
        bits_x: Width of the operand.
        bits_w: Width of the weight.
        unit: Step of the result.
        rounding: Rounding rule.
        bounded: Whether operands stay within their width; in training, behind a dropout, they need
            not.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scale_x: float,
        scale_w: Sequence[float],
        bits_x: int,
        bits_w: int,
        unit: float,
        rounding: str,
        bounded: bool = True,
    ) -> None:
        self._round = ROUNDINGS[rounding]
        codes = weight.double()
        ratios = torch.tensor(
            [scale_x * step / unit for step in scale_w], dtype=torch.float64, device=codes.device
        )
        bound = codes.abs().sum(1).mul_(2.0 ** (bits_x - 1))
        offset = codes.new_zeros(len(codes)) if bias is None else bias.double()
        bound = bound + offset.abs()
        largest, reach = torch.stack([bound.max(), (bound * ratios).max()]).tolist()
        self._reach = reach if bounded else math.inf
        precise = torch.get_float32_matmul_precision() == "highest"
        exact = largest < EXACT_FLOAT32 and (precise or max(bits_x, bits_w) <= 8)
        self.dtype = torch.float32 if exact else torch.float64
        self._ratios: Tensor | None = None
        self._is_whole = False
        if all(is_power_of_two(scale_x * step / unit) for step in scale_w):
            # The weights take the shift in: a product with a power of two is exact.
            codes, offset = codes * ratios.view(-1, 1), offset * ratios
            self._is_whole = bool(min(ratios.tolist()) >= 1.0)
        else:
            self._ratios = ratios
        self._weight = codes.to(self.dtype).t().contiguous()
        self._bias = None if bias is None else offset.to(self.dtype)

    def constants(self) -> Hashable:
        """Return all else that it computes with; for the reach see :meth:`saturates`."""
        return (self._round, self.dtype, self._is_whole, self._ratios is None, self._bias is None)

    def saturates(self, bits: int) -> bool:
        """Whether results may need the clamp to a width."""
        return self._reach > code_limits(bits)[1]

    def real(self, x: Tensor) -> Tensor:
        """Return the result of ``[rows, K]`` codes before rounding, float64.

        Powers of two leave it exact while it needs 53 bits or fewer.
        """
        return self._units(x).double()

    def whole(self, x: Tensor, bits: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return the rounded result of ``[rows, K]`` codes, saturated at a width."""
        units = self._units(x)
        if not self._is_whole:
            units = self._round(units.double())
        if self.saturates(bits):
            units = units.double().clamp_(*code_limits(bits))
        return units.to(dtype)

    def _units(self, x: Tensor) -> Tensor:
        x, weight, bias = x.to(self.dtype), self._weight, self._bias
        units = x @ weight if bias is None else torch.addmm(bias, x, weight)
        return units if self._ratios is None else units.double().mul_(self._ratios)


@dataclass(frozen=True)
class HiddenGrid:
    """What the hidden state is rounded to.

    Args:
        scale: Its step.
        low: Smallest code.
        high: Largest code.
        rounding: Rounding rule.
    """

    scale: float
    low: int
    high: int
    rounding: str

    @property
    def fraction(self) -> int | None:
        """Fraction bits of a power-of-two step, None for another."""
        return -round(math.log2(self.scale)) if is_power_of_two(self.scale) else None

    def codes(self, values: Tensor, fraction: int) -> Tensor:
        """Round int64 numbers of a fraction to codes, int64."""
        mine = self.fraction
        if mine is not None and self.rounding == "half_up":
            return shifted(values, fraction - mine).clamp_(self.low, self.high)
        return self.nearest(values.double().mul_(2.0**-fraction / self.scale)).long()

    def nearest(self, units: Tensor) -> Tensor:
        """Round float64 numbers in units of the step to codes, float64."""
        return ROUNDINGS[self.rounding](units).clamp_(self.low, self.high)

    def aligned(self, codes: Tensor, fraction: int) -> Tensor:
        """Bring codes (whole numbers) to a fraction, exactly where the step has no finer one."""
        units = codes.double() * (self.scale * 2.0**fraction)
        return (units if self.fraction is not None else ROUNDINGS[self.rounding](units)).long()

    def quantized(self, x: Tensor) -> Tensor:
        """Return codes as they are and real values rounded, float64."""
        if not x.dtype.is_floating_point:
            return x.double()
        step = torch.full((), self.scale, dtype=torch.float32, device=x.device)
        return self.nearest(x.float() / step).double()


def saturated(x: Tensor, bits: int) -> Tensor:
    """Clamp an int64 tensor in place into a width."""
    return x.clamp_(*code_limits(bits))


def shifted(x: Tensor, shift: int) -> Tensor:
    """Shift int64 numbers right and round half up; a negative shift is to the left.

    Fewer operations than the engines' own form, which holds for numbers next to 2^63 too.
    """
    if shift <= 0:
        return x << -shift
    return (x + (1 << (shift - 1))).bitwise_right_shift_(shift)
