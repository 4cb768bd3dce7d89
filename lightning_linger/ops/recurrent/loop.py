"""The loop over time, for cells on codes and for any other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_linger.ops.recurrent.cells import Cell
from lightning_linger.ops.recurrent.compiled import STEPS, Step
from lightning_linger.ops.recurrent.fusion import compiles_steps


def over_time(
    step: Step,
    inputs: Sequence[Tensor],
    states: tuple[Tensor, ...],
    batch_sizes: Sequence[int],
    reverse: bool,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Run a cell through time, over sequences of which the longest come first.

    Args:
        step: ``step(t, input, states) -> states``; the first state is the output.
        inputs: Of each time step.
        states: Before the first step, a row per sequence.
        batch_sizes: How many sequences are longer than ``t``, for each step ``t``.
        reverse: Whether to run back in time; each sequence then starts at its own end.

    Returns:
        The outputs by time step, and the states after the last step of each sequence.
    """
    times = range(len(batch_sizes))
    outputs: list[Tensor] = []
    finished: list[tuple[Tensor, ...]] = []
    now = states
    if reverse:
        now = tuple(state[: batch_sizes[-1]] for state in states)
    for t in reversed(times) if reverse else times:
        have, want = len(now[0]), batch_sizes[t]
        if have > want:
            finished.append(tuple(state[want:] for state in now))
            now = tuple(state[:want] for state in now)
        elif have < want:
            fresh = (state[have:want] for state in states)
            now = tuple(torch.cat(pair) for pair in zip(now, fresh, strict=True))
        now = step(t, inputs[t], now)
        outputs.append(now[0])
    if reverse:
        outputs.reverse()
    if finished:
        parts = [now, *reversed(finished)]
        now = tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return outputs, now


def run_cell(
    cell: Cell,
    rows: Tensor,
    states: tuple[Tensor, ...],
    batch_sizes: Sequence[int],
    reverse: bool,
    fused: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one direction of one layer on codes.

    The steps are compiled where :func:`.fusion.compiles_steps` says so, the inputs are projected at
    once, and all steps have as many rows.

    Args:
        cell: The cell.
        rows: Inputs in order of time, whole numbers of any dtype, ``[sum(batch_sizes), I]``.
        states: Hidden state, whole numbers of any dtype, and the cell state of an LSTM, int64.
        batch_sizes: See :func:`over_time`.
        reverse: See :func:`over_time`.
        fused: Whether all inputs are projected at once.

    Returns:
        The hidden state of every step ``[sum(batch_sizes), P]`` and the states at the end; whole
        numbers, floating but for the cell state.
    """
    sizes = list(batch_sizes)
    h, *others = states

    def step_by_step(t: int, piece: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return cell.step(t, cell.project(piece), now)

    pieces = (cell.project(rows) if fused else rows).split_with_sizes(sizes)
    start = (h.to(cell.recurrent.dtype), *others)
    step: Step = cell.step if fused else step_by_step
    if fused and compiles_steps() and len(sizes) > 1 and len(set(sizes)) == 1:
        step = STEPS.of(cell, pieces[0], start)
    outputs, after = over_time(step, pieces, start, sizes, reverse)
    if cell.trace is not None:
        cell.finish_trace()
    return torch.cat(outputs), after
