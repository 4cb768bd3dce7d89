"""Attention: a small Transformer encoder on scikit-learn's digits.

The eight rows of an image are the tokens. The encoder is PyTorch's own: the calls inside it (the
attention, the layer norms, the sums) are found like those of a hand-written one.

The engines of venusA and arcs have every op of it: matrix products of two activations, softmax over
the last axis and layer norm. That of venus has a layer norm of its own whose arithmetic is not
known, so its export is refused. onnxruntime runs it as well.

Run with `python examples/attention.py`. Needs `pip install "lightning-linger[examples]"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from common import Classifier, Results, TensorData, digits_rows, parser_of, run
from torch import Tensor, nn

ROWS, PIXELS = 8, 8


class RowEncoder(Classifier):
    """Lets the rows of images [N, ROWS, PIXELS] attend to each other; their mean decides."""

    def __init__(
        self, width: int = 32, heads: int = 4, layers: int = 2, learning_rate: float = 2e-3
    ) -> None:
        super().__init__(learning_rate)
        self.example_input_array = torch.zeros(1, ROWS, PIXELS)
        self.embed = nn.Linear(PIXELS, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, ROWS, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, dim_feedforward=2 * width, dropout=0.0, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        return self.fc(self.encoder(x).mean(1))


def main(
    out: Path, epochs: int, platforms: Sequence[str] = ("venusa",), limit: int | None = None
) -> dict[str, Results]:
    """Train, prove and export for every platform, and print what came of it."""
    data = TensorData(*digits_rows(), limit=limit)
    targets = {platform: f"attention.{platform}.onnx" for platform in platforms}
    title = f"digits with attention, {len(data.test)} test images"
    return run(title, RowEncoder, data, targets, out, "attention", epochs)


if __name__ == "__main__":
    arguments = parser_of(
        __doc__, out="runs/attention", epochs=30, platforms=["venusa"]
    ).parse_args()
    main(arguments.out, arguments.epochs, arguments.platform, arguments.limit)
