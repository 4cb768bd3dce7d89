"""From float training to integer models that run elsewhere, on scikit-learn's digits.

Trains one small residual network for two targets: LISTENAI's venusA (power-of-two scales, the
`linger` ONNX dialect) and onnxruntime (free scales, the `qdq` dialect).

Run with `python examples/digits.py`. Needs `pip install "lightning-linger[examples]"`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_linger as linger
from lightning_linger.callbacks import (
    FuseBNCallback,
    IntegerValidatorCallback,
    NormalizeCallback,
    ONNXExportCallback,
    QuantErrorCallback,
    QuantizeCallback,
)
from lightning_linger.export.verify import engine_of


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


class Digits(pl.LightningModule):
    """A small residual network; nothing in it knows about quantization."""

    def __init__(self, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
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

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self(images).argmax(1) == labels).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DigitsData(pl.LightningDataModule):
    """1797 images of 8x8 pixels that ship with scikit-learn; every fourth one is for testing."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
        labels = torch.tensor(digits.target)
        test = torch.arange(len(labels)) % 4 == 0
        self.train = TensorDataset(images[~test], labels[~test])
        self.test = TensorDataset(images[test], labels[test])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, len(self.test))


class StageAccuracy(pl.Callback):
    """Keeps the last validation accuracy of each stage."""

    def __init__(self, constrain_at: int, quantize_at: int) -> None:
        self.ends = {"float": constrain_at, "constrained": quantize_at}
        self.accuracy: dict[str, float] = {}

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        epoch = trainer.current_epoch
        stage = next((name for name, end in self.ends.items() if epoch < end), "QAT")
        self.accuracy[stage] = float(trainer.callback_metrics["val_accuracy"])


# Each target reads one dialect of ONNX.
TARGETS = {"venusa": "linger", "onnxruntime": "qdq"}


def run_exported(path: Path, dialect: str, images: Tensor) -> Tensor:
    """Run an exported file image by image: a `linger` file as integers, a `qdq` in onnxruntime."""
    engine = engine_of(path, dialect)
    return torch.cat([torch.from_numpy(engine([x.numpy()])[0]) for x in images.split(1)])


def train(platform: str, out: Path, epochs: int) -> dict[str, float]:
    """Train for one platform; return accuracies, and how many output elements differ."""
    dialect = TARGETS[platform]
    pl.seed_everything(0, verbose=False)
    constrain_at, quantize_at = epochs // 3, 2 * epochs // 3
    data, model = DigitsData(), Digits()
    stages = StageAccuracy(constrain_at, quantize_at)
    onnx_path = out / f"digits.{dialect}.onnx"
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(out, name="tensorboard", version=platform),
        log_every_n_steps=5,
        default_root_dir=out,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            FuseBNCallback(at_epoch=constrain_at),
            NormalizeCallback(at_epoch=constrain_at, weight=8.0, bias=8.0, output=8.0),
            QuantizeCallback(at_epoch=quantize_at, platform=platform),
            IntegerValidatorCallback(),
            QuantErrorCallback(),
            ONNXExportCallback(onnx_path, dialect=dialect),
            stages,
        ],
    )
    trainer.fit(model, data)
    trainer.save_checkpoint(out / f"digits.{platform}.ckpt", weights_only=False)

    model.eval()
    images, labels = data.test.tensors
    with torch.no_grad():
        fake = model(images)
        with linger.integer(model):
            integer = model(images)
    exported = run_exported(onnx_path, dialect, images)

    results = dict(stages.accuracy)
    for name, logits in (("QAT", fake), ("integer", integer), ("exported", exported)):
        results[name] = (logits.argmax(1) == labels).float().mean().item()
    results["fake_vs_integer"] = float((fake != integer).sum())
    results["integer_vs_exported"] = float((integer != exported).sum())
    return results


def main(out: Path, epochs: int) -> dict[str, dict[str, float]]:
    """Train, prove and export for every target, and print what came of it."""
    results = {platform: train(platform, out, epochs) for platform in TARGETS}
    table = Table("accuracy", *TARGETS, title="scikit-learn digits, 450 test images")
    for stage in ("float", "constrained", "QAT", "integer", "exported"):
        accuracies = (results[platform].get(stage) for platform in TARGETS)
        label = "exported ONNX" if stage == "exported" else stage
        table.add_row(label, *("-" if a is None else f"{100 * a:.2f} %" for a in accuracies))
    table.add_section()
    for name in ("fake_vs_integer", "integer_vs_exported"):
        label = f"logits that differ, {name.replace('_vs_', ' and ').replace('fake', 'QAT')}"
        table.add_row(label, *(f"{results[platform][name]:.0f} of 4500" for platform in TARGETS))
    console = Console()
    console.print(table)
    console.print(
        f"The exported ONNX runs as integers of the engine and in onnxruntime. Files: {out}"
    )
    for platform, dialect in TARGETS.items():
        console.print(f"  {platform}: digits.{dialect}.onnx, digits.{platform}.ckpt")
    console.print(f"Dashboards: tensorboard --logdir {out / 'tensorboard'}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    main(arguments.out, arguments.epochs)
