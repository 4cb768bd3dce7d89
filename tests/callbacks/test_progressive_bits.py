"""Widths by schedule: what is in force when, and runs that resume with it."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

import lightning_linger as linger
from lightning_linger.callbacks import (
    AdaRoundCallback,
    CalibrateCallback,
    FuseBNCallback,
    IntegerValidatorCallback,
    ONNXExportCallback,
    ProgressiveBitsCallback,
    QuantizeCallback,
    RNGStateCallback,
)
from lightning_linger.core.errors import ConfigError
from tests.callbacks.boring import Classifier, loader, trainer
from tests.models import assert_integer_exact

EPOCHS = 4
SCHEDULE = {1: 8, 2: 6, 3: 4}


class Learned(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(linger.parameter_groups(self), lr=1e-2)


class Widths(pl.Callback):
    """Notes the widths that every epoch is trained with."""

    def __init__(self, site: str = "conv/conv2d/0") -> None:
        self.site = site
        self.seen: list[str] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        rows = {row.site: row.bits for row in linger.summary(pl_module)}
        self.seen.append(rows[self.site])


def fit(folder: Path, callbacks: list[Any], model: Any = None, **kwargs: Any) -> Any:
    pl.seed_everything(6, verbose=False)
    model = Classifier() if model is None else model
    ckpt = kwargs.pop("ckpt_path", None)
    run = trainer(folder, callbacks, **{"epochs": EPOCHS, **kwargs})
    run.fit(model, loader(), loader(1, shuffle=False), ckpt_path=ckpt)
    return model


def stages(**arguments: Any) -> list[Any]:
    return [FuseBNCallback(), QuantizeCallback(at_epoch=1, **arguments)]


def test_widths_follow_the_schedule_and_the_end_is_exported(tmp_path: Path) -> None:
    widths, fc = Widths(), Widths("fc/linear/0")
    validator = IntegerValidatorCallback()
    export = ONNXExportCallback(tmp_path / "model.onnx")
    overrides = {"fc": {"weight_bits": 5, "output_bits": None}}
    progressive = ProgressiveBitsCallback(SCHEDULE)
    callbacks = [*stages(weight_bits=7, overrides=overrides), progressive, widths, fc]
    model = fit(tmp_path, [*callbacks, validator, export])
    # Before the first epoch of the schedule the widths are the planned ones.
    assert widths.seen == ["7/8/8", "8/8/8", "6/6/6", "4/4/4"]
    assert fc.seen == ["5/8/float", "5/8/float", "5/6/float", "5/4/float"]
    assert sum(row.mismatches for row in validator.latest) == 0
    assert export.mismatches == 0
    images = next(iter(loader(1, shuffle=False)))[0]
    assert_integer_exact(model.eval(), images)


def test_widths_by_name_and_for_some_layers(tmp_path: Path) -> None:
    widths, stem = Widths(), Widths("stem/conv2d/0")
    schedule: Any = {0: {"weight_bits": 6}, 2: {"activation_bits": 5}, 3: {"weight_bits": 3}}
    fit(tmp_path, [*stages(), ProgressiveBitsCallback(schedule, modules=["conv"]), widths, stem])
    assert widths.seen == ["6/8/8", "6/8/8", "6/5/8", "3/5/8"]
    assert stem.seen == ["8/8/8"] * EPOCHS


def run(folder: Path, kind: str, ckpt: Path | None = None) -> dict[str, Tensor]:
    saver = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    quantize = stages(range=kind, weight_range="absmax" if kind == "ema_mse" else kind)
    callbacks = [*quantize, ProgressiveBitsCallback(SCHEDULE), RNGStateCallback(), saver]
    model = fit(folder, callbacks, Learned(), ckpt_path=ckpt, enable_checkpointing=True)
    return model.state_dict()


@pytest.mark.parametrize("kind", ["ema_mse", "lsq", "tqt"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    whole = run(tmp_path / "whole", kind)
    for epoch in range(EPOCHS - 1):
        resumed = run(tmp_path / str(epoch), kind, tmp_path / "whole" / f"epoch={epoch}.ckpt")
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), (epoch, name)


def test_a_checkpoint_tells_the_widths_in_force(tmp_path: Path) -> None:
    run(tmp_path, "lsq")
    for epoch, bits in ((0, "8/8/8"), (1, "8/8/8"), (2, "6/6/6"), (3, "4/4/4")):
        model = linger.load_checkpoint(Learned, tmp_path / f"epoch={epoch}.ckpt")
        rows = {row.site: row.bits for row in linger.summary(model)}
        assert rows["conv/conv2d/0"] == bits


def test_parameters_are_the_same_objects_from_beginning_to_end(tmp_path: Path) -> None:
    seen: set[tuple[int, ...]] = set()

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            learned = linger.learned_ranges(pl_module).values()
            groups = trainer.optimizers[0].param_groups
            trained = {id(parameter) for group in groups for parameter in group["params"]}
            assert trained >= {id(parameter) for parameter in learned}
            seen.add(tuple(id(parameter) for parameter in learned))

    fit(tmp_path, [*stages(range="lsq"), ProgressiveBitsCallback(SCHEDULE), Spy()], Learned())
    assert len(seen) == 1


@pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="needs Lightning 2.6")
def test_an_average_of_the_weights_has_the_same_widths(tmp_path: Path) -> None:
    average = pl.callbacks.EMAWeightAveraging(decay=0.5, use_buffers=False)
    seen: list[bool] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            twin = average._average_model.module
            rows = [[row.bits for row in linger.summary(m)] for m in (pl_module, twin)]
            seen.append(rows[0] == rows[1])

    fit(tmp_path, [*stages(), ProgressiveBitsCallback(SCHEDULE), average, Spy()])
    assert len(seen) == 3 * EPOCHS
    assert all(seen)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([ProgressiveBitsCallback({0: 4})], "add a QuantizeCallback"),
        ([CalibrateCallback(), ProgressiveBitsCallback({0: 4})], "add a QuantizeCallback"),
        (
            [QuantizeCallback(freeze_at_epoch=2), ProgressiveBitsCallback({0: 8, 2: 4})],
            "freeze at 3 or later",
        ),
        ([QuantizeCallback(), ProgressiveBitsCallback({0: 8, 4: 4})], "the last one is 3"),
        (
            [
                QuantizeCallback(),
                AdaRoundCallback(at_epoch=1),
                ProgressiveBitsCallback({0: 8, 2: 4}),
            ],
            r"AdaRoundCallback\(at_epoch=1\) learns.*learn in epoch 3 or later",
        ),
        (
            [QuantizeCallback(freeze_at_step=6), ProgressiveBitsCallback({0: 8, 2: 4})],
            r"freeze_at_step=6.*in epoch 2. HINT: freeze later",
        ),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, callbacks: list[Any], message: str) -> None:
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=message):
        fit(tmp_path, callbacks)


def test_layers_that_are_not_there_are_refused_before_training(tmp_path: Path) -> None:
    callback = ProgressiveBitsCallback({2: 4}, modules=["stam"])
    run = trainer(tmp_path, [QuantizeCallback(), callback], epochs=EPOCHS)
    with pytest.raises(ConfigError, match="'stam' matches no module"):
        run.fit(Classifier(), loader(), loader(1))
    assert run.global_step == 0


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({}, "`schedule` maps epochs"),
        ({-1: 8}, "`schedule` maps epochs"),
        ({"0": 8}, "`schedule` maps epochs"),
        ({0: 1}, "widths from 2 to 16. Found: 1"),
        ({0: True}, "widths from 2 to 16. Found: True"),
        ({0: {"bits": 4}}, r"`schedule` holds \['bits'\]"),
        ({0: {"output_bits": 32}}, "widths from 2 to 16. Found: {'output_bits': 32}"),
    ],
)
def test_a_wrong_schedule_is_refused(schedule: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProgressiveBitsCallback(schedule)
