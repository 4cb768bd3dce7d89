"""What is packed: one op at a time, and small networks, with what the packer makes of each.

A verdict is expected for every platform. Packing proves that the packer reads the file; that the
engine computes the integers of the file is proven by the vectors that were recorded from it, which
`tests/export/test_golden.py` runs. `vectors` names those of a case.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Chain, Lambda, ResNet

PLATFORMS = ("venusa", "arcs", "venus")
ENGINES = {"venusa": "venusA", "arcs": "arcs", "venus": "venus"}


@dataclass(frozen=True)
class Refused:
    """A model that does not become an image.

    Args:
        by: ``packer``, or ``export`` where the file is not written at all.
        match: A part of its message.
        why: The reason, for the page.
    """

    by: str
    match: str
    why: str


@dataclass(frozen=True)
class PackCase:
    """One model.

    Args:
        name: Of the test.
        text: What the page calls it.
        build: Returns a fresh model.
        inputs: Returns its inputs, a batch of one.
        vectors: Prefixes of recorded vectors that hold the same op.
        refused: By platform; the others pack.
        wrong: By platform, what the engine is known to do wrong with the image.
        fields: Of the configuration.
        fold: Whether to fold batch norms.
    """

    name: str
    text: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    vectors: tuple[str, ...] = ()
    refused: Mapping[str, Refused] = field(default_factory=dict)
    wrong: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    fold: bool = True

    @property
    def refused_by_export(self) -> bool:
        """Whether no file is written for any platform, for one reason."""
        reasons = [self.refused.get(platform) for platform in PLATFORMS]
        first = reasons[0]
        return first is not None and first.by == "export" and reasons == [first] * len(PLATFORMS)


def everywhere(by: str, match: str, why: str) -> dict[str, Refused]:
    return dict.fromkeys(PLATFORMS, Refused(by, match, why))


def image(channels: int = 4, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(1, channels, size, size)


def line(channels: int = 4, length: int = 16) -> Callable[[], Tensor]:
    return lambda: torch.randn(1, channels, length)


def rows(*sizes: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(1, *sizes)


def chain(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Chain(*[layer() for layer in layers])


def conv(*arguments: int, **keywords: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*arguments, **keywords)


def on_conv(
    run: Callable[[Any, Tensor], Any], **layers: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    """A function of what a convolution from 4 to 4 channels gives, and of the input."""

    def build() -> nn.Module:
        made = {name: layer() for name, layer in layers.items()}
        return Lambda(run, conv=nn.Conv2d(4, 4, 3), other=nn.Conv2d(4, 4, 3), **made)

    return build


def on_linear(
    run: Callable[[Any, Tensor], Any], **layers: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    """A function of what a linear layer from 16 to 16 features gives."""

    def build() -> nn.Module:
        made = {name: layer() for name, layer in layers.items()}
        return Lambda(run, fc=nn.Linear(16, 16), other=nn.Linear(16, 16), **made)

    return build


# --- reasons ----------------------------------------------------------------------------------

_KERNEL_OF_5 = "kernels of up to 5 x 5"
_NO_SPREAD = "no dilation"
_PACKER_KERNEL = Refused("packer", "exceed", _KERNEL_OF_5)


def refused_kernel(*platforms: str) -> dict[str, Refused]:
    return dict.fromkeys(platforms, _PACKER_KERNEL)


# --- layers -----------------------------------------------------------------------------------

LAYERS = [
    PackCase(
        "conv2d",
        "`nn.Conv2d`",
        chain(conv(4, 8, 3, padding=1)),
        image(),
        vectors=("conv2d_basic", "conv2d_C3_O5", "conv2d_satur"),
    ),
    PackCase(
        "conv2d_relu", "with a ReLU", chain(conv(4, 8, 3), nn.ReLU), image(), ("conv2d_relu",)
    ),
    PackCase(
        "conv2d_without_bias",
        "without a bias",
        chain(lambda: nn.Conv2d(4, 8, 3, bias=False)),
        image(),
        ("conv2d_nobias",),
    ),
    PackCase("conv2d_1x1", "kernel 1 x 1", chain(conv(4, 8, 1)), image(), ("conv2d_1x1",)),
    PackCase(
        "conv2d_5x5_stride_2",
        "kernel 5 x 5, stride 2",
        chain(conv(4, 8, 5, stride=2, padding=2)),
        image(),
        ("conv2d_5x5_s2",),
    ),
    PackCase(
        "conv2d_7x7",
        "kernel 7 x 7",
        chain(conv(4, 8, 7, padding=3)),
        image(4, 12),
        refused=dict.fromkeys(PLATFORMS, _PACKER_KERNEL),
    ),
    PackCase(
        "conv2d_dilated",
        "dilation 2",
        chain(conv(4, 8, 3, dilation=2, padding=2)),
        image(4, 12),
        ("conv2d_dil2",),
        refused={"venus": Refused("packer", "Dilations must be", _NO_SPREAD)},
    ),
    PackCase(
        "conv2d_depthwise",
        "depthwise",
        chain(conv(8, 8, 3, padding=1, groups=8)),
        image(8),
        ("conv2d_dw",),
    ),
    PackCase("conv2d_groups", "groups", chain(conv(8, 16, 3, groups=2)), image(8)),
    PackCase(
        "conv2d_padded",
        "behind `F.pad` with zeros",
        on_conv(lambda m, x: m.other(F.pad(m.conv(x), (1, 0, 2, 1)))),
        image(),
    ),
    PackCase(
        "conv2d_folded",
        "with a folded batch norm",
        chain(conv(4, 8, 3), lambda: nn.BatchNorm2d(8), nn.ReLU),
        image(),
    ),
    PackCase(
        "conv2d_narrow_weights",
        "with 4-bit weights (stored in 8)",
        chain(conv(4, 8, 3)),
        image(),
        fields={"weight_bits": 4},
    ),
    PackCase(
        "conv1d",
        "`nn.Conv1d`",
        chain(lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1), nn.ReLU),
        line(),
        ("conv1d_basic", "conv1d_p0_s2", "conv1d_relu"),
    ),
    PackCase("conv1d_1", "kernel 1", chain(lambda: nn.Conv1d(4, 8, 1)), line(), ("conv1d_k1",)),
    PackCase(
        "conv1d_9",
        "kernel 9",
        chain(lambda: nn.Conv1d(4, 8, 9, padding=4)),
        line(),
        refused=refused_kernel("venusa", "venus"),
    ),
    PackCase(
        "conv1d_depthwise",
        "depthwise",
        chain(lambda: nn.Conv1d(4, 4, 3, padding=1, groups=4)),
        line(),
    ),
    PackCase(
        "conv1d_causal",
        "behind `F.pad` on one side",
        lambda: Lambda(lambda m, x: m.conv(F.pad(x, (2, 0))), conv=nn.Conv1d(4, 8, 3)),
        line(),
    ),
    PackCase(
        "conv_transpose2d",
        "`nn.ConvTranspose2d`",
        chain(lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1), nn.ReLU),
        image(),
        ("deconv_",),
    ),
    PackCase(
        "conv_transpose2d_groups",
        "groups",
        chain(lambda: nn.ConvTranspose2d(4, 4, 3, 2, 1, groups=4)),
        image(),
    ),
    PackCase(
        "conv_transpose1d",
        "`nn.ConvTranspose1d`",
        chain(lambda: nn.ConvTranspose1d(4, 6, 3, 2)),
        line(),
    ),
    PackCase(
        "linear",
        "`nn.Linear`",
        chain(lambda: nn.Linear(16, 10)),
        rows(16),
        ("linear_basic", "linear_nobias"),
    ),
    PackCase("linear_of_rows", "on rows", chain(lambda: nn.Linear(16, 10)), rows(5, 16)),
    PackCase(
        "linear_real",
        "with a real result (`output_bits=None`)",
        chain(lambda: nn.Linear(16, 10)),
        rows(16),
        ("linear_o32",),
        fields={"output_bits": None},
    ),
    PackCase(
        "linear_16",
        "with a 16-bit result",
        chain(lambda: nn.Linear(16, 10)),
        rows(16),
        fields={"output_bits": 16},
        refused=dict.fromkeys(
            ("venusa", "arcs"), Refused("export", "16-bit result", "computed wrongly")
        ),
    ),
    PackCase(
        "conv2d_real",
        "a convolution with a real result",
        chain(conv(4, 8, 3)),
        image(),
        fields={"output_bits": None},
        refused=everywhere("export", "32-bit result", "computed in 8 bits"),
    ),
    PackCase(
        "activations_16",
        "16-bit activations",
        chain(conv(4, 8, 3)),
        image(),
        fields={"activation_bits": 16, "output_bits": 16},
        refused=everywhere("packer", "must be int8", "8-bit operands"),
    ),
    PackCase(
        "activations_4",
        "4-bit activations",
        chain(conv(4, 8, 3)),
        image(),
        fields={"activation_bits": 4, "output_bits": 4},
        refused=everywhere("packer", "Data bits must be", "saturation at 8 bits"),
    ),
    PackCase(
        "batch_norm2d",
        "`nn.BatchNorm2d` that is not folded",
        on_conv(lambda m, x: m.bn(F.relu(m.conv(x))), bn=lambda: nn.BatchNorm2d(4)),
        image(),
        fold=False,
    ),
    PackCase(
        "batch_norm1d",
        "`nn.BatchNorm1d` that is not folded",
        on_linear(lambda m, x: m.bn(F.relu(m.fc(x))), bn=lambda: nn.BatchNorm1d(16)),
        rows(16),
        fold=False,
    ),
]

# --- sums, products, activations --------------------------------------------------------------

ELEMENTWISE = [
    PackCase("add", "`x + y`", on_conv(lambda m, x: m.conv(x) + m.other(x)), image(), ("iqadd_",)),
    PackCase(
        "add_other_scales",
        "of different scales, with a ReLU",
        on_conv(lambda m, x: F.relu(m.conv(x) + 4 * m.other(x))),
        image(),
        ("iqadd_4_6_4", "relu"),
    ),
    PackCase("add_number", "`x + 0.3`", on_conv(lambda m, x: m.conv(x) + 0.3), image()),
    PackCase(
        "add_map",
        "`x + y` with broadcasting",
        on_conv(lambda m, x: m.conv(x) + m.other(x)[:, :1]),
        image(),
        refused=everywhere("export", "adds element by element", "one shape only"),
    ),
    PackCase(
        "sub",
        "`x - y`",
        on_conv(lambda m, x: m.conv(x) - m.other(x)),
        image(),
        refused=everywhere("packer", "set_input", "no subtraction"),
    ),
    PackCase("mul", "`x * y`", on_conv(lambda m, x: m.conv(x) * m.other(x)), image(), ("iqmul_",)),
    PackCase("mul_number", "`x * 0.3`", on_conv(lambda m, x: m.conv(x) * 0.3), image()),
    PackCase(
        "gate",
        "with one factor per channel",
        on_conv(lambda m, x: F.max_pool2d(m.conv(x), 6) * m.other(x)),
        image(),
        ("iqmul_bcast_c",),
    ),
    PackCase(
        "mul_map",
        "with one factor per place",
        on_conv(lambda m, x: m.conv(x) * m.other(x)[:, :1]),
        image(),
        refused=everywhere("export", "multiplies element by element", "one shape only"),
    ),
    PackCase(
        "cat",
        "`torch.cat`",
        on_conv(lambda m, x: torch.cat([m.conv(x), m.conv(x)], 1)),
        image(),
        ("iqcat_c__",),
    ),
    PackCase(
        "cat_other_scales",
        "of different scales",
        on_conv(lambda m, x: torch.cat([m.conv(x), 8 * m.other(x)], 1)),
        image(),
        ("iqcat_c_sc", "requant_"),
    ),
    PackCase(
        "relu6",
        "`F.relu6` and other clamps",
        on_conv(lambda m, x: F.relu6(8 * m.conv(x))),
        image(),
        refused=everywhere("packer", "Input must be int8, int16, or int32", "no Clip"),
    ),
]

# --- pools and movement -----------------------------------------------------------------------

POOLS = [
    PackCase(
        "avg_pool2d",
        "`nn.AvgPool2d(2)`",
        on_conv(lambda m, x: F.avg_pool2d(m.conv(x), 2)),
        image(),
        ("avgpool_2x2", "avgpool_4x4s4"),
    ),
    PackCase(
        "avg_pool2d_3",
        "`nn.AvgPool2d(3)`",
        on_conv(lambda m, x: F.avg_pool2d(m.conv(x), 3, 1)),
        image(),
        ("avgpool_3x3s1",),
    ),
    PackCase(
        "avg_pool2d_without_pads",
        "`count_include_pad=False`",
        on_conv(lambda m, x: F.avg_pool2d(m.conv(x), 3, 2, 1, count_include_pad=False)),
        image(),
        refused=everywhere("export", "counts the zeros", "computed with them"),
    ),
    PackCase(
        "avg_pool1d",
        "`nn.AvgPool1d(2)`",
        lambda: Chain(nn.Conv1d(4, 8, 3), nn.AvgPool1d(2)),
        line(),
    ),
    PackCase(
        "mean",
        "mean over a map of 8 x 8",
        on_conv(lambda m, x: m.conv(x).mean((2, 3))),
        image(4, 10),
        ("avgpool_global8",),
    ),
    PackCase(
        "mean_of_few",
        "mean over a map of 7 x 7",
        on_conv(lambda m, x: m.fc(m.conv(x).mean((2, 3))), fc=lambda: nn.Linear(4, 5)),
        image(4, 9),
    ),
    PackCase(
        "mean_of_channels",
        "mean over channels",
        on_conv(lambda m, x: m.conv(x).mean(1, keepdim=True)),
        image(),
    ),
    PackCase(
        "adaptive",
        "`nn.AdaptiveAvgPool2d(1)`",
        on_conv(lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 1).flatten(1)),
        image(4, 10),
    ),
    PackCase(
        "max_pool2d",
        "`nn.MaxPool2d(2)`",
        on_conv(lambda m, x: F.max_pool2d(m.conv(x), 2)),
        image(),
        ("maxpool_2x2",),
    ),
    PackCase(
        "max_pool2d_7",
        "`nn.MaxPool2d(7)`",
        on_conv(lambda m, x: F.max_pool2d(m.conv(x), 7, 1)),
        image(4, 16),
        refused=refused_kernel("venus"),
    ),
    PackCase(
        "max_pool2d_dilated",
        "with dilation",
        on_conv(lambda m, x: F.max_pool2d(m.conv(x), 2, 1, dilation=2)),
        image(),
        refused=everywhere("export", "the engine ignores it", "ignored"),
    ),
    PackCase(
        "max_pool1d",
        "`nn.MaxPool1d(2)`",
        lambda: Chain(nn.Conv1d(4, 8, 3), nn.MaxPool1d(2)),
        line(),
    ),
]

MOVEMENT = [
    PackCase(
        "flatten",
        "flatten",
        on_conv(lambda m, x: m.fc(m.conv(x).flatten(1)), fc=lambda: nn.Linear(144, 5)),
        image(),
        ("flatten",),
    ),
    PackCase(
        "reshape",
        "reshape",
        on_conv(lambda m, x: m.fc(m.conv(x).reshape(1, 4, 36)), fc=lambda: nn.Linear(36, 5)),
        image(),
        ("reshape",),
    ),
    PackCase(
        "squeeze",
        "squeeze, unsqueeze",
        on_linear(
            lambda m, x: m.c(m.fc(x).unsqueeze(1)).squeeze(3), c=conv(1, 2, (3, 5), stride=1)
        ),
        rows(6, 16),
    ),
    PackCase(
        "transpose",
        "transposes by (0, 2, 3, 1), (0, 3, 1, 2), (0, 1, 3, 2)",
        on_conv(
            lambda m, x: (
                m.fc(m.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
                m.other(x).transpose(2, 3),
            ),
            fc=lambda: nn.Linear(4, 5),
        ),
        image(),
        ("transpose_0132", "transpose_0312"),
    ),
    PackCase(
        "transpose_inner",
        "by (0, 2, 1, 3), (0, 3, 2, 1)",
        on_conv(lambda m, x: (m.conv(x).transpose(1, 2), m.other(x).transpose(1, 3))),
        image(),
        ("transpose_0213", "transpose_0321"),
    ),
    PackCase(
        "transpose_rows",
        "by (0, 2, 1)",
        on_linear(lambda m, x: m.fc(x).transpose(1, 2)),
        rows(5, 16),
        ("transpose_021",),
    ),
    PackCase("slice", "slices", on_conv(lambda m, x: m.conv(x)[:, 1:3]), image(), ("slice_c",)),
    PackCase(
        "chunk",
        "chunk, split",
        on_conv(lambda m, x: torch.cat(m.conv(x).chunk(2, 1)[::-1], 1)),
        image(),
    ),
    PackCase(
        "returned_twice",
        "one value returned twice",
        on_conv(lambda m, x: (lambda y: (y, y))(m.conv(x))),
        image(),
        refused=everywhere("packer", "set_input", "no Identity: return it once"),
    ),
]


# --- functions, attention, sequences ----------------------------------------------------------


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


# --- networks ---------------------------------------------------------------------------------


class Separable(nn.Module):
    """A depthwise and a pointwise convolution."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.point = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.depth(x)))
        return F.relu(self.norm2(self.point(x)))


class KeywordSpotter(nn.Module):
    """A separable network on log-mel features, as keyword spotters are."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 5, 2, 2, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(Separable(channels, 2), Separable(channels, 1))
        self.fc = nn.Linear(channels, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def example(module: str, name: str) -> Callable[[], nn.Module]:
    """A model of the examples, which import one another from their own folder."""

    def build() -> nn.Module:
        folder = str(Path(__file__).parents[2] / "examples")
        sys.path.insert(0, folder)
        try:
            return getattr(__import__(module), name)()
        finally:
            sys.path.remove(folder)

    return build


NETWORKS = [
    PackCase("resnet", "a ResNet on 32 x 32 images", ResNet, image(3, 32)),
    PackCase(
        "keywords", "a separable keyword spotter", KeywordSpotter, lambda: torch.randn(1, 1, 49, 40)
    ),
    PackCase("digits", "`examples/digits.py`", example("digits", "Digits"), image(1, 8)),
    PackCase("resnet8", "`examples/resnet.py`", example("resnet", "ResNet"), image(3, 32)),
    PackCase(
        "ds_cnn",
        "`examples/kws.py`",
        example("kws", "DSCNN"),
        lambda: torch.randn(1, 1, 49, 16),
    ),
    PackCase(
        "kws_gru",
        "`examples/kws.py --model gru`",
        example("kws", "GRU"),
        lambda: torch.randn(1, 24, 32),
        refused=everywhere("export", "no engine runs one", "other gates"),
    ),
    PackCase(
        "row_reader",
        "`examples/sequence.py`",
        example("sequence", "RowReader"),
        rows(8, 8),
        wrong={"venus": "curves of its own, not modelled"},
    ),
    PackCase(
        "row_encoder",
        "`examples/attention.py`",
        example("attention", "RowEncoder"),
        rows(8, 8),
        refused={"venus": Refused("export", "layer_norm", "a norm of another kind")},
    ),
]

GROUPS: dict[str, list[PackCase]] = {
    "Layers": LAYERS,
    "Sums, products, activations": ELEMENTWISE,
    "Pools": POOLS,
    "Movement": MOVEMENT,
    "Functions, attention, sequences": SEQUENCES,
    "Networks": NETWORKS,
}

ALL = [case for cases in GROUPS.values() for case in cases]
