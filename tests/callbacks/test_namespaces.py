"""`lightning.pytorch` and `pytorch_lightning` are two sets of classes; ours work with both."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_linger as linger
from lightning_linger import callbacks as ours
from lightning_linger.core.instrumentation import instrumentation_of
from tests.callbacks.boring import loader
from tests.callbacks.test_cli import NAMESPACES, model_of, namespace_of


def trainer(pl: Any, folder: Path, callbacks: list[Any], epochs: int = 3) -> Any:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )


def stack(folder: Path) -> list[Any]:
    """Everything at once."""
    return [
        ours.FuseBNCallback(),
        ours.NormalizeCallback(),
        ours.QuantizeCallback(at_epoch=1, freeze_at_epoch=2),
        ours.StageSwitchCallback(learning_rate_factor=0.1, reset_patience=True),
        ours.IntegerValidatorCallback(),
        ours.QuantErrorCallback(),
        ours.RNGStateCallback(),
        ours.ONNXExportCallback(folder / "model.onnx"),
        ours.StageModelCheckpoint(dirpath=folder, monitor="val_loss", filename="{epoch}"),
    ]


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_run_and_its_resumption(name: str, tmp_path: Path) -> None:
    pl = namespace_of(name)
    made = model_of(pl)
    pl.seed_everything(1, verbose=False)
    model, first = made(), trainer(pl, tmp_path, stack(tmp_path))
    first.fit(model)
    saver = first.checkpoint_callback
    assert isinstance(saver, ours.StageModelCheckpoint), "no second one was added"
    assert list(saver.best_by_stage) == ["normalize", "quantize", "freeze"]
    assert first.callback_metrics["integer/mismatches"] == 0
    pl.seed_everything(2, verbose=False)
    again = made()
    path = saver.best_by_stage["quantize"]
    trainer(pl, tmp_path / "again", stack(tmp_path)).fit(again, ckpt_path=path)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    (best,) = first.validate(ckpt_path="best", verbose=False)
    assert best["integer/mismatches"] == 0
    loaded = linger.load_checkpoint(made, path)
    assert instrumentation_of(loaded).switches.quantize


@pytest.mark.parametrize("name", NAMESPACES)
def test_ours_are_callbacks_of_both(name: str) -> None:
    pl = namespace_of(name)
    for callback in (ours.QuantizeCallback(), ours.RNGStateCallback(), ours.StageSwitchCallback()):
        assert isinstance(callback, pl.Callback)
    saver = ours.StageModelCheckpoint(monitor="val_loss")
    assert isinstance(saver, pl.callbacks.ModelCheckpoint)


@pytest.mark.parametrize("name", NAMESPACES)
def test_errors_are_those_of_lightning(name: str, tmp_path: Path) -> None:
    pl = namespace_of(name)
    wrong = [ours.FuseBNCallback(at_epoch=2), ours.QuantizeCallback(at_epoch=1)]
    exceptions = importlib.import_module(f"{pl.__name__}.utilities.exceptions")
    with pytest.raises(exceptions.MisconfigurationException, match="cannot start after"):
        trainer(pl, tmp_path, wrong).fit(model_of(pl)(), loader())
