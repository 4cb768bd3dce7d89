"""Convolutions and linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from tests.models import Lambda
from tests.thinker.cases.case import (
    NO_DILATION,
    PACKER_KERNEL,
    PLATFORMS,
    PackCase,
    Refused,
    chain,
    conv,
    everywhere,
    image,
    line,
    on_conv,
    on_linear,
    refused_kernel,
    rows,
)

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
        refused=dict.fromkeys(PLATFORMS, PACKER_KERNEL),
    ),
    PackCase(
        "conv2d_dilated",
        "dilation 2",
        chain(conv(4, 8, 3, dilation=2, padding=2)),
        image(4, 12),
        ("conv2d_dil2",),
        refused={"venus": Refused("packer", "Dilations must be", NO_DILATION)},
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
