"""What a run tells: the stages that are on in the progress bar, and their switches in the log."""

import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from lightning_linger.callbacks import FuseBNCallback, QuantizeCallback
from lightning_linger.core.logs import logger
from tests.callbacks.boring import Classifier, fitted, loader, trainer


class Bar(pl.callbacks.ProgressBar):
    """Notes the postfix after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.stages.append(self.get_metrics(trainer, pl_module).get("stage"))


def stages() -> list[Any]:
    return [FuseBNCallback(at_epoch=1), QuantizeCallback(at_step=7)]


def test_the_postfix_shows_the_stages_that_are_on(tmp_path: Path) -> None:
    bar = Bar()
    fitted(tmp_path, [*stages(), bar], epochs=3, enable_progress_bar=True)
    assert bar.stages == ["float"] * 3 + ["fuse_bn"] * 3 + ["fuse_bn"] + ["fuse_bn+quantize"] * 2


@pytest.mark.parametrize("name", ["TQDMProgressBar", "RichProgressBar"])
def test_the_bars_of_lightning_print_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    bar = getattr(pl.callbacks, name)()
    fitted(tmp_path, [*stages(), bar], epochs=3, enable_progress_bar=True)
    printed = capsys.readouterr()
    assert "fuse_bn+quantize" in printed.out + printed.err


def test_without_a_bar_there_is_no_postfix(tmp_path: Path) -> None:
    run = trainer(tmp_path, stages(), epochs=1)
    run.fit(Classifier(), loader())
    assert "stage" not in run.progress_bar_metrics


def test_switches_are_logged_at_info(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        fitted(tmp_path, stages(), epochs=3)
    finally:
        logger.setLevel(level)
    messages = [r.getMessage() for r in caplog.records if r.name == "lightning_linger"]
    assert [message.partition(" at ")[0] for message in messages] == [
        "fuse_bn of Classifier is on",
        "quantize of Classifier is on",
    ]
