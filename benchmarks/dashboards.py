"""What the measuring callbacks add to an epoch: validation repeated, values and pictures logged."""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.profilers import Profiler
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import Cost, Effort, Row, Spread
from benchmarks.models import ResNet20
from lightning_linger.callbacks import (
    FuseBNCallback,
    IntegerValidatorCallback,
    QuantErrorCallback,
    QuantizeCallback,
)

BATCH = 64
# An epoch of CIFAR-10 at this batch, which the cost of one validation is set against.
EPOCH_STEPS = 50_000 // BATCH
EPOCHS = 3
OURS = ("QuantErrorCallback", "IntegerValidatorCallback")


class Accountant(Profiler):
    """Adds up the time of the hooks of some callbacks, and of training steps, per epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = Cost(0.0, 0.0)
        self.training = Cost(0.0, 0.0)
        self._started: dict[str, Cost] = {}

    def start(self, action_name: str) -> None:
        """Read the clocks."""
        self._started[action_name] = _now()

    def stop(self, action_name: str) -> None:
        """Account for what has passed."""
        began, now = self._started.pop(action_name, None), _now()
        if began is None:
            return
        spent = Cost(now.wall - began.wall, now.cpu - began.cpu)
        if action_name == "run_training_batch":
            self.training = _sum(self.training, spent)
        elif any(name in action_name for name in OURS):
            self.ours = _sum(self.ours, spent)


class Classifier(pl.LightningModule):
    """ResNet-20 on random images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet20()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return a loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log an accuracy."""
        hits = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_accuracy", hits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(steps: int) -> Accountant:
    """Train some short epochs with both callbacks at their defaults and TensorBoard."""
    torch.manual_seed(0)
    images, labels = torch.randn(steps * BATCH, 3, 32, 32), torch.randint(10, (steps * BATCH,))
    data = DataLoader(TensorDataset(images, labels), BATCH)
    accountant = Accountant()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            callbacks=[
                FuseBNCallback(),
                QuantizeCallback(platform="venusa"),
                QuantErrorCallback(),
                IntegerValidatorCallback(),
            ],
            logger=TensorBoardLogger(Path(folder)),
            profiler=accountant,
            limit_val_batches=1,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(), data, data)
    return accountant


def measure(effort: Effort) -> list[Row]:
    """Compare an epoch with the callbacks with the same epoch less what they took."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    steps = 5 if effort.quick else 20
    runs = [fit(steps) for _ in range(min(effort.rounds, 5))]
    seconds = sorted(run.ours.wall / EPOCHS for run in runs)[len(runs) // 2]

    def ratios(read: Callable[[Cost], float]) -> list[float]:
        return [
            1.0 + (read(run.ours) / EPOCHS) / (read(run.training) / (EPOCHS * steps) * EPOCH_STEPS)
            for run in runs
        ]

    wall, cpu = ratios(lambda cost: cost.wall), ratios(lambda cost: cost.cpu)
    added = (Spread.of(wall).median - 1.0) * EPOCH_STEPS
    return [
        Row(
            f"QAT epoch of {EPOCH_STEPS} steps / without dashboards",
            "both callbacks, TensorBoard",
            Spread.of(wall),
            Spread.of(cpu),
            seconds,
            f"{100 * (Spread.of(wall).median - 1):.2f} % of the epoch: {added:.1f} training steps",
        )
    ]


def _now() -> Cost:
    return Cost(time.perf_counter(), time.process_time())


def _sum(left: Cost, right: Cost) -> Cost:
    return Cost(left.wall + right.wall, left.cpu + right.cpu)
