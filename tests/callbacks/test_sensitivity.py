"""Sensitivities in a run: what is measured and shown, and runs that go on with what was chosen."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.analysis.sensitivity import read_sensitivities
from lightning_linger.callbacks import (
    CalibrateCallback,
    FuseBNCallback,
    IntegerValidatorCallback,
    QuantizeCallback,
    RNGStateCallback,
    SensitivityCallback,
)
from lightning_linger.core.errors import ConfigError
from tests.callbacks.boring import Classifier, fitted, loader, trainer
from tests.callbacks.test_dashboards import read_events

WEIGHTS = {"stem": 8 * 9, "conv": 8 * 8 * 9, "fc": 8 * 4}


def fit(folder: Path, callbacks: list[Any], model: Any = None, **kwargs: Any) -> Any:
    pl.seed_everything(6, verbose=False)
    model = Classifier() if model is None else model
    ckpt = kwargs.pop("ckpt_path", None)
    run = trainer(folder, callbacks, **{"epochs": 2, **kwargs})
    run.fit(model, loader(), loader(3, shuffle=False), ckpt_path=ckpt)
    return model


def test_rows_are_those_of_the_function_on_the_validation_data(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    callback = SensitivityCallback(bits=(2, 8), part="both", budget=sum(WEIGHTS.values()))
    quantize = QuantizeCallback(at_epoch=1, platform="onnxruntime")
    model = fit(tmp_path, [FuseBNCallback(), quantize, callback], logger=logger)
    batches = [x for x, _ in loader(3, shuffle=False)][:2]
    expected = linger.sensitivity(model.eval(), batches, bits=(2, 8), part="both")
    assert list(callback.rows) == list(expected)
    assert list(read_sensitivities(Path(logger.log_dir) / "sensitivity.csv")) == list(expected)
    chosen = json.loads((Path(logger.log_dir) / "mixed_precision.json").read_text())
    assert chosen == linger.choose_bits(model, expected, sum(WEIGHTS.values()))
    # The next run takes them as they are.
    again = fit(tmp_path, [QuantizeCallback(platform="onnxruntime", overrides=chosen)])
    rows = {row.site: row.bits for row in linger.summary(again)}
    assert rows["stem/conv2d/0"].startswith(f"{chosen['stem']['weight_bits']}/")


@pytest.mark.parametrize("metric", ["val_accuracy", "val_loss"])
def test_a_metric_of_the_user_by_name(tmp_path: Path, metric: str) -> None:
    class Logging(Classifier):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("val_loss", self.criterion(self(batch[0]), batch[1]))

    callback = SensitivityCallback(
        bits=(2,), metric=metric, higher_is_better=metric == "val_accuracy", modules=["fc"]
    )
    model = fit(tmp_path, [QuantizeCallback(at_epoch=1), callback], Logging())
    batches = [x for x, _ in loader(3, shuffle=False)][:2]
    data = list(loader(3, shuffle=False))

    def value(module: nn.Module, _: Any) -> float:
        logits = torch.cat([module(x) for x, _ in data])
        labels = torch.cat([y for _, y in data])
        if metric == "val_loss":
            return -float(nn.functional.cross_entropy(logits, labels))
        return float((logits.argmax(1) == labels).float().mean())

    expected = linger.sensitivity(model.eval(), batches, value, bits=(2,), modules=["fc"])
    assert callback.rows[0].drop == pytest.approx(expected[0].drop, abs=1e-6)


def test_no_bit_changes_because_it_is_measured(tmp_path: Path) -> None:
    stages = [FuseBNCallback(), QuantizeCallback(at_epoch=1, range="ema_mse")]
    plain = fitted(tmp_path, stages)
    measuring = [SensitivityCallback(at_epoch=epoch) for epoch in (0, 2)]
    measured = fitted(tmp_path, [*stages, *measuring, SensitivityCallback(metric="val_accuracy")])
    assert torch.equal(torch.stack(plain.losses), torch.stack(measured.losses))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, measured.state_dict()[name]), name


class Parts(Classifier):
    """Lightning's own template, with an operation in between."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(36, 8))
        self.decoder = nn.Linear(8, 4)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.criterion(self.decoder(self.encoder(batch[0]) * 2), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_a_step_of_several_calls_is_measured_to_its_end(tmp_path: Path) -> None:
    callback = SensitivityCallback(bits=(2, 8))
    fit(tmp_path, [QuantizeCallback(at_epoch=1), callback], Parts())
    drops = {(row.site, row.bits): row.drop for row in callback.rows}
    assert set(drops) == {(s, b) for s in ("encoder.1", "decoder") for b in (2, 8)}
    assert all(drops[site, 2] > drops[site, 8] for site in ("encoder.1", "decoder"))


def test_tensorboard_shows_a_picture_and_a_table(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit(tmp_path, [QuantizeCallback(), SensitivityCallback(budget=500)], logger=logger)
    events = read_events(Path(logger.log_dir))
    (text,) = events.Tensors("sensitivity/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert "| layer | 2 bits | 4 bits | 8 bits | suggested |" in table
    assert "under the budget" in table
    assert "| `conv` |" in table
    if importlib.util.find_spec("matplotlib") is not None:
        assert len(events.Images("sensitivity")) == 1


def run(folder: Path, ckpt: Path | None = None) -> tuple[Any, dict[str, Tensor]]:
    saver = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    chooser = SensitivityCallback(at_epoch=1, budget=300, apply=True)
    validator = IntegerValidatorCallback()
    callbacks = [FuseBNCallback(), QuantizeCallback(at_epoch=1), chooser, validator]
    model = fit(
        folder,
        [*callbacks, RNGStateCallback(), saver],
        epochs=3,
        ckpt_path=ckpt,
        enable_checkpointing=True,
    )
    assert sum(row.mismatches for row in validator.latest) == 0
    return model, model.state_dict()


def test_mixed_precision_within_one_run_and_when_it_is_resumed(tmp_path: Path) -> None:
    model, whole = run(tmp_path / "whole")
    rows = {row.site.partition("/")[0]: row.bits for row in linger.summary(model)}
    widths = {layer: int(rows[layer].partition("/")[0]) for layer in WEIGHTS}
    assert sum(WEIGHTS[layer] * bits for layer, bits in widths.items()) <= 8 * 300
    assert len(set(widths.values())) > 1
    for epoch in (0, 1):
        _, resumed = run(tmp_path / f"from-{epoch}", tmp_path / "whole" / f"epoch={epoch}.ckpt")
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), (epoch, name)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([SensitivityCallback()], "add a QuantizeCallback"),
        (
            [CalibrateCallback(), SensitivityCallback(at_epoch=0, budget=1e9, apply=True)],
            "add a QuantizeCallback",
        ),
        (
            [
                QuantizeCallback(freeze_at_epoch=1),
                SensitivityCallback(at_epoch=1, budget=1e9, apply=True),
            ],
            "freeze later",
        ),
        ([QuantizeCallback(), SensitivityCallback(metric="val_f1")], "finds no such metric"),
        ([QuantizeCallback(), SensitivityCallback(at_epoch=2)], "the last one is 1"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, callbacks: list[Any], message: str) -> None:
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=message):
        fit(tmp_path, callbacks)


@pytest.mark.parametrize("at_epoch", [None, 1])
def test_a_run_without_validation_data_is_refused(tmp_path: Path, at_epoch: int | None) -> None:
    callback = SensitivityCallback(at_epoch=at_epoch)
    run = trainer(tmp_path, [QuantizeCallback(), callback], limit_val_batches=0)
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="validation data"):
        run.fit(Classifier(), loader(), loader(1))
    assert run.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 10}, "`budget` of 10 bytes of weights cannot be kept"),
        ({"modules": ["stam"]}, "'stam' matches no module"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_training(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    callback = SensitivityCallback(at_epoch=1, **arguments)
    run = trainer(tmp_path, [QuantizeCallback(), callback])
    with pytest.raises(ConfigError, match=message):
        run.fit(Classifier(), loader(), loader(1))
    assert run.global_step == 0


def test_a_second_run_measures_again(tmp_path: Path) -> None:
    callback = SensitivityCallback(at_epoch=1)
    tables = []
    for seed in range(2):
        torch.manual_seed(seed)
        trainer(tmp_path, [QuantizeCallback(), callback]).fit(Classifier(), loader(), loader(1))
        tables.append(list(callback.rows))
    assert tables[0] != tables[1]
    resumed = SensitivityCallback(at_epoch=1)
    resumed.load_state_dict(callback.state_dict())
    assert resumed.state_dict() == callback.state_dict() == {"measured_at": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 0}, "`batches` must be a positive integer"),
        ({"cost": "bytes"}, "`cost` must be one of"),
        ({"apply": True}, "`apply` trains on with the widths"),
        ({"apply": True, "budget": 5}, "pass `budget` and `at_epoch`"),
        ({"bits": (1, 4)}, "`bits` holds integers from 2 to 16"),
        ({"mode": "each"}, "`mode` must be one of"),
        ({"part": "weight"}, "`part` must be one of"),
        ({"budget": float("nan")}, "`budget` must be a positive number. Found: nan"),
        ({"at_epoch": -1}, "`at_epoch` must be a non-negative integer"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SensitivityCallback(**arguments)
