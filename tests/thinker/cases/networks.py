"""Whole networks, among them those of the examples."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import ResNet
from tests.thinker.cases.case import PackCase, Refused, everywhere, image, rows


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
        folder = str(Path(__file__).parents[3] / "examples")
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
