"""Keyword spotting: ten spoken words, unknown words and silence, by a DS-CNN or by a GRU.

The words are synthetic and ship as features (see `data/README.md`); the voices of the test data are
in neither the training nor the validation data.

- `--model ds_cnn`: depthwise separable convolutions over time and frequency. The engines of venusA,
  arcs and venus can run it, and onnxruntime.
- `--model gru`: a recurrent layer over pairs of frames, for onnxruntime. The engines of venusA and
  arcs have no usable GRU, and that of venus computes gates other than PyTorch's; take the `ds_cnn`
  there, or an LSTM as `sequence.py` does.

Run with `python examples/kws.py`. Needs `pip install "lightning-linger[examples]"`, and espeak-ng
only for `--synthesise`, which makes the features anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import make_kws_features
import numpy as np
import torch
import torch.nn.functional as F
from common import Classifier, Results, TensorData, parser_of, run
from torch import Tensor, nn

FRAMES, MELS = 49, 16
CLASSES = 12
PAIR = 2  # frames that the GRU reads in one step


class Separable(nn.Module):
    """A convolution of each channel on its own, then one that mixes the channels."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels, channels, 3, stride, padding=1, groups=channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.depthwise(x)))
        return F.relu(self.bn2(self.pointwise(x)))


class DSCNN(Classifier):
    """Reads features [N, 1, FRAMES, MELS] as an image."""

    def __init__(self, channels: int = 64, learning_rate: float = 4e-3) -> None:
        super().__init__(learning_rate)
        self.example_input_array = torch.zeros(1, 1, FRAMES, MELS)
        self.stem = nn.Conv2d(1, channels, 5, stride=2, padding=2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(
            Separable(channels),
            Separable(channels, stride=2),
            Separable(channels),
            Separable(channels),
        )
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.blocks(x)
        return self.fc(self.dropout(x.mean((2, 3))))


class GRU(Classifier):
    """Reads features [N, FRAMES // PAIR, PAIR * MELS] in time; its last output decides."""

    def __init__(self, hidden: int = 64, learning_rate: float = 4e-3) -> None:
        super().__init__(learning_rate)
        self.example_input_array = torch.zeros(1, FRAMES // PAIR, PAIR * MELS)
        self.gru = nn.GRU(PAIR * MELS, hidden, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.gru(x)
        return self.fc(self.dropout(outputs[:, -1]))


def as_image(features: Tensor) -> Tensor:
    """Add a channel."""
    return features.unsqueeze(1)


def in_pairs(features: Tensor) -> Tensor:
    """Put neighbouring frames side by side: half the steps for the same second."""
    steps = FRAMES // PAIR
    return features[:, : steps * PAIR].reshape(-1, steps, PAIR * MELS)


# The model, the shape of its input, and a platform that can run it.
MODELS = {"ds_cnn": (DSCNN, as_image, "venusa"), "gru": (GRU, in_pairs, "onnxruntime")}


def kws_data(path: Path, model: str, limit: int | None = None) -> TensorData:
    """Read a file of features in the shape that a model takes."""
    _, shaped, _ = MODELS[model]
    with np.load(path, allow_pickle=False) as file:
        step, lowest = float(file["step"]), float(file["lowest"])

        def part(split: str) -> tuple[Tensor, Tensor]:
            codes = torch.from_numpy(file[f"{split}_codes"])
            labels = torch.from_numpy(file[f"{split}_labels"])
            return shaped(codes * step + lowest), labels.long()

        return TensorData(part("train"), part("test"), part("validation"), limit=limit)


def main(
    out: Path,
    epochs: int,
    model: str = "ds_cnn",
    platforms: Sequence[str] | None = None,
    limit: int | None = None,
    features: Path = make_kws_features.FEATURES,
) -> dict[str, Results]:
    """Train, prove and export for every platform, and print what came of it."""
    make_model, _, platform = MODELS[model]
    data = kws_data(features, model, limit)
    targets = {name: f"{model}.{name}.onnx" for name in platforms or [platform]}
    title = f"spoken words, {model}, {len(data.test)} test examples of unseen voices"
    return run(title, make_model, data, targets, out / model, model, epochs)


if __name__ == "__main__":
    parser = parser_of(__doc__, out="runs/kws", epochs=24)
    parser.add_argument("--model", choices=MODELS, default="ds_cnn")
    parser.add_argument("--synthesise", action="store_true", help="make the features anew")
    arguments = parser.parse_args()
    features = make_kws_features.FEATURES
    if arguments.synthesise:
        try:
            features = make_kws_features.make(arguments.out / features.name)
        except FileNotFoundError as error:
            parser.error(str(error))
    main(
        arguments.out,
        arguments.epochs,
        arguments.model,
        arguments.platform,
        arguments.limit,
        features,
    )
