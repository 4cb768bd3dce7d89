"""What the examples share: data in memory, training by stages, the comparison and its table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor
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
from lightning_linger.export.engines import engine_of
from lightning_linger.platforms import PLATFORMS, platform_of

Results = dict[str, float]
Overrides = Mapping[str, Mapping[str, object]]

ACCURACIES = ("float", "constrained", "QAT", "integer", "exported")
COMPARISONS = ("fake_vs_integer", "integer_vs_exported")
ENGINES = {"linger": "as integers of the engine", "qdq": "in onnxruntime"}
LIMIT = 8.0  # of weights, biases and outputs in the constrained stage
SHARES = (2, 1, 1)  # of the epochs: in float, constrained, QAT


class Classifier(pl.LightningModule):
    """Trains whatever `forward` a subclass has; knows nothing about quantization."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_accuracy", accuracy_of(self(inputs), labels), prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TensorData(pl.LightningDataModule):
    """Tensors in memory: shuffled batches to train on, one batch of everything to validate on.

    Args:
        train: Inputs and labels.
        test: Inputs and labels.
        validation: Inputs and labels; None validates on the test data.
        batch_size: Of the training batches.
        seed: Of the order of the training data; None takes it from PyTorch's global generator.
        limit: Use only so many examples of each.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor] | None = None,
        batch_size: int = 64,
        seed: int | None = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        parts = (train, test, validation or test)
        self.train, self.test, self.validation = (
            TensorDataset(*(tensor[:limit] for tensor in part)) for part in parts
        )
        self.batch_size = min(batch_size, len(self.train))
        self.seed = seed

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        order = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        return DataLoader(
            self.train, self.batch_size, shuffle=True, drop_last=True, generator=order
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.validation, len(self.validation))


def digits_rows() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test data of scikit-learn's digits, 8x8 pixels from 0 to 1.

    Every fourth of the 1797 images is for testing.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16.0
    labels = torch.tensor(digits.target)
    test = torch.arange(len(labels)) % 4 == 0
    return (images[~test], labels[~test]), (images[test], labels[test])


class StageAccuracy(pl.Callback):
    """Measures on the test data at the end of each stage before quantization."""

    def __init__(self, constrain_at: int, quantize_at: int, test: TensorDataset) -> None:
        # Where both end at once, the constrained stage was empty: the later entry stays.
        self.ends = {quantize_at: "constrained", constrain_at: "float"}
        self.test = test
        self.accuracy: Results = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stage = self.ends.get(trainer.current_epoch + 1)
        if stage is not None and not trainer.sanity_checking:
            inputs, labels = self.test.tensors
            self.accuracy[stage] = accuracy_of(pl_module(inputs), labels)


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """Return the share of examples whose largest logit is at the label."""
    return (logits.argmax(1) == labels).float().mean().item()


def differing(left: Tensor, right: Tensor) -> float:
    """Return the number of elements that differ; 0 says that the tensors are equal."""
    return 0.0 if torch.equal(left, right) else float((left != right).sum())


def run_exported(path: Path, dialect: str, inputs: Tensor) -> Tensor:
    """Run an exported file on one example after the other.

    A `linger` file runs as integers of the engine, a `qdq` file in onnxruntime.
    """
    engine = engine_of(path, dialect)
    return torch.cat([torch.from_numpy(engine([x.numpy()])[0]) for x in inputs.split(1)])


def train(
    model: Classifier,
    data: TensorData,
    platform: str,
    starts: tuple[int, int],
    epochs: int,
    onnx: Path,
    checkpoint: Path,
    overrides: Overrides | None = None,
) -> Results:
    """Train for one platform: in float, with limits, then on the integer grid.

    Args:
        model: Float model; it ends trained and quantized.
        data: What to train on and to compare on.
        platform: Name of the target.
        starts: First epochs with limits, and on the grid.
        epochs: Number of epochs.
        onnx: Where to export to.
        checkpoint: Where to save.
        overrides: What single layers are quantized with instead.

    Returns:
        Accuracies on the test data, and how many of its logits differ; nothing of an exported
        file for a platform that none is made for.
    """
    dialect = platform_of(platform).dialect
    constrain_at, quantize_at = starts
    stages = StageAccuracy(constrain_at, quantize_at, data.test)
    exports = [ONNXExportCallback(onnx, dialect=dialect)] if dialect else []
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(onnx.parent, name="tensorboard", version=platform),
        log_every_n_steps=5,
        default_root_dir=onnx.parent,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            FuseBNCallback(at_epoch=constrain_at),
            NormalizeCallback(at_epoch=constrain_at, weight=LIMIT, bias=LIMIT, output=LIMIT),
            QuantizeCallback(at_epoch=quantize_at, platform=platform, overrides=overrides),
            IntegerValidatorCallback(),
            QuantErrorCallback(),
            *exports,
            stages,
        ],
    )
    trainer.fit(model, data)
    trainer.save_checkpoint(checkpoint, weights_only=False)

    model.eval()
    inputs, labels = data.test.tensors
    with torch.no_grad():
        fake = model(inputs)
        with linger.integer(model):
            integer = model(inputs)

    results = dict(stages.accuracy)
    for stage, logits in (("QAT", fake), ("integer", integer)):
        results[stage] = accuracy_of(logits, labels)
    results["fake_vs_integer"] = differing(fake, integer)
    results["logits"] = fake.numel()
    if dialect:
        exported = run_exported(onnx, dialect, inputs)
        results["exported"] = accuracy_of(exported, labels)
        results["integer_vs_exported"] = differing(integer, exported)
    return results


def _count(result: Results, name: str) -> str:
    return f"{result[name]:.0f} of {result['logits']:.0f}" if name in result else "-"


def print_table(console: Console, title: str, results: Mapping[str, Results]) -> None:
    """Print accuracies and comparisons, one column per platform."""
    table = Table("accuracy", *results, title=title)
    for stage in ACCURACIES:
        accuracies = (result.get(stage) for result in results.values())
        label = "exported ONNX" if stage == "exported" else stage
        table.add_row(label, *("-" if a is None else f"{100 * a:.2f} %" for a in accuracies))
    table.add_section()
    for name in COMPARISONS:
        label = f"logits that differ, {name.replace('_vs_', ' and ').replace('fake', 'QAT')}"
        table.add_row(label, *(_count(result, name) for result in results.values()))
    console.print(table)


def run(
    title: str,
    make_model: Callable[[], Classifier],
    data: TensorData,
    targets: Mapping[str, str],
    out: Path,
    name: str,
    epochs: int,
    shares: tuple[int, int, int] = SHARES,
    overrides: Overrides | None = None,
) -> dict[str, Results]:
    """Train, prove and export a new model for every target, and print what came of it.

    Args:
        title: Of the table.
        make_model: Builds the float model.
        data: What to train on and to compare on.
        targets: File name of the exported model by platform.
        out: Folder of everything written.
        name: What the checkpoints' names start with.
        epochs: Epochs per target.
        shares: How the stages divide the epochs.
        overrides: What single layers are quantized with instead.
    """
    starts = (
        epochs * shares[0] // sum(shares),
        epochs * (shares[0] + shares[1]) // sum(shares),
    )
    results = {}
    for platform, onnx in targets.items():
        pl.seed_everything(0, verbose=False)
        checkpoint = out / f"{name}.{platform}.ckpt"
        results[platform] = train(
            make_model(), data, platform, starts, epochs, out / onnx, checkpoint, overrides
        )
    console = Console()
    print_table(console, title, results)
    dialects = dict.fromkeys(platform_of(platform).dialect for platform in targets)
    runs = " and ".join(ENGINES[dialect] for dialect in dialects if dialect)
    console.print(f"The exported ONNX runs {runs}. Files: {out}" if runs else f"Files: {out}")
    for platform, onnx in targets.items():
        files = [onnx] if platform_of(platform).dialect else []
        console.print(f"  {platform}: {', '.join([*files, f'{name}.{platform}.ckpt'])}")
    console.print(f"Dashboards: tensorboard --logdir {out / 'tensorboard'}")
    first = out / "tensorboard" / next(iter(targets))
    console.print(f"A page to hand on: lightning-linger report {first} -o report.html")
    return results


def parser_of(
    description: str | None, out: str, epochs: int, platforms: Sequence[str] | None = None
) -> argparse.ArgumentParser:
    """Return the command line that the examples have in common."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of what is written")
    parser.add_argument("--epochs", type=int, default=epochs, help="of all stages together")
    parser.add_argument("--platform", nargs="+", choices=sorted(PLATFORMS), default=platforms)
    parser.add_argument("--limit", type=int, help="use only so many examples, to try it out")
    return parser
