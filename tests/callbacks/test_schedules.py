"""When stages start, end and freeze, in which order, and what else changes then."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_linger.callbacks import (
    FuseBNCallback,
    NormalizeCallback,
    OnPlateau,
    QuantizeCallback,
    RNGStateCallback,
    StageSwitchCallback,
)
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.stages.freeze import is_frozen
from tests.callbacks.boring import Classifier, loader, trainer
from tests.callbacks.test_resume import SCHEDULERS, Trained, run, unequal

STEPS = 3


def fit(folder: Path, callbacks: list[Any], model: Any = None, **kwargs: Any) -> Any:
    pl.seed_everything(8, verbose=False)
    model = model or Classifier()
    fit = trainer(folder, callbacks, **{"epochs": 4, **kwargs})
    fit.fit(model, loader(STEPS), loader(1))
    return model


def always(trainer: Any, module: Any) -> bool:
    return True


ORDERS: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "epochs": (
        lambda: [NormalizeCallback(at_epoch=3), QuantizeCallback(at_epoch=1)],
        r"NormalizeCallback\(at_epoch=3\) cannot start after QuantizeCallback\(at_epoch=1\).*at_ep",
    ),
    "steps": (
        lambda: [FuseBNCallback(at_step=5), QuantizeCallback(at_step=4)],
        r"FuseBNCallback\(at_step=5\) cannot start after.*at_step=4 or earlier",
    ),
    "a step after an epoch": (
        lambda: [FuseBNCallback(at_step=7), QuantizeCallback(at_epoch=2)],
        r"cannot start after QuantizeCallback\(at_epoch=2\).*step 6 \(an epoch has 3 steps\)",
    ),
    "an epoch after a step": (
        lambda: [NormalizeCallback(at_epoch=1), QuantizeCallback(at_step=2)],
        r"NormalizeCallback\(at_epoch=1\) cannot start after.*step 2",
    ),
    "a condition before an epoch": (
        lambda: [NormalizeCallback(when=always), QuantizeCallback(at_epoch=2)],
        r"QuantizeCallback\(at_epoch=2\) may start before NormalizeCallback.*HINT.*`when` too",
    ),
    "folding that ends too early": (
        lambda: [FuseBNCallback(end_epoch=3), QuantizeCallback(at_epoch=1)],
        r"FuseBNCallback\(end_epoch=3\) ends while QuantizeCallback\(at_epoch=1\) is on.*HINT",
    ),
}


@pytest.mark.parametrize(("make", "message"), ORDERS.values(), ids=ORDERS)
def test_the_order_is_checked_before_training(
    tmp_path: Path, make: Callable[[], list[Any]], message: str
) -> None:
    model = Classifier()
    before = model.fc.weight.clone()
    with pytest.raises(Exception, match=f"(?s){message}"):
        fit(tmp_path, make(), model)
    assert torch.equal(model.fc.weight, before)


def test_orders_that_are_right_pass(tmp_path: Path) -> None:
    right = [
        [FuseBNCallback(at_step=3), NormalizeCallback(at_epoch=1), QuantizeCallback(at_step=4)],
        [FuseBNCallback(end_epoch=2), QuantizeCallback(at_epoch=1, end_epoch=2)],
        [NormalizeCallback(end_epoch=1), QuantizeCallback(at_epoch=2)],
        [FuseBNCallback(), QuantizeCallback(when=always)],
    ]
    for callbacks in right:
        fit(tmp_path, callbacks)


def test_steps_are_counted_as_the_optimizer_takes_them(tmp_path: Path) -> None:
    """With two batches per step an epoch of three batches has two steps."""
    with pytest.raises(Exception, match=r"an epoch has 2 steps"):
        fit(
            tmp_path,
            [FuseBNCallback(at_step=3), QuantizeCallback(at_epoch=1)],
            accumulate_grad_batches=2,
        )


class Ranges(pl.Callback):
    """Notes all ranges, and dynamic limits, at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        state = pl_module.state_dict()
        names = (".range", "output_bound")
        self.seen.append({k: v.clone() for k, v in state.items() if k.endswith(names)})


def test_frozen_ranges_stand_still(tmp_path: Path) -> None:
    ranges = Ranges()
    stages = [
        NormalizeCallback(output="99%"),
        QuantizeCallback(at_epoch=1, freeze_at_epoch=2),
        ranges,
    ]
    model = fit(tmp_path, stages)
    first, second, third, fourth = ranges.seen
    assert any("output_bound" in key for key in first)
    assert all(not torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(second[key], third[key]) for key in first)
    assert all(torch.equal(third[key], fourth[key]) for key in first)
    assert is_frozen(model)


def test_freezing_before_anything_was_seen_is_refused() -> None:
    with pytest.raises(ValueError, match=r"freeze_at_epoch.*\(3\) must come after.*\(3\)"):
        QuantizeCallback(at_epoch=3, freeze_at_epoch=3)
    with pytest.raises(ValueError, match=r"no range would be seen"):
        QuantizeCallback(freeze_at_epoch=0)


def test_a_frozen_run_resumes_frozen(tmp_path: Path) -> None:
    """In the middle of an epoch too, where no epoch starts."""

    def callbacks() -> list[Any]:
        return [FuseBNCallback(), QuantizeCallback(at_epoch=1, freeze_at_epoch=2)]

    whole = run(tmp_path, "whole", callbacks=callbacks)
    resumed = run(tmp_path, "resumed", whole / "epoch=2.ckpt", callbacks=callbacks)
    assert not unequal(resumed / "final.ckpt", whole / "final.ckpt")
    steps = run(tmp_path, "steps", callbacks=callbacks, every_n_steps=1)
    ranges = Ranges()
    checkpoint = steps / f"step={2 * STEPS + 1}.ckpt"
    run(tmp_path, "middle", checkpoint, callbacks=lambda: [*callbacks(), ranges])
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[key]) for key, value in ranges.seen[-1].items())


class Told(Classifier):
    """Logs a validation loss that is told in advance."""

    told = (0.9, 0.5, 0.5, 0.49, 0.6, 0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        self.log("val_loss", self.told[self.current_epoch])


class Epochs(pl.Callback):
    """Notes in which epochs quantization is on."""

    def __init__(self) -> None:
        self.on: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.is_last_batch:
            self.on.append(instrumentation_of(pl_module).switches.quantize)


def test_a_stage_starts_when_a_metric_rests(tmp_path: Path) -> None:
    epochs = Epochs()
    condition = OnPlateau("val_loss", patience=2, min_delta=0.05)
    fit(tmp_path, [QuantizeCallback(when=condition), epochs], Told(), epochs=6)
    # 0.5 in epoch 1 is the last real improvement: epochs 2 and 3 are waited for.
    assert epochs.on == [False] * 4 + [True] * 2


def test_a_condition_remembers_through_a_checkpoint(tmp_path: Path) -> None:
    def go(name: str, ckpt: Path | None = None) -> Any:
        epochs = Epochs()
        condition = OnPlateau("val_loss", patience=2, min_delta=0.05)
        saver = pl.callbacks.ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1)
        callbacks = [QuantizeCallback(when=condition), RNGStateCallback(), saver, epochs]
        pl.seed_everything(3, verbose=False)
        model = Told()
        options = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
        trainer(tmp_path, callbacks, 6, **options).fit(
            model, loader(STEPS), loader(1), ckpt_path=ckpt
        )
        return model.state_dict(), epochs.on

    whole, on = go("whole")
    for epoch in range(5):
        state, later = go(f"from-{epoch}", tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert later == on[epoch + 1 :], epoch
        assert [key for key in whole if not torch.equal(whole[key], state[key])] == [], epoch


def test_a_larger_metric_may_be_better() -> None:
    class Run:
        current_epoch = 1

    condition = OnPlateau("accuracy", patience=1, mode="max")
    answers = []
    for value in (0.1, 0.3, 0.2):
        Run.callback_metrics = {"accuracy": torch.tensor(value)}
        answers.append(condition(Run, None))
    assert answers == [False, False, True]


def test_a_condition_names_a_metric_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"'val_los'.*Logged are.*'val_loss'.*HINT"):
        fit(tmp_path, [QuantizeCallback(when=OnPlateau("val_los"))], Told())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"patience": 0}, "patience.*positive.*0"), ({"mode": "low"}, "mode.*'min' or 'max'.*low")],
)
def test_arguments_of_a_condition(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnPlateau("val_loss", **arguments)


def test_a_stage_with_a_condition_waits_for_those_before_it(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    class Spy(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            switches = instrumentation_of(pl_module).switches
            seen.append((switches.fuse, switches.quantize))

    def later(trainer: Any, module: Any) -> bool:
        return trainer.current_epoch >= 2

    fit(tmp_path, [FuseBNCallback(when=later), QuantizeCallback(when=always), Spy()])
    assert seen == [(False, False), (False, False), (True, True), (True, True)]


class Rates(pl.Callback):
    """Notes the learning rates that each step is taken with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_learning_rate_drops_at_the_switch(tmp_path: Path, scheduler: str) -> None:
    """Against the same schedule without a drop: a tenth from the switch on."""

    def rates(factor: float) -> list[float]:
        seen = Rates()
        switch = StageSwitchCallback(learning_rate_factor=factor)
        stages = [FuseBNCallback(), QuantizeCallback(at_epoch=2), switch, seen]
        fit(tmp_path, stages, Trained("sgd", scheduler))
        return seen.seen

    plain, dropped = rates(1.0), rates(0.1)
    assert dropped[: 2 * STEPS] == plain[: 2 * STEPS]
    assert dropped[2 * STEPS :] == pytest.approx([0.1 * x for x in plain[2 * STEPS :]])


@pytest.mark.parametrize("scheduler", ["lambda", "one cycle", "plateau"])
def test_the_drop_resumes_to_the_same_bits(tmp_path: Path, scheduler: str) -> None:
    def callbacks() -> list[Any]:
        switch = StageSwitchCallback(learning_rate_factor=0.1)
        return [FuseBNCallback(), QuantizeCallback(at_epoch=2), switch]

    options = {"callbacks": callbacks, "model": lambda: Trained("adamw", scheduler)}
    whole = run(tmp_path, "whole", **options)
    for epoch in range(3):
        resumed = run(tmp_path, f"from-{epoch}", whole / f"epoch={epoch}.ckpt", **options)
        assert not unequal(resumed / "final.ckpt", whole / "final.ckpt"), epoch


def test_a_stage_from_the_first_step_on_drops_nothing(tmp_path: Path) -> None:
    seen = Rates()
    fit(tmp_path, [QuantizeCallback(), StageSwitchCallback(learning_rate_factor=0.1), seen])
    assert set(seen.seen) == {1e-2}


@pytest.mark.parametrize(("reset", "epochs"), [(False, 4), (True, 6)])
def test_patience_starts_anew(tmp_path: Path, reset: bool, epochs: int) -> None:
    """The metric of the quantized model is worse: with the old best it stops after two epochs."""

    class Worse(Told):
        told = (0.5, 0.4, 0.9, 0.8, 0.7, 0.6)

    stopping = pl.callbacks.EarlyStopping("val_loss", patience=2)
    switch = StageSwitchCallback(reset_patience=reset)
    seen = Epochs()
    stages = [QuantizeCallback(at_epoch=2), switch, stopping, seen]
    fit(tmp_path, stages, Worse(), epochs=6, min_epochs=3)
    assert len(seen.on) == epochs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "quantise"}, "stage.*'quantize'.*quantise"),
        ({"learning_rate_factor": 0.0}, "learning_rate_factor.*positive.*0.0"),
        ({"learning_rate_factor": math.inf}, "learning_rate_factor.*positive.*inf"),
    ],
)
def test_arguments_of_a_switch(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageSwitchCallback(**arguments)
