"""PyTorch's recurrent cells written out on real numbers.

Used where PyTorch's own kernel cannot be: step by step in the constrained float stage, in a graph
capture in which no step can be read, and to find the first range of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.ops.recurrent.gradients import Parameters
from lightning_linger.ops.recurrent.loop import over_time

Rounding = Callable[[Tensor], Tensor]


def run_float(
    kind: str,
    rows: Tensor,
    states: tuple[Tensor, ...],
    parameters: Parameters,
    batch_sizes: Sequence[int],
    reverse: bool,
    fused: bool,
    rounding: Rounding | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one direction of one layer in plain tensor operations.

    Args:
        kind: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        rows: ``[N, I]`` in order of time.
        states: Before the first step, ``[B, .]``.
        parameters: Weights.
        batch_sizes: Rows of each time step.
        reverse: Whether to run back in time.
        fused: Whether all inputs are projected at once.
        rounding: Applied to every hidden state, None for nothing.

    Returns:
        The hidden states ``[N, P]`` and the states at the end.
    """
    p = parameters
    cell = _CELLS[kind]

    def project(x: Tensor) -> Tensor:
        return F.linear(x, p.ih, p.bias_ih)

    def step(t: int, piece: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gx = piece if fused else project(piece)
        h, *others = cell(gx, F.linear(now[0], p.hh, p.bias_hh), now)
        if p.hr is not None:
            h = F.linear(h, p.hr)
        return (h if rounding is None else rounding(h), *others)

    sizes = list(batch_sizes)
    pieces = (project(rows) if fused else rows).split_with_sizes(sizes)
    outputs, after = over_time(step, pieces, states, sizes, reverse)
    return torch.cat(outputs), after


def _lstm(gx: Tensor, gh: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (gx + gh).chunk(4, 1)
    c = torch.sigmoid(f) * now[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(gx: Tensor, gh: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x_r, x_z, x_n = gx.chunk(3, 1)
    h_r, h_z, h_n = gh.chunk(3, 1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (n + torch.sigmoid(x_z + h_z) * (now[0] - n),)


def _rnn_tanh(gx: Tensor, gh: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.tanh(gx + gh),)


def _rnn_relu(gx: Tensor, gh: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.relu(gx + gh),)


_CELLS: dict[str, Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _rnn_tanh,
    "rnn_relu": _rnn_relu,
}
