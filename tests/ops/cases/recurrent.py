"""Recurrent layers, their cells, and packed sequences."""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from tests.models import Lambda
from tests.ops.cases import Case, randn

SEVERAL = "sequences at once because the engine takes one"
NARROW = "because the engine computes on 8 bits"
WIDE = "a change from 16-bit codes"
GRU = "no form of a GRU because no engine runs one"
RNN = "no form of a plain RNN because the engine has no such op"
CELL = "because the engine runs whole sequences"
PACKED = "a packed sequence cannot be recorded"


def behind_linear(kind: str, *, batch: int = 3, steps: int = 4, **options: Any) -> Any:
    """A recurrent layer behind a linear one, all results returned."""

    def build(rng: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
        first = nn.Linear(5, 4)
        rnn = getattr(nn, kind)(4, 6, **options)
        for weight in rnn.parameters():
            weight.data.mul_(2.0 ** rng.randint(-1, 2))
        shape = (batch, steps) if options.get("batch_first") else (steps, batch)
        model = Lambda(lambda self, x: self.rnn(self.first(x)), first=first, rnn=rnn)
        return model, (randn(rng, *shape, 5),)

    return build


def with_states(kind: str) -> Any:
    """Initial states: one computed by a quantized layer, one plain."""

    def build(rng: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
        rnn = getattr(nn, kind)(4, 6, 2)
        model = Lambda(run, first=nn.Linear(5, 4), start=nn.Linear(3, 6), rnn=rnn)
        return model, (randn(rng, 4, 3, 5), randn(rng, 2, 3, 3), randn(rng, 2, 3, 6))

    def run(self: Any, x: Tensor, start: Tensor, cell: Tensor) -> Any:
        h = cell if kind == "RNN" else self.start(start)
        return self.rnn(self.first(x), (h, cell) if kind == "LSTM" else h)

    return build


def in_a_loop(kind: str) -> Any:
    """A cell called step by step."""

    def build(rng: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
        options = {"nonlinearity": "relu"} if kind == "RNNCell" and rng.random() < 0.5 else {}
        cell = getattr(nn, kind)(4, 6, bias=rng.random() < 0.5, **options)
        model = Lambda(run, first=nn.Linear(5, 4), cell=cell)
        return model, (randn(rng, 3, 2, 5),)

    def run(self: Any, x: Tensor) -> Any:
        x, state, outputs = self.first(x), None, []
        for t in range(3):
            state = self.cell(x[t], state)
            outputs.append(state)
        return outputs

    return build


def tanh_cells(rng: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
    model = Lambda(
        lambda self, x, h: self.cell(self.first(x), h),
        first=nn.Linear(5, 4),
        cell=nn.RNNCell(4, 6),
    )
    return model, (randn(rng, 3, 5), randn(rng, 3, 6))


def relu_cells(rng: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
    cell = nn.RNNCell(4, 6, nonlinearity="relu")
    model = Lambda(lambda self, x: self.cell(self.first(x)), first=nn.Linear(5, 4), cell=cell)
    return model, (randn(rng, 3, 5),)


def packed(kind: str, **options: Any) -> Any:
    """Sequences of different lengths, packed and padded again, and what comes last in each."""

    def build(rng: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
        rnn = getattr(nn, kind)(4, 6, batch_first=True, **options)
        model = Lambda(run, first=nn.Linear(5, 4), rnn=rnn)
        lengths = torch.tensor([rng.randint(1, 6) for _ in range(3)] + [6])
        return model, (randn(rng, 4, 6, 5), lengths)

    def run(self: Any, x: Tensor, lengths: Tensor) -> Any:
        x = self.first(x)
        sequences = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, states = self.rnn(sequences)
        return pad_packed_sequence(y, batch_first=True, padding_value=-0.3)[0], states

    return build


def padded_rows(rng: random.Random) -> tuple[nn.Module, tuple[Any, ...]]:
    """Sequences made of the results of two layers at different steps."""

    def run(self: Any, x: Tensor) -> Any:
        rows = [self.first(x), self.second(x)[:2]]
        return pad_sequence(rows, batch_first=True, padding_value=0.2)

    first, second = nn.Linear(5, 4), nn.Linear(5, 4)
    second.weight.data.mul_(2.0 ** rng.randint(-2, 2))
    return Lambda(run, first=first, second=second), (randn(rng, 3, 5),)


def recurrent(kind: str, name: str, build: Any, reason: str | None = None, **more: Any) -> Case:
    refused = {"linger": reason} if reason else {}
    refused |= more.pop("refused", {})
    # The float function has unrounded weights and a state that never saturated, so it may be out of
    # range where the integers are not; tests/ops/recurrent compares gradients.
    return Case(kind, name, build, refused=refused, gradient="none", **more)


CASES = [
    recurrent("lstm", "batch", behind_linear("LSTM"), SEVERAL),
    recurrent(
        "lstm",
        "one-sequence",
        behind_linear("LSTM", batch=1, batch_first=True),
        refused={"linger/16": NARROW},
    ),
    recurrent(
        "lstm",
        "bidirectional-layers",
        behind_linear("LSTM", batch=1, num_layers=2, bidirectional=True, bias=False, dropout=0.3),
        refused={"linger/16": NARROW},
    ),
    recurrent(
        "lstm", "projection", behind_linear("LSTM", proj_size=3, bidirectional=True), SEVERAL
    ),
    recurrent("lstm", "states", with_states("LSTM"), SEVERAL, refused={"linger/16": WIDE}),
    recurrent(
        "lstm",
        "packed",
        packed("LSTM", num_layers=2, bidirectional=True),
        covers=("pack_padded_sequence", "pad_packed_sequence"),
        refused={"linger": PACKED, "qdq": PACKED},
    ),
    recurrent("gru", "batch", behind_linear("GRU", batch_first=True, bidirectional=True), GRU),
    recurrent("gru", "states", with_states("GRU"), GRU),
    recurrent("gru", "packed", packed("GRU"), refused={"linger": PACKED, "qdq": PACKED}),
    recurrent("rnn_tanh", "layers", behind_linear("RNN", num_layers=2, dropout=0.3), RNN),
    recurrent("rnn_tanh", "states", with_states("RNN"), RNN),
    recurrent("rnn_relu", "batch", behind_linear("RNN", nonlinearity="relu", bias=False), RNN),
    recurrent("lstm_cell", "loop", in_a_loop("LSTMCell"), CELL),
    recurrent("gru_cell", "loop", in_a_loop("GRUCell"), GRU),
    recurrent("rnn_tanh_cell", "step", tanh_cells, RNN),
    recurrent("rnn_relu_cell", "step", relu_cells, RNN),
    Case("pad_sequence", "two-layers", padded_rows),
]
