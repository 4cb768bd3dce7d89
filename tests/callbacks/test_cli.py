"""Every callback from YAML, in the CLI of both namespaces; every stack trains a model."""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_linger as linger
import lightning_linger.callbacks as ours
from lightning_linger.core.instrumentation import instrumentation_of
from tests.callbacks.boring import loader

pytest.importorskip("jsonargparse")

FOLDER = Path(__file__).parents[2] / "callbacks"
STACKS = sorted(FOLDER.glob("*.yaml"))
NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """LightningCLI warns about arguments of pytest; stacks write to the working folder."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)


def namespace_of(name: str) -> Any:
    pytest.importorskip(name)
    return importlib.import_module(name)


def model_of(pl: Any) -> Any:
    class Small(pl.LightningModule):  # type: ignore[misc, name-defined] # `pl` is either namespace
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.conv = nn.Conv2d(1, width, 3, bias=False)
            self.bn = nn.BatchNorm2d(width)
            self.fc = nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-2)

        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

        def val_dataloader(self) -> DataLoader[Any]:
            return loader(1)

    return Small


def cli(pl: Any, *arguments: str, run: bool = True) -> Any:
    importlib.import_module(f"{pl.__name__}.cli")
    return pl.cli.LightningCLI(
        model_of(pl),
        args=list(arguments),
        run=run,
        seed_everything_default=3,
        trainer_defaults={
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    )


def with_callbacks(folder: Path, callbacks: list[Any], **trainer: Any) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, **trainer}}))
    return str(path)


def printed_config(pl: Any, config: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        cli(pl, "fit", "--config", config, "--print_config")
    return out.getvalue()


@pytest.mark.parametrize("path", STACKS, ids=lambda path: path.stem)
def test_a_stack_trains_a_model(path: Path, tmp_path: Path) -> None:
    made = cli(namespace_of("pytorch_lightning"), "fit", "--config", str(path))
    model = made.model
    assert instrumentation_of(model).switches.quantize
    x = next(iter(loader()))[0]
    wanted = yaml.safe_load(path.read_text())["trainer"]["callbacks"]
    names = {entry["class_path"].rpartition(".")[2] for entry in wanted}
    if "ONNXExportCallback" in names:
        export = next(c for c in made.trainer.callbacks if isinstance(c, ours.ONNXExportCallback))
        assert export.mismatches == 0
        onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"))
    if "onnxruntime" not in path.stem:
        with torch.no_grad():
            fake = model.eval()(x)
            with linger.integer(model):
                assert torch.equal(model(x), fake)


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_stack_runs_in_the_cli_of_both_namespaces(name: str) -> None:
    made = cli(
        namespace_of(name),
        "fit",
        *("--config", str(FOLDER / "two_stage_int8.yaml"), "--trainer.fast_dev_run=true"),
    )
    assert instrumentation_of(made.model).switches.quantize


EVERYTHING: list[dict[str, Any]] = [
    {"class_path": "FuseBNCallback", "init_args": {"mode": "batch", "modules": ["conv"]}},
    {
        "class_path": "EqualizeCallback",
        "init_args": {"at_epoch": 0, "factors": "free", "absorb_bias": True, "modules": ["conv*"]},
    },
    {
        "class_path": "NormalizeCallback",
        "init_args": {
            "weight": "7*mean",
            "output": "99.9%",
            "gradient": "pull",
            "overrides": {"fc": {"weight": 4.0}},
        },
    },
    {
        "class_path": "QuantizeCallback",
        "init_args": {
            "when": {
                "class_path": "lightning_linger.callbacks.OnPlateau",
                "init_args": {
                    "monitor": "val_loss",
                    "patience": 1,
                    "mode": "max",
                    "min_delta": 0.5,
                },
            },
            "platform": "venusa",
            "weight_bits": 6,
            "output_bits": None,
            "rounding": "half_even",
            "range": 4.0,
            "types": ["Linear", "conv2d"],
            "overrides": {"fc": {"weight_bits": 4}, "type:Conv2d": {"activation_bits": 7}},
            "allow_changes": True,
        },
    },
    {"class_path": "ReestimateBNCallback", "init_args": {"batches": 1, "keep_codes": False}},
    {
        "class_path": "AdaRoundCallback",
        "init_args": {"batches": 1, "steps": 5, "sharpness": [10.0, 1.0], "modules": ["fc"]},
    },
    {
        "class_path": "ProgressiveBitsCallback",
        "init_args": {"schedule": {0: {"weight_bits": 7}, 2: 6}, "modules": ["conv"]},
    },
    {
        "class_path": "DistillationCallback",
        "init_args": {"weight": 0.5, "temperature": 2.0, "loss": "mse", "teacher": "live"},
    },
    {
        "class_path": "SensitivityCallback",
        "init_args": {
            "at_epoch": 1,
            "bits": [2, 8],
            "metric": "kl",
            "part": "both",
            "modules": ["fc"],
            "budget": 1e6,
            "cost": "mac_bits",
        },
    },
    {"class_path": "StageSwitchCallback", "init_args": {"reset_patience": True}},
    {"class_path": "IntegerValidatorCallback", "init_args": {"batches": 2}},
    {"class_path": "QuantErrorCallback", "init_args": {"every_n_epochs": 2}},
    {"class_path": "RNGStateCallback"},
    {"class_path": "ONNXExportCallback", "init_args": {"path": "m-{epoch}.onnx", "at_epoch": [1]}},
    {
        "class_path": "StageModelCheckpoint",
        "init_args": {"dirpath": "kept", "monitor": "val_loss", "save_top_k": 2},
    },
]


def qualified(callbacks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    prefix = "lightning_linger.callbacks."
    return [{**entry, "class_path": prefix + entry["class_path"]} for entry in callbacks]


@pytest.mark.parametrize("name", NAMESPACES)
def test_every_argument_comes_from_yaml_and_goes_back(name: str, tmp_path: Path) -> None:
    pl = namespace_of(name)
    config = with_callbacks(tmp_path, qualified(EVERYTHING))
    printed = yaml.safe_load(printed_config(pl, config))
    found = {
        entry["class_path"].rpartition(".")[2]: entry.get("init_args", {})
        for entry in printed["trainer"]["callbacks"]
    }
    for entry in EVERYTHING:
        for argument, value in entry.get("init_args", {}).items():
            # jsonargparse writes the keys of mappings as text, and reads numbers.
            expected = json.loads(json.dumps(value))
            assert found[entry["class_path"]][argument] == expected, (entry, argument)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(printed))
    assert yaml.safe_load(printed_config(pl, str(again))) == printed


def test_a_run_with_every_callback(tmp_path: Path) -> None:
    config = with_callbacks(tmp_path, qualified(EVERYTHING), max_epochs=4)
    made = cli(namespace_of("pytorch_lightning"), "fit", "--config", config)
    kinds = [type(callback).__name__ for callback in made.trainer.callbacks]
    assert [kind for kind in kinds if kind in ours.__all__] == [
        entry["class_path"] for entry in EVERYTHING
    ]
    quantize = next(c for c in made.trainer.callbacks if isinstance(c, ours.QuantizeCallback))
    assert quantize.schedule.when.monitor == "val_loss"
    assert quantize.config.weight_bits == 6
    sites = {site.node.owner: site for site in instrumentation_of(made.model).sites}
    assert sites["fc"].weights.bits == 4
    assert (tmp_path / "m-1.onnx").exists()
    assert list((tmp_path / "kept").glob("*.ckpt"))


def test_every_callback_can_be_named_in_yaml() -> None:
    """None is forgotten above: what has no place in such a stack is named here."""
    named = {entry["class_path"] for entry in EVERYTHING}
    elsewhere = {"CalibrateCallback", "DumpCallback", "HardwareCheckCallback", "OnPlateau"}
    # AdaRound stands in its place.
    elsewhere |= {"BiasCorrectionCallback"}
    assert named | elsewhere == set(ours.__all__)


def test_a_short_name_and_an_override_on_the_command_line(tmp_path: Path) -> None:
    made = cli(
        namespace_of("pytorch_lightning"),
        "--trainer.callbacks+=lightning_linger.callbacks.QuantizeCallback",
        "--trainer.callbacks.weight_bits=5",
        "--trainer.callbacks+=lightning_linger.callbacks.RNGStateCallback",
        run=False,
    )
    quantize = next(c for c in made.trainer.callbacks if isinstance(c, ours.QuantizeCallback))
    assert quantize.config.weight_bits == 5


WRONG = {
    "an unknown argument": ({"weight_bit": 8}, r"weight_bit"),
    "a wrong literal": ({"scale": "log"}, r"log"),
    "bits out of range": ({"weight_bits": 1}, r"from 2 to 16"),
    "an unknown platform": ({"platform": "venusb"}, r"venusb"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_yaml_is_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = [{"class_path": "QuantizeCallback", "init_args": arguments}]
    config = with_callbacks(tmp_path, qualified(entry))
    with pytest.raises((SystemExit, ValueError)) as caught:
        cli(namespace_of("pytorch_lightning"), "fit", "--config", config)
    assert message.replace("\\", "") in str(caught.value) + capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("path", STACKS, ids=lambda path: path.stem)
def test_the_example_takes_every_stack(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(FOLDER.parent / "examples")
    example = importlib.import_module("cli")
    made = example.main(
        [
            "fit",
            *("--config", str(path), "--data.limit=128", "--trainer.logger=false"),
            *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        ]
    )
    assert instrumentation_of(made.model).switches.quantize
