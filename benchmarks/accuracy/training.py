"""Training and measuring, the same for every recipe and every library."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_linger as linger
from benchmarks.accuracy.tasks import BATCH, Labelled, Task, common


@dataclass(frozen=True)
class Score:
    """What a model got right.

    Args:
        correct: Test examples whose largest logit is at the label.
        count: Test examples.
        differing: Logits that differ between fake-quant and integers; None without integers.
    """

    correct: int
    count: int
    differing: int | None = None


class Learner(pl.LightningModule):
    """Trains any network with Adam and a cosine schedule.

    Weights do not decay, so that no library's learned scales do either.
    """

    def __init__(self, network: nn.Module, learning_rate: float, example: Tensor) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate
        self.example_input_array = example

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.Adam(linger.parameter_groups(self), lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    network: nn.Module,
    data: tuple[Labelled, Labelled],
    seed: int,
    epochs: int,
    learning_rate: float,
    callbacks: Sequence[pl.Callback] = (),
) -> Learner:
    """Train a network in place; the seed says in which order and with which noise."""
    train, test = data
    pl.seed_everything(seed, verbose=False)
    # A network that was measured before is in evaluation mode, which Lightning leaves as it is.
    learner = Learner(network, learning_rate, train[0][:1]).train()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
    )
    trainer.fit(learner, common.TensorData(train, test, batch_size=BATCH, seed=seed))
    return learner.eval()


def fit_float(task: Task, seed: int) -> nn.Module:
    """Return the network that every recipe of a seed starts from."""
    pl.seed_everything(seed, verbose=False)
    network = task.network()
    fit(network, task.data(seed), seed, task.epochs, task.learning_rate)
    return network


def score(model: nn.Module, test: Labelled, integers: bool = False) -> Score:
    """Measure a model in evaluation; with ``integers`` a quantized model of this library."""
    inputs, labels = test
    model.eval()
    with torch.no_grad():
        logits, differing = model(inputs), None
        if integers:
            with linger.integer(model):
                on_integers = model(inputs)
            differing = int((logits != on_integers).sum())
            logits = on_integers
    return Score(int((logits.argmax(1) == labels).sum()), len(labels), differing)


def quiet() -> None:
    """Silence what Lightning says about every small run."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        for part in ("", ".utilities.rank_zero"):
            logging.getLogger(name + part).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
