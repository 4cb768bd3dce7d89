"""A run for TFLite with the callbacks: when ranges move, and what the stack does."""

import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import lightning_linger as linger
from lightning_linger.callbacks import (
    FuseBNCallback,
    IntegerValidatorCallback,
    ONNXExportCallback,
    QuantizeCallback,
)
from lightning_linger.core.instrumentation import instrumentation_of
from tests.callbacks.boring import Classifier, loader
from tests.models import assert_integer_exact

STACK = Path(__file__).parents[2] / "callbacks" / "tflite_int8.yaml"


class Ranges(pl.Callback):
    """Notes the range of the first layer's result at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, list[float]]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        output = instrumentation_of(pl_module).find("stem/conv2d/0").output
        assert output is not None
        self.seen.append((output.known, output.estimator.range.tolist()))


def fit(tmp_path: Path, *callbacks: pl.Callback, epochs: int = 4) -> tuple[pl.Trainer, Any]:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    model = Classifier(dropout=0.0)
    trainer.fit(model, loader(), loader(shuffle=False))
    return trainer, model


def test_row78_ranges_start_late_move_and_stand_still(tmp_path: Path) -> None:
    ranges = Ranges()
    _, model = fit(
        tmp_path,
        FuseBNCallback(at_epoch=0),
        QuantizeCallback(at_epoch=1, platform="tflite", freeze_at_epoch=3),
        IntegerValidatorCallback(),
        ranges,
    )
    known = [known for known, _ in ranges.seen]
    (_, first, second, third) = (ends for _, ends in ranges.seen)
    assert known == [False, True, True, True]
    assert first != second
    assert second == third
    # Behind a ReLU a range begins at zero.
    assert first[0] == 0.0 < first[1]
    images, _ = next(iter(loader(shuffle=False)))
    assert_integer_exact(model.eval(), images)
    stem = instrumentation_of(model).find("stem/conv2d/0")
    assert stem.fold is model.bn
    assert stem.prepared["weights"].codes.abs().max() == 127


def test_evaluation_and_integers_agree_in_validation(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, QuantizeCallback(platform="tflite"), IntegerValidatorCallback())
    assert trainer.callback_metrics["integer/mismatches"] == 0
    assert trainer.callback_metrics["integer/output_mismatch_rate"] == 0


def test_a_file_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    ranges = Ranges()
    with pytest.raises(linger.UnsupportedError, match="no ONNX operator rounds"):
        fit(
            tmp_path,
            QuantizeCallback(platform="tflite"),
            ONNXExportCallback(tmp_path / "model.onnx", dialect="qdq"),
            ranges,
        )
    assert ranges.seen == []


def test_row79_the_stack_trains_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = LightningCLI(
        Classifier,
        run=False,
        save_config_callback=None,
        seed_everything_default=0,
        args=[
            *("--config", str(STACK), f"--trainer.default_root_dir={tmp_path}"),
            *("--trainer.max_epochs", "12"),
        ],
        trainer_defaults={
            "logger": False,
            "accelerator": "cpu",
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        },
    )
    cli.trainer.fit(cli.model, loader(), loader(shuffle=False))
    images, _ = next(iter(loader(shuffle=False)))
    assert_integer_exact(cli.model.eval(), images)
    with torch.no_grad():
        assert torch.isfinite(cli.model(images)).all()
    assert {row.platform for row in linger.summary(cli.model) if row.bits} == {"tflite"}
    assert "tensorflow" not in sys.modules
    assert "tflite_runtime" not in sys.modules
