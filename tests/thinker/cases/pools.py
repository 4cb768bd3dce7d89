"""Pools."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from tests.models import Chain
from tests.thinker.cases.case import PackCase, everywhere, image, line, on_conv, refused_kernel

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
