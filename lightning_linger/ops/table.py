"""Tables over codes: a function of one number as integers, the same on every machine that runs it.

A table is data. It is computed once, in float64 on the CPU, when the steps around it are known, and
both the simulation and the exported graph read the entries that were stored then: how a machine
computes ``exp`` no longer matters.

- Operands of 8 bits and fewer (as they are stored) have one entry per code, the exactly rounded
  result, or what an engine's own kernel makes of the code.
- Wider operands, up to 16 bits, have straight lines between knots, in integer arithmetic that any
  runtime repeats. The codes are cut into 256 cells of equal size, and each cell into as many
  segments as its curve needs, down to single codes, so that **no result is further than one code
  from the exactly rounded one** (nor than 0.75 codes from the real value), however steep
  the function is. A gentle curve needs 257 knots; with a pole, or a bend in a wide range, some
  1800.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_linger.core.capture import capturing
from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.core.integer import code_limits, integer_op, payload_dtype
from lightning_linger.core.rounding import ROUNDINGS
from lightning_linger.core.sites import Site

# The widest operand with an entry of its own for every code.
ENTRY_BITS = 8
WIDEST = 16
# Cells of an interpolated table, whatever the width of its operand.
CELL_BITS = 8
# Width of a knot: what a product with a segment's length leaves room for in 32 bits.
KNOT_BITS = 22
# How far, in codes, a straight line may be from the curve.
LINE_ERROR = 0.25

Integers = NDArray[np.integer[Any]]


def knot_fraction(bits_o: int) -> int:
    """Return how many bits finer than a code knots are."""
    return KNOT_BITS - bits_o


@dataclass(frozen=True)
class Tabulation:
    """What a table is asked for.

    Args:
        step_x: Step of the operand.
        bits_x: Its width, 2 to 16.
        step_o: Step of the result.
        bits_o: Its width, 2 to 16.
        low: Smallest code of the result.
        high: Largest code of the result.
        rounding: How real values become codes, a name of :mod:`lightning_linger.core.rounding`.
        entry_bits: The widest operand with an entry of its own for every code.

    Raises:
        ConfigError: If a width or a step is impossible.
    """

    step_x: float
    bits_x: int
    step_o: float
    bits_o: int
    low: int
    high: int
    rounding: str
    entry_bits: int = ENTRY_BITS

    def __post_init__(self) -> None:
        for bits in (self.bits_x, self.bits_o):
            if not 2 <= bits <= WIDEST:
                msg = f"tables have codes of 2 to {WIDEST} bits. Found: {bits}."
                raise ConfigError(msg)
        for step in (self.step_x, self.step_o):
            if not (math.isfinite(step) and step > 0):
                msg = f"a step is a positive number. Found: {step}."
                raise ConfigError(msg)


@dataclass(frozen=True)
class Table:
    """A function over codes.

    Args:
        asked: What it was made for.
        values: One code per operand code, or the knots: numbers from 0 to below ``2^KNOT_BITS``.
        offsets: Per cell the index of its first knot; empty for a table of entries.
        shifts: Per cell the number of low bits of a code that lie within one segment.
    """

    asked: Tabulation
    values: Integers
    offsets: Integers
    shifts: Integers

    @property
    def interpolated(self) -> bool:
        """Whether it holds knots, not entries."""
        return bool(self.offsets.size)

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Return values, offsets and shifts as new tensors."""
        arrays = (self.values, self.offsets, self.shifts)
        values, offsets, shifts = (torch.from_numpy(a.copy()).to(device) for a in arrays)
        return values, offsets, shifts


@runtime_checkable
class KernelFunction(Protocol):
    """A function that an engine computes on codes in a way of its own."""

    def entries(self, codes: Tensor, asked: Tabulation) -> Tensor:
        """Return the code of the result for each code, not clamped."""


@torch.no_grad()
def tabulate(function: Callable[[Tensor], Tensor], asked: Tabulation) -> Table:
    """Tabulate a function of real numbers.

    Args:
        function: Takes and returns a float64 tensor. It is called with every code's real value, so
            it has to answer outside its domain too (an infinity saturates).
        asked: Grids of operand and result.

    Returns:
        The table; see the module for its error.

    Raises:
        ConfigError: If the function has no value somewhere.
    """
    least, most = code_limits(asked.bits_x)
    if isinstance(function, KernelFunction):
        own = function.entries(torch.arange(least, most + 1, device="cpu"), asked)
        return _stored(own.clamp(asked.low, asked.high), asked)
    # A knot stands at the end of the last segment, one code beyond.
    codes = torch.arange(least, most + 2, dtype=torch.float64, device="cpu")
    reals = function(codes * asked.step_x)
    if bool(reals.isnan().any()):
        at = float(codes[reals.isnan()][0]) * asked.step_x
        msg = f"a table needs a value everywhere. Found none at {at}."
        raise ConfigError(msg)
    wanted = reals / asked.step_o
    if asked.bits_x <= asked.entry_bits:
        return _entries(wanted[:-1], asked)
    return _knots(wanted.clamp(asked.low, asked.high).numpy(), asked)


def _entries(wanted: Tensor, asked: Tabulation) -> Table:
    return _stored(ROUNDINGS[asked.rounding](wanted).clamp(asked.low, asked.high), asked)


def _stored(codes: Tensor, asked: Tabulation) -> Table:
    values = codes.to(payload_dtype(asked.bits_o)).numpy()
    none = np.zeros(0, np.int32)
    return Table(asked, values, none, none)


def _knots(wanted: NDArray[np.float64], asked: Tabulation) -> Table:
    unit = 1 << knot_fraction(asked.bits_o)
    points = np.floor(wanted * unit + 0.5)
    depth = asked.bits_x - CELL_BITS
    shifts = np.zeros(1 << CELL_BITS, np.int32)
    open_cells = np.ones(1 << CELL_BITS, bool)
    for shift in range(depth, 0, -1):
        lines = _interpolated(points, shift) / unit
        error = np.abs(lines - wanted[:-1]).reshape(1 << CELL_BITS, -1).max(1)
        fits = open_cells & (error <= LINE_ERROR)
        shifts[fits] = shift
        open_cells &= ~fits
        if not open_cells.any():
            break
    within = np.arange(1 << asked.bits_x) & ((1 << depth) - 1)
    kept = within & ((1 << shifts.repeat(1 << depth)) - 1) == 0
    counts = kept.reshape(1 << CELL_BITS, -1).sum(1)
    offsets = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32)
    stored = points + (unit << (asked.bits_o - 1))
    values = np.concatenate([stored[:-1][kept], stored[-1:]]).astype(np.int32)
    return Table(asked, values, offsets, shifts)


def _interpolated(points: NDArray[np.float64], shift: int) -> NDArray[np.float64]:
    """Return the straight lines between every ``2^shift``-th point, at every code."""
    length = 1 << shift
    ends = points[::length]
    part = np.arange(length) / length
    lines: NDArray[np.float64] = ends[:-1, None] * (1 - part) + ends[1:, None] * part
    return lines.reshape(-1)


# --- integer kernels ------------------------------------------------------------------------


@integer_op("linger::lookup")
def integer_lookup(
    x: Tensor,
    table: Tensor,
    function: str,
    scale_x: float,
    scale_o: float,
    bits_x: int,
    bits_o: int,
    platform: str,
) -> Tensor:
    """Replace every code by its entry.

    Args:
        x: Codes.
        table: ``[2^bits_x]`` codes, the first for the smallest code.
        function: What was tabulated, for messages.
        scale_x: Step of ``x``, for messages like the other steps.
        scale_o: Step of the result.
        bits_x: Width of ``x``.
        bits_o: Width of the result.
        platform: Name of the target.
    """
    index = x.reshape(-1).to(torch.int32) + (1 << (bits_x - 1))
    return torch.index_select(table, 0, index).reshape(x.shape)


@integer_lookup.register_fake
def _(
    x: Tensor,
    table: Tensor,
    function: str,
    scale_x: float,
    scale_o: float,
    bits_x: int,
    bits_o: int,
    platform: str,
) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits_o))


@integer_op("linger::interpolate")
def integer_interpolate(
    x: Tensor,
    knots: Tensor,
    offsets: Tensor,
    shifts: Tensor,
    function: str,
    scale_x: float,
    scale_o: float,
    bits_x: int,
    bits_o: int,
    platform: str,
) -> Tensor:
    """Read every code between two knots (arguments as ``linger::lookup``, :class:`Table`).

    All numbers are whole, not negative and below 2^31.
    """
    depth = bits_x - CELL_BITS
    stored = x.reshape(-1).to(torch.int32) + (1 << (bits_x - 1))
    cell, within = stored >> depth, stored & ((1 << depth) - 1)
    shift = torch.index_select(shifts, 0, cell)
    first = torch.index_select(offsets, 0, cell) + (within >> shift)
    length = torch.ones_like(shift) << shift
    part = within & (length - 1)
    left, right = torch.index_select(knots, 0, first), torch.index_select(knots, 0, first + 1)
    fraction = knot_fraction(bits_o)
    line = left * (length - part) + right * part + (length << (fraction - 1))
    codes = (line >> (shift + fraction)) - (1 << (bits_o - 1))
    return codes.to(payload_dtype(bits_o)).reshape(x.shape)


@integer_interpolate.register_fake
def _(
    x: Tensor,
    knots: Tensor,
    offsets: Tensor,
    shifts: Tensor,
    function: str,
    scale_x: float,
    scale_o: float,
    bits_x: int,
    bits_o: int,
    platform: str,
) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits_o))


# --- tables of sites ------------------------------------------------------------------------


class Tabulated(Protocol):
    """A function of real numbers that knows its name and is equal to itself next time."""

    @property
    def name(self) -> str:
        """What it computes, for messages."""

    def __call__(self, x: Tensor) -> Tensor:
        """Take and return real values, elementwise, in the dtype of ``x``."""

    def __hash__(self) -> int:
        """Equal functions have equal hashes."""


@dataclass(frozen=True)
class ReadyTable:
    """A table on the device where it is needed.

    Args:
        table: The table.
        function: What was tabulated.
        parts: Values, offsets and shifts.
    """

    table: Table
    function: Tabulated
    parts: tuple[Tensor, Tensor, Tensor]

    def __call__(self, codes: Tensor, platform: str) -> Tensor:
        """Run the kernel on codes."""
        asked = self.table.asked
        values, offsets, shifts = self.parts
        grids = (asked.step_x, asked.step_o, asked.bits_x, asked.bits_o, platform)
        if self.table.interpolated:
            return integer_interpolate(codes, values, offsets, shifts, self.function.name, *grids)
        return integer_lookup(codes, values, self.function.name, *grids)

    def serves(self, function: Tabulated, asked: Tabulation, device: torch.device) -> bool:
        """Whether it is the table that is needed now."""
        same = self.table.asked == asked and self.function == function
        return same and self.parts[0].device == device


# Ranges settle, so that the table of the step before is mostly the table of this step.
@functools.lru_cache(maxsize=256)
def _remembered(function: Tabulated, asked: Tabulation) -> Table:
    return tabulate(function, asked)


def find_table(
    site: Site, name: str, function: Tabulated, asked: Tabulation, device: torch.device
) -> ReadyTable | None:
    """Return a site's table, made now if it has to be; None in a graph capture that comes too soon.

    Args:
        site: The site, which keeps what evaluation has made.
        name: Tells the tables of a site apart.
        function: What to tabulate.
        asked: Grids of operand and result.
        device: Where the codes are.
    """
    key = f"table {name}"
    found: ReadyTable | None = site.prepared.get(key)
    if found is not None and found.serves(function, asked, device):
        return found
    if capturing():
        return None
    table = _remembered(function, asked)
    found = ReadyTable(table, function, table.tensors(device))
    site.prepared[key] = found
    return found


def table_of(
    site: Site, name: str, function: Tabulated, asked: Tabulation, device: torch.device
) -> ReadyTable:
    """Return a site's table (see :func:`find_table`).

    Raises:
        UnsupportedError: In a graph capture without a forward before it.
    """
    found = find_table(site, name, function, asked, device)
    if found is None:
        msg = (
            f"`{site.key}`: its table is not made yet. Run one forward in evaluation mode before "
            "the model is compiled or recorded."
        )
        raise UnsupportedError(msg)
    return found
