"""From float training to integer models that run elsewhere, on scikit-learn's digits.

Trains one small residual network for two targets: LISTENAI's venusA (power-of-two scales, the
`linger` ONNX dialect) and onnxruntime (free scales, the `qdq` dialect).

Run with `python examples/digits.py`. `--platform tflite` trains for TFLite's int8 kernels instead,
and proves that what was trained is what these kernels compute.
Needs `pip install "lightning-linger[examples]"`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Classifier, Results, TensorData, digits_rows, run
from torch import Tensor, nn

from lightning_linger.platforms import PLATFORMS


class Block(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(x + y)


class Digits(Classifier):
    """A small residual network; nothing in it knows about quantization."""

    def __init__(self, learning_rate: float = 2e-3) -> None:
        super().__init__(learning_rate)
        self.example_input_array = torch.zeros(1, 1, 8, 8)
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.block1 = Block(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn_down = nn.BatchNorm2d(32)
        self.block2 = Block(32)
        self.wide = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.block1(x)
        x = F.relu(self.bn_down(self.down(x)))
        x = self.block2(x)
        x = torch.cat([x, F.relu(self.wide(x))], dim=1)
        return self.fc(x.mean((2, 3)))


def digits_data() -> TensorData:
    """Images of one channel; every fourth one is for testing."""
    parts = [(rows.unsqueeze(1), labels) for rows, labels in digits_rows()]
    return TensorData(*parts, seed=None)


# Outputs of a layer that is spoiled are cut here, though they reach ten times as far.
SPOILED_RANGE = 0.25
# Each target reads one dialect of ONNX.
TARGETS = {"venusa": "digits.linger.onnx", "onnxruntime": "digits.qdq.onnx"}


def main(
    out: Path, epochs: int, spoil: str | None = None, platforms: Sequence[str] | None = None
) -> dict[str, Results]:
    """Train, prove and export for every target, and print what came of it."""
    targets = {name: TARGETS.get(name, f"digits.{name}.onnx") for name in platforms or TARGETS}
    data = digits_data()
    title = f"scikit-learn digits, {len(data.test)} test images"
    overrides = {spoil: {"range": SPOILED_RANGE}} if spoil else None
    return run(
        *(title, Digits, data, targets, out, "digits", epochs),
        shares=(1, 1, 1),
        overrides=overrides,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--spoil", metavar="LAYER", help="give this layer too small a range")
    # Targets that quantize layers only have an example of their own, ptq.py.
    trained = sorted(name for name, target in PLATFORMS.items() if not target.layers_only)
    parser.add_argument("--platform", nargs="+", choices=trained, help="train for these")
    arguments = parser.parse_args()
    main(arguments.out, arguments.epochs, arguments.spoil, arguments.platform)
