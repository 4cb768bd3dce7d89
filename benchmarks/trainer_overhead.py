"""What callbacks that are scheduled later add to a step of the Lightning Trainer."""

import logging
import warnings

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import Cost, Effort, Meter, Row, clock, compare
from lightning_linger.callbacks import FuseBNCallback, NormalizeCallback, QuantizeCallback

LATER = 1000


class TinyModule(pl.LightningModule):
    """One linear layer: nearly all of a step is the Trainer's own work."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.layer(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return a loss."""
        (x,) = batch
        out = self(x)
        return F.mse_loss(out, torch.ones_like(out))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def no_callbacks() -> list[pl.Callback]:
    """Return nothing: the bare Trainer."""
    return []


def waiting_callbacks() -> list[pl.Callback]:
    """Return the library's stages, none of which switches on during the run."""
    return [
        FuseBNCallback(at_epoch=LATER),
        NormalizeCallback(at_epoch=LATER, weight=8.0, bias=8.0, output=8.0),
        QuantizeCallback(at_epoch=LATER, platform="venusa"),
    ]


CONTESTANTS = {"bare Trainer": no_callbacks, "callbacks waiting": waiting_callbacks}


def fit(callbacks: list[pl.Callback], steps: int) -> None:
    """Train for one epoch of ``steps`` steps."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TinyModule(), DataLoader(TensorDataset(torch.randn(steps, 8))))


def measure(effort: Effort) -> list[Row]:
    """Compare the cost of a step, which is the slope between n and 2n steps."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    steps = 200 if effort.quick else 1000

    def slope(name: str) -> Meter:
        def cost() -> Cost:
            short = clock(lambda: fit(CONTESTANTS[name](), steps))
            long = clock(lambda: fit(CONTESTANTS[name](), 2 * steps))
            return Cost((long.wall - short.wall) / steps, (long.cpu - short.cpu) / steps)

        cost()
        return cost

    return compare(
        "Trainer step / bare Trainer",
        slope("bare Trainer"),
        {name: slope(name) for name in CONTESTANTS},
        effort.rounds,
    )
