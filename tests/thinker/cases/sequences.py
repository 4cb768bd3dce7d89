"""Functions, attention, sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Lambda
from tests.thinker.cases.case import (
    PLATFORMS,
    PackCase,
    Refused,
    everywhere,
    image,
    on_conv,
    on_linear,
    rows,
)


class OneLSTM(nn.Module):
    """Returns all states only, from zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Tokens(nn.Module):
    """An embedding and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embedding(x))


_ONE_HAS_A_FUNCTION = {
    "venusa": Refused("packer", "set_input", "the packer does not know it"),
    **dict.fromkeys(("arcs", "venus"), Refused("export", "has no such op", "no such op")),
}

SEQUENCES = [
    PackCase(
        "sigmoid",
        "sigmoid",
        on_linear(lambda m, x: torch.sigmoid(m.fc(x))),
        rows(16),
        ("iqsigmoid_q",),
        wrong={"venusa": "overruns its memory"},
    ),
    PackCase(
        "tanh",
        "tanh",
        on_linear(lambda m, x: torch.tanh(m.fc(x))),
        rows(16),
        ("iqtanh_i16",),
        refused=dict.fromkeys(
            ("venusa", "arcs"),
            Refused("packer", "must be of type int16", "the engine misreads what the packer wants"),
        ),
    ),
    PackCase(
        "gelu",
        "`F.gelu`",
        on_linear(lambda m, x: F.gelu(m.fc(x))),
        rows(16),
        refused=_ONE_HAS_A_FUNCTION,
    ),
    PackCase(
        "silu",
        "`F.silu`",
        on_linear(lambda m, x: F.silu(m.fc(x))),
        rows(16),
        refused=_ONE_HAS_A_FUNCTION,
    ),
    PackCase(
        "leaky_relu", "`F.leaky_relu`", on_linear(lambda m, x: F.leaky_relu(m.fc(x))), rows(16)
    ),
    PackCase(
        "glu",
        "`F.glu`",
        on_linear(lambda m, x: F.glu(m.fc(x), 1)),
        rows(16),
        refused=everywhere("packer", "set_input", "no such op"),
    ),
    PackCase("abs", "`x.abs()`", on_linear(lambda m, x: m.fc(x).abs()), rows(16)),
    PackCase(
        "softmax",
        "softmax over the last axis",
        on_linear(lambda m, x: m.fc(x).softmax(-1)),
        rows(5, 16),
        ("softmax_q3_a-1_4x10", "softmax_q4_a-1"),
    ),
    PackCase(
        "log_softmax",
        "log_softmax",
        on_linear(lambda m, x: m.fc(x).log_softmax(-1)),
        rows(5, 16),
        refused=dict.fromkeys(
            ("venusa", "arcs"), Refused("export", "no kernel of", "no known kernel")
        ),
    ),
    PackCase(
        "layer_norm",
        "`nn.LayerNorm`",
        on_linear(lambda m, x: m.norm(m.fc(x)), norm=lambda: nn.LayerNorm(16)),
        rows(5, 16),
        ("layernorm_q4",),
        refused={"venus": Refused("export", "16-bit weights", "a norm of another kind")},
    ),
    PackCase(
        "matmul",
        "`x @ y`",
        on_linear(lambda m, x: m.fc(x) @ m.other(x).transpose(1, 2)),
        rows(5, 16),
        ("bmm_3d_o8",),
    ),
    PackCase(
        "attention",
        "`F.scaled_dot_product_attention`",
        on_linear(lambda m, x: F.scaled_dot_product_attention(m.fc(x), m.other(x), m.fc(x))),
        rows(5, 16),
    ),
    PackCase(
        "multihead",
        "`nn.MultiheadAttention`",
        lambda: Lambda(
            lambda m, x: m.mha(x, x, x, need_weights=False)[0],
            mha=nn.MultiheadAttention(16, 2, batch_first=True),
        ),
        rows(5, 16),
    ),
    PackCase(
        "embedding",
        "`nn.Embedding`",
        Tokens,
        lambda: torch.randint(0, 20, (1, 6)),
        ("gather_int",),
    ),
    PackCase(
        "lstm",
        "`nn.LSTM`",
        OneLSTM,
        rows(6, 8),
        ("lstm_nodma",),
        wrong={"venus": "curves of its own, not modelled"},
    ),
    PackCase(
        "gru",
        "`nn.GRU`",
        lambda: Lambda(lambda m, x: m.gru(x)[0], gru=nn.GRU(8, 12, batch_first=True)),
        rows(6, 8),
        refused=everywhere("export", "no engine runs one", "other gates"),
    ),
    PackCase("amax", "`x.amax(-1)`", on_linear(lambda m, x: m.fc(x).amax(-1)), rows(5, 16)),
    PackCase(
        "argmax",
        "`x.argmax(-1)`",
        on_linear(lambda m, x: m.fc(x).argmax(-1)),
        rows(5, 16),
        wrong=dict.fromkeys(PLATFORMS, "one int32 result with the values in front of the places"),
    ),
    PackCase(
        "sum",
        "`x.sum(-1)`",
        on_linear(lambda m, x: m.fc(x).sum(-1)),
        rows(5, 16),
        refused=everywhere("export", "first row only", "computed wrongly"),
    ),
    PackCase(
        "where",
        "`torch.where`",
        on_linear(lambda m, x: torch.where(x > 0, m.fc(x), m.other(x))),
        rows(16),
        refused=everywhere("export", "has no selection", "no selection by a computed mask"),
    ),
    PackCase(
        "masked_fill",
        "`masked_fill`",
        on_linear(lambda m, x: m.fc(x).masked_fill(torch.eye(16)[:5] > 0, 0.0)),
        rows(5, 16),
    ),
    PackCase(
        "maximum",
        "`torch.maximum`",
        on_linear(lambda m, x: torch.maximum(m.fc(x), m.other(x))),
        rows(16),
        refused=everywhere("export", "no kernel for it", "no such op"),
    ),
    PackCase("flip", "flip", on_linear(lambda m, x: m.fc(x).flip(-1)), rows(5, 16)),
    PackCase(
        "shuffle",
        "`F.channel_shuffle`",
        on_conv(lambda m, x: m.other(F.channel_shuffle(m.conv(x), 2))),
        image(),
    ),
    PackCase(
        "upsample",
        "`F.interpolate`",
        on_conv(lambda m, x: m.other(F.interpolate(m.conv(x), scale_factor=2))),
        image(),
    ),
    PackCase(
        "pad_between",
        "`F.pad` not before a convolution",
        on_conv(lambda m, x: F.max_pool2d(F.pad(m.conv(x), (1, 1, 1, 1)), 2)),
        image(),
        refused=everywhere("packer", "QuantType", "no Pad"),
    ),
    PackCase(
        "reflect",
        "`F.pad` by reflection",
        on_conv(lambda m, x: m.other(F.pad(m.conv(x), (1, 1, 1, 1), mode="reflect"))),
        image(),
    ),
    PackCase(
        "expand",
        "expand",
        on_conv(lambda m, x: m.other(m.conv(x)[:, :1].expand(-1, 4, -1, -1))),
        image(),
    ),
]
