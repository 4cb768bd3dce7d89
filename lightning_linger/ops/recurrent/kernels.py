"""Integer ops: one direction of one recurrent layer each.

Arguments of all three, where an op has them:

- ``x``: codes, ``[T, B, I]``, or ``[B, T, I]`` with ``batch_first``; ``[N, I]`` with
  ``batch_sizes``, the rows of packed sequences (those of a cell are one step).
- ``h``: hidden state before the first step, ``[B, P]``: codes at ``scale_o``, or real values, which
  the op rounds itself. ``c``: cell state, ``[B, H]``: int32 in Q15, or real values.
- ``weight_ih`` ``[gates * H, I]``, ``weight_hh`` ``[gates * H, P]`` and ``weight_hr`` ``[P, H]``:
  codes; ``bias_ih`` and ``bias_hh``: int32 at the steps of the two accumulators.
- ``tables``: int16 ``[2, 65536]``, sigmoid and tanh of Q11 codes in Q15, for a target without
  kernels of its own.
- ``batch_sizes``: empty for ``[., ., I]``.
- ``scale_x``, ``scale_o``: steps of the input and of the hidden state; ``scale_ih``, ``scale_hh``,
  ``scale_hr``: of the weights, one or one per row.
- ``bits_x``, ``bits_w``, ``bits_o``: widths of input, weights and hidden state; ``low``, ``high``:
  the hidden state's smallest and largest code.
- ``batch_first``, ``reverse``, ``fused``: see :mod:`.cells`; ``rounding``; ``platform``: its name.

They return the hidden state of every step, shaped like ``x``, and the states after the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_linger.core.integer import integer_op, payload_dtype
from lightning_linger.ops.recurrent.arithmetic import CELL_STEP, HiddenGrid, curves_of, formats_of
from lightning_linger.ops.recurrent.cells import CELLS, Numbers, Weights
from lightning_linger.ops.recurrent.loop import run_cell


def to_rows(x: Tensor, batch_first: bool, batch_sizes: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Return an input as rows in order of time, and how many belong to each step."""
    if batch_sizes:
        return x, list(batch_sizes)
    if batch_first:
        x = x.transpose(0, 1)
    steps, batch = x.shape[:2]
    return x.reshape(steps * batch, x.shape[2]), [batch] * steps


def from_rows(rows: Tensor, batch_first: bool, batch_sizes: Sequence[int], steps: int) -> Tensor:
    """Return rows in order of time in the layout of the input (see :func:`to_rows`)."""
    if batch_sizes:
        return rows
    y = rows.view(steps, -1, rows.shape[1])
    return y.transpose(0, 1) if batch_first else y


def cell_codes(c: Tensor, rounding: str, platform: str) -> Tensor:
    """Return a cell state as int64 codes in Q15; codes pass as they are."""
    if not c.dtype.is_floating_point:
        return c.long()
    limit = 1 << (formats_of(curves_of(platform)).cell_bits - 1)
    grid = HiddenGrid(CELL_STEP, -limit, limit - 1, rounding)
    return grid.nearest(c.double() / CELL_STEP).long()


def _run(
    kind: str,
    x: Tensor,
    states: tuple[Tensor, ...],
    weights: Weights,
    numbers: Numbers,
    batch_sizes: Sequence[int],
    batch_first: bool,
    reverse: bool,
    fused: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    rows, sizes = to_rows(x, batch_first, batch_sizes)
    h, *others = states
    cell = CELLS[kind](weights, numbers, None)
    outputs, after = run_cell(
        cell, rows, (numbers.hidden.quantized(h), *others), sizes, reverse, fused
    )
    dtype = payload_dtype(numbers.bits_h)
    y = from_rows(outputs.to(dtype), batch_first, batch_sizes, len(sizes)).contiguous()
    return y, (after[0].to(dtype), *(state.to(torch.int32) for state in after[1:]))


@integer_op("linger::lstm")
def integer_lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    tables: Tensor | None,
    batch_sizes: Sequence[int],
    scale_x: float,
    scale_ih: Sequence[float],
    scale_hh: Sequence[float],
    scale_hr: Sequence[float],
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    low: int,
    high: int,
    batch_first: bool,
    reverse: bool,
    fused: bool,
    rounding: str,
    platform: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an LSTM: the hidden states, the last one and the last cell state (see the module)."""
    weights = Weights(
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, scale_ih, scale_hh, scale_hr, bits_w
    )
    hidden = HiddenGrid(scale_o, low, high, rounding)
    numbers = Numbers(scale_x, bits_x, bits_o, hidden, platform, tables)
    states = (h, cell_codes(c, rounding, platform))
    y, (last, cell) = _run(
        "lstm", x, states, weights, numbers, batch_sizes, batch_first, reverse, fused
    )
    return y, last, cell


@integer_lstm.register_fake
def _(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    tables: Tensor | None,
    batch_sizes: Sequence[int],
    scale_x: float,
    scale_ih: Sequence[float],
    scale_hh: Sequence[float],
    scale_hr: Sequence[float],
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    y, last = _like_results(x, h, bits_o)
    return y, last, x.new_empty(c.shape, dtype=torch.int32)


@integer_op("linger::gru")
def integer_gru(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    tables: Tensor | None,
    batch_sizes: Sequence[int],
    scale_x: float,
    scale_ih: Sequence[float],
    scale_hh: Sequence[float],
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    low: int,
    high: int,
    batch_first: bool,
    reverse: bool,
    fused: bool,
    rounding: str,
    platform: str,
) -> tuple[Tensor, Tensor]:
    """Run a GRU: the hidden states and the last one (see the module)."""
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh, None, scale_ih, scale_hh, (), bits_w)
    hidden = HiddenGrid(scale_o, low, high, rounding)
    numbers = Numbers(scale_x, bits_x, bits_o, hidden, platform, tables)
    y, (last,) = _run("gru", x, (h,), weights, numbers, batch_sizes, batch_first, reverse, fused)
    return y, last


@integer_gru.register_fake
def _(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    tables: Tensor | None,
    batch_sizes: Sequence[int],
    scale_x: float,
    scale_ih: Sequence[float],
    scale_hh: Sequence[float],
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    *_: object,
) -> tuple[Tensor, Tensor]:
    return _like_results(x, h, bits_o)


@integer_op("linger::rnn")
def integer_rnn(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    tables: Tensor | None,
    nonlinearity: str,
    batch_sizes: Sequence[int],
    scale_x: float,
    scale_ih: Sequence[float],
    scale_hh: Sequence[float],
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    low: int,
    high: int,
    batch_first: bool,
    reverse: bool,
    fused: bool,
    rounding: str,
    platform: str,
) -> tuple[Tensor, Tensor]:
    """Run a plain recurrent layer, ``tanh`` or ``relu``: the hidden states and the last one."""
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh, None, scale_ih, scale_hh, (), bits_w)
    hidden = HiddenGrid(scale_o, low, high, rounding)
    numbers = Numbers(scale_x, bits_x, bits_o, hidden, platform, tables)
    y, (last,) = _run(
        f"rnn_{nonlinearity}",
        x,
        (h,),
        weights,
        numbers,
        batch_sizes,
        batch_first,
        reverse,
        fused,
    )
    return y, last


@integer_rnn.register_fake
def _(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    tables: Tensor | None,
    nonlinearity: str,
    batch_sizes: Sequence[int],
    scale_x: float,
    scale_ih: Sequence[float],
    scale_hh: Sequence[float],
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    *_: object,
) -> tuple[Tensor, Tensor]:
    return _like_results(x, h, bits_o)


def _like_results(x: Tensor, h: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    dtype = payload_dtype(bits)
    y = x.new_empty((*x.shape[:-1], h.shape[-1]), dtype=dtype)
    return y, x.new_empty(h.shape, dtype=dtype)
