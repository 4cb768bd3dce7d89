"""A small LightningModule and Trainer for the callback tests."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 4


class Classifier(pl.LightningModule):
    """Convolutions, batch norms, a residual sum, dropout, a metric and a loss module."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, CLASSES)
        self.criterion = nn.CrossEntropyLoss()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.conv(x))
        return self.fc(self.dropout(x.mean((2, 3))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.criterion(self(x), y)
        self.losses.append(loss.detach())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.accuracy(self(x), y)
        self.log("val_accuracy", self.accuracy, on_epoch=True)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(batches: int = 3, batch_size: int = 8, shuffle: bool = True) -> DataLoader[Any]:
    """Random images whose class shows in their mean."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, CLASSES, (batches * batch_size,), generator=generator)
    images = torch.randn(len(labels), 1, 6, 6, generator=generator) * 0.5
    images = images + labels.view(-1, 1, 1, 1) * 0.5
    return DataLoader(TensorDataset(images, labels), batch_size, shuffle=shuffle)


def trainer(folder: Path, callbacks: list[Any], epochs: int = 3, **kwargs: Any) -> pl.Trainer:
    """Return a quiet CPU trainer."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, default_root_dir=folder, **{**defaults, **kwargs}
    )


def fitted(folder: Path, callbacks: list[Any], epochs: int = 3, **kwargs: Any) -> Classifier:
    """Fit a fresh model with a fixed seed and return it."""
    pl.seed_everything(11, verbose=False)
    model = Classifier()
    trainer(folder, callbacks, epochs, **kwargs).fit(model, loader(), loader(2, shuffle=False))
    return model
