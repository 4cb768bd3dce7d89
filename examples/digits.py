"""From float training to an integer model that onnxruntime runs, on scikit-learn's digits.

Run with `python examples/digits.py`. Needs `pip install "lightning-linger[examples]"`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
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

CONSTRAIN_AT, QUANTIZE_AT = 4, 8


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
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, len(self.test))


class StageAccuracy(pl.Callback):
    """Keeps the last validation accuracy of each stage."""

    def __init__(self) -> None:
        self.accuracy: dict[str, float] = {}

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        epoch = trainer.current_epoch
        stages = {"float": CONSTRAIN_AT, "constrained": QUANTIZE_AT}
        stage = next((name for name, end in stages.items() if epoch < end), "QAT")
        self.accuracy[stage] = float(trainer.callback_metrics["val_accuracy"])


def run_onnxruntime(path: Path, images: Tensor) -> Tensor:
    """Run an exported model on a batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(np.asarray(output))


def main(out: Path, epochs: int, platform: str) -> dict[str, float]:
    """Train, prove, export, and print what came of it."""
    pl.seed_everything(0, verbose=False)
    data, model, stages = DigitsData(), Digits(), StageAccuracy()
    logger = TensorBoardLogger(out, name="tensorboard")
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=5,
        default_root_dir=out,
        callbacks=[
            FuseBNCallback(at_epoch=CONSTRAIN_AT),
            NormalizeCallback(at_epoch=CONSTRAIN_AT, weight=8.0, bias=8.0, output=8.0),
            QuantizeCallback(at_epoch=QUANTIZE_AT, platform=platform),
            IntegerValidatorCallback(),
            QuantErrorCallback(),
            ONNXExportCallback(out / "digits.linger.onnx", dialect="linger"),
            ONNXExportCallback(out / "digits.qdq.onnx", dialect="qdq"),
            stages,
        ],
    )
    trainer.fit(model, data)
    checkpoint = out / "digits.ckpt"
    trainer.save_checkpoint(checkpoint)

    model.eval()
    images, labels = data.test.tensors
    with torch.no_grad():
        fake = model(images)
        with linger.integer(model):
            integer = model(images)
    onnx = run_onnxruntime(out / "digits.qdq.onnx", images)

    results = dict(stages.accuracy)
    for name, logits in (("QAT", fake), ("integer", integer), ("onnxruntime", onnx)):
        results[name] = (logits.argmax(1) == labels).float().mean().item()
    results["mismatches"] = float((fake != integer).sum() + (integer != onnx).sum())

    print(f"\n{'stage':<14}accuracy")
    for name in ("float", "constrained", "QAT", "integer", "onnxruntime"):
        if name in results:
            print(f"{name:<14}{100 * results[name]:.2f} %")
    total = fake.numel()
    print(f"\nelements that differ on the {len(labels)} test images ({total} logits):")
    print(f"  fake-quant and integer:    {int((fake != integer).sum())}")
    print(f"  integer and onnxruntime:   {int((integer != onnx).sum())}")
    print(f"\nONNX:        {out / 'digits.linger.onnx'}, {out / 'digits.qdq.onnx'}")
    print(f"checkpoint:  {checkpoint}")
    print(f"dashboards:  tensorboard --logdir {out}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--platform", default="venusa")
    arguments = parser.parse_args()
    main(arguments.out, arguments.epochs, arguments.platform)
