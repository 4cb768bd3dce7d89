"""The callback stacks that ship with the package."""

import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml
from torch import Tensor, nn

import lightning_linger as linger
import lightning_linger.callbacks as ours

pytest.importorskip("jsonargparse")
from pytorch_lightning.cli import LightningCLI


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns about arguments of pytest, which it does not read."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


FOLDER = Path(__file__).parents[2] / "callbacks"
STACKS = sorted(FOLDER.glob("*.yaml"))


class Tiny(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def parsed(path: Path, folder: Path) -> Any:
    return LightningCLI(
        Tiny,
        run=False,
        save_config_callback=None,
        args=["--config", str(path), f"--trainer.default_root_dir={folder}"],
        trainer_defaults={"logger": False, "accelerator": "cpu", "enable_checkpointing": False},
    )


def described(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["trainer"]


def test_there_are_stacks() -> None:
    assert {path.stem for path in STACKS} >= {
        "cambricon_int8",
        "int8_qat",
        "mixed_float_output",
        "mixed_precision",
        "nics_fix",
        "onnxruntime_int8",
        "ptq_int4",
        "ptq_int8",
        "tflite_int8",
        "two_stage_int8",
    }


@pytest.mark.parametrize("path", STACKS, ids=lambda path: path.stem)
def test_a_stack_gives_the_callbacks_it_names(path: Path, tmp_path: Path) -> None:
    trainer = parsed(path, tmp_path).trainer
    found = [callback for callback in trainer.callbacks if type(callback).__name__ in ours.__all__]
    wanted = described(path)
    assert trainer.max_epochs == wanted["max_epochs"]
    # Lightning moves callbacks that write checkpoints to the end, and keeps the order of the rest.
    assert [f"lightning_linger.callbacks.{type(callback).__name__}" for callback in found] == [
        entry["class_path"] for entry in wanted["callbacks"]
    ]
    for callback, entry in zip(found, wanted["callbacks"], strict=True):
        for name, value in entry.get("init_args", {}).items():
            assert argument(callback, name) == value


@pytest.mark.parametrize("path", STACKS, ids=lambda path: path.stem)
def test_a_stack_says_how_to_use_it(path: Path) -> None:
    assert f"--config callbacks/{path.name}" in path.read_text()


def test_a_wrong_argument_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    text = (FOLDER / "two_stage_int8.yaml").read_text()
    wrong.write_text(text.replace("platform: venusa", "platform: venusb"))
    with pytest.raises((SystemExit, ValueError)):
        parsed(wrong, tmp_path)


def argument(callback: Any, name: str) -> Any:
    """What a callback was given under a name, wherever it keeps it."""
    for holder in (
        callback,
        getattr(callback, "schedule", None),
        getattr(callback, "config", None),
    ):
        if hasattr(holder, name):
            return getattr(holder, name)
    pytest.fail(f"{type(callback).__name__} does not keep {name!r}")


def test_normalization_of_raw_images_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "raw.yaml"
    path.write_text(
        (FOLDER / "cambricon_int8.yaml")
        .read_text()
        .replace("{batches: 32,", "{firstconv: {mean: [0.5], std: [0.25]},")
    )
    (callback,) = (
        found for found in parsed(path, tmp_path).trainer.callbacks if hasattr(found, "firstconv")
    )
    assert callback.firstconv == linger.FirstConv([0.5], [0.25])
    assert callback.config == linger.preset("cambricon", per_channel=True)
