"""LightningCLI: a run is a file, and a stack of callbacks is another one.

Run with `python examples/cli.py fit --config callbacks/int8_qat.yaml`. `--print_config` shows every
setting, and `--trainer.max_epochs=20` changes one.
Needs `pip install "lightning-linger[cli,examples]"`.
"""

from __future__ import annotations

from common import TensorData, digits_rows
from digits import Digits
from pytorch_lightning.cli import LightningCLI


class DigitsData(TensorData):
    """scikit-learn's digits as images of one channel.

    Args:
        batch_size: Of the training batches.
        limit: Use only so many examples.
    """

    def __init__(self, batch_size: int = 64, limit: int | None = None) -> None:
        train, test = ((rows.unsqueeze(1), labels) for rows, labels in digits_rows())
        super().__init__(train, test, batch_size=batch_size, limit=limit)


def main(arguments: list[str] | None = None) -> LightningCLI:
    """Run a command of Lightning's command line interface."""
    return LightningCLI(Digits, DigitsData, args=arguments, seed_everything_default=1)


if __name__ == "__main__":
    main()
