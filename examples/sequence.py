"""A recurrent layer: an LSTM that reads scikit-learn's digits row by row.

Each image is a sequence of eight steps with eight pixels each; the output after the last row
decides. Nothing but the LSTM's own gates needs a sigmoid or a tanh, which venusA lacks as single
ops.

The engines of venusA and arcs run LSTMs exactly as the integer model here does, one sequence at a
time. venus runs them with other activation tables, which nothing here has verified. onnxruntime
runs them as well.

Run with `python examples/sequence.py`. Needs `pip install "lightning-linger[examples]"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from common import Classifier, Results, TensorData, digits_rows, parser_of, run
from torch import Tensor, nn

ROWS, PIXELS = 8, 8


class RowReader(Classifier):
    """Reads images [N, ROWS, PIXELS] from top to bottom."""

    def __init__(self, hidden: int = 48, learning_rate: float = 5e-3) -> None:
        super().__init__(learning_rate)
        self.example_input_array = torch.zeros(1, ROWS, PIXELS)
        self.lstm = nn.LSTM(PIXELS, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(x)
        return self.fc(outputs[:, -1])


def main(
    out: Path, epochs: int, platforms: Sequence[str] = ("venusa",), limit: int | None = None
) -> dict[str, Results]:
    """Train, prove and export for every platform, and print what came of it."""
    data = TensorData(*digits_rows(), limit=limit)
    targets = {platform: f"sequence.{platform}.onnx" for platform in platforms}
    title = f"digits row by row, {len(data.test)} test images"
    return run(title, RowReader, data, targets, out, "sequence", epochs)


if __name__ == "__main__":
    arguments = parser_of(
        __doc__, out="runs/sequence", epochs=30, platforms=["venusa"]
    ).parse_args()
    main(arguments.out, arguments.epochs, arguments.platform, arguments.limit)
