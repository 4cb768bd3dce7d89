"""Lightning's own callbacks beside the stages: each works, or is refused with a reason."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

import lightning_linger as linger
from lightning_linger.callbacks import (
    FuseBNCallback,
    NormalizeCallback,
    QuantizeCallback,
    RNGStateCallback,
    StageModelCheckpoint,
    StageSwitchCallback,
)
from lightning_linger.core.instrumentation import instrumentation_of
from tests.callbacks.boring import loader, trainer
from tests.callbacks.test_entry_points import Tested, assert_integer_exact, outputs

lightning = pl.callbacks
EPOCHS = 4

needs_averaging = pytest.mark.skipif(
    not hasattr(lightning, "EMAWeightAveraging"), reason="needs Lightning 2.6"
)


class Thawing(lightning.BaseFinetuning):
    """Freezes the stem for one epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.stem)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.stem, optimizer, lr=0.01)


class Frozen(Tested):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)


def stages(at_epoch: int = 2) -> list[Any]:
    return [FuseBNCallback(), NormalizeCallback(), QuantizeCallback(at_epoch=at_epoch)]


def fit(folder: Path, callbacks: list[Any], model: Any = None, **kwargs: Any) -> Any:
    pl.seed_everything(6, verbose=False)
    model = model or Tested()
    options = {"epochs": EPOCHS, "enable_checkpointing": True, **kwargs}
    ckpt = options.pop("ckpt_path", None)
    run = trainer(folder, callbacks, **options)
    run.fit(model, loader(), loader(2, shuffle=False), ckpt_path=ckpt)
    return model


COMPANY: dict[str, Any] = {
    "ModelPruning": (lambda: lightning.ModelPruning("l1_unstructured", amount=0.3), {}),
    "StochasticWeightAveraging": pytest.param(
        lambda: lightning.StochasticWeightAveraging(0.01, swa_epoch_start=1),
        {},
        # Earlier releases save functions, which are not loaded from a checkpoint.
        marks=needs_averaging,
    ),
    "BaseFinetuning": (Thawing, {"model": Frozen}),
    "EarlyStopping": (lambda: lightning.EarlyStopping("val_loss", patience=9), {}),
    "ModelCheckpoint": (lambda: lightning.ModelCheckpoint(monitor="val_loss"), {}),
    "LearningRateMonitor": (lightning.LearningRateMonitor, {"logger": True}),
    "GradientAccumulationScheduler": (
        lambda: lightning.GradientAccumulationScheduler({0: 1, 1: 2}),
        {},
    ),
    "RichProgressBar": (lightning.RichProgressBar, {"enable_progress_bar": True}),
    "ModelSummary": (lambda: lightning.ModelSummary(-1), {"enable_model_summary": True}),
    "RichModelSummary": (lambda: lightning.RichModelSummary(2), {"enable_model_summary": True}),
    "LambdaCallback": (lambda: lightning.LambdaCallback(on_train_start=lambda *_: None), {}),
    "EMAWeightAveraging": pytest.param(
        lambda: lightning.EMAWeightAveraging(decay=0.5, use_buffers=False),
        {},
        marks=needs_averaging,
    ),
}


@pytest.mark.parametrize(("make", "options"), COMPANY.values(), ids=COMPANY)
@pytest.mark.parametrize("at_epoch", [0, 2])
@pytest.mark.filterwarnings("ignore:EarlyStopping may end")
def test_in_company(
    tmp_path: Path, make: Callable[[], Any], options: dict[str, Any], at_epoch: int
) -> None:
    """Training ends with integers equal to fake-quant, and the checkpoint holds that model."""
    options = dict(options)
    model = options.pop("model", Tested)()
    saver = lightning.ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1)
    fit(tmp_path, [*stages(at_epoch), make(), saver], model, **options)
    assert instrumentation_of(model).switches.quantize
    assert_integer_exact(model)
    saved = linger.load_checkpoint(type(model), tmp_path / "saved" / f"epoch={EPOCHS - 1}.ckpt")
    assert instrumentation_of(saved).switches.quantize
    assert_integer_exact(saved)


def test_pruned_weights_stay_zero_in_the_integer_model(tmp_path: Path) -> None:
    pruning = lightning.ModelPruning("l1_unstructured", amount=0.5)
    model = fit(tmp_path, [*stages(), pruning])
    assert (model.conv.weight == 0).float().mean() > 0.3


@needs_averaging
def test_an_average_of_the_weights_is_evaluated_quantized(tmp_path: Path) -> None:
    """Its copy of the model follows the switches, and takes the ranges of the model."""
    average = lightning.EMAWeightAveraging(decay=0.5, use_buffers=False)
    saver = lightning.ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1)
    model = fit(tmp_path, [*stages(), average, saver])
    path = tmp_path / "saved" / f"epoch={EPOCHS - 1}.ckpt"
    averaged = linger.load_checkpoint(Tested, path)
    live = torch.load(path, weights_only=True)["current_model_state"]
    state = averaged.state_dict()
    ranges = [key for key in live if key.endswith(".range")]
    assert ranges
    assert all(torch.equal(state[key], live[key]) for key in ranges)
    assert not torch.equal(state["fc.weight"], live["fc.weight"])
    # At the end of fit the model takes the averaged weights itself.
    assert torch.equal(outputs(model), outputs(averaged))


@pytest.mark.parametrize(
    "make",
    [
        lambda: lightning.StochasticWeightAveraging(0.01, swa_epoch_start=1),
        pytest.param(
            lambda: lightning.EMAWeightAveraging(decay=0.5, use_buffers=False),
            marks=needs_averaging,
        ),
        lambda: lightning.EarlyStopping("val_loss", patience=9),
        lambda: lightning.GradientAccumulationScheduler({0: 1, 1: 2}),
    ],
    ids=["SWA", "EMA", "EarlyStopping", "accumulation"],
)
@pytest.mark.filterwarnings("ignore:EarlyStopping may end")
def test_resuming_in_company_is_exact(tmp_path: Path, make: Callable[[], Any]) -> None:
    def run(name: str, ckpt_path: Path | None = None) -> dict[str, Tensor]:
        saver = lightning.ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1)
        callbacks = [*stages(), make(), RNGStateCallback(), saver]
        return fit(tmp_path, callbacks, ckpt_path=ckpt_path).state_dict()

    whole = run("whole")
    for epoch in (0, 1, 2):
        resumed = run(f"from-{epoch}", tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == [], epoch


REFUSED: dict[str, Any] = {
    "an average that is listed first": pytest.param(
        lambda: [lightning.EMAWeightAveraging(use_buffers=False), *stages()],
        r"EMAWeightAveraging copies the model before.*HINT.*after the stage callbacks",
        marks=needs_averaging,
    ),
    "an average of ranges": pytest.param(
        lambda: [*stages(), lightning.EMAWeightAveraging()],
        r"EMAWeightAveraging averages buffers.*use_buffers=False",
        marks=needs_averaging,
    ),
    "a switch that is listed first": (
        lambda: [StageSwitchCallback(), *stages()],
        r"follows no callback of that stage.*HINT.*after the stage callbacks",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused(
    tmp_path: Path, make: Callable[[], list[Any]], message: str
) -> None:
    with pytest.raises(Exception, match=f"(?s){message}"):
        fit(tmp_path, make())


def test_early_stopping_before_the_last_stage_is_warned_about(tmp_path: Path) -> None:
    stopping = lightning.EarlyStopping("val_loss", patience=9)
    with pytest.warns(linger.QuantizationWarning, match=r"epoch 2.*min_epochs=3"):
        fit(tmp_path, [*stages(), stopping])
    with warnings.catch_warnings():
        warnings.simplefilter("error", linger.QuantizationWarning)
        fit(tmp_path, [*stages(), lightning.EarlyStopping("val_loss", patience=9)], min_epochs=3)


class Scripted(Tested):
    """Logs a validation loss that is told in advance."""

    told = (0.1, 0.2, 0.9, 0.8, 0.85)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])
        self.log("val_loss", self.told[self.current_epoch])


def best_of_stages(folder: Path, ckpt_path: Path | None = None) -> StageModelCheckpoint:
    saver = StageModelCheckpoint(dirpath=folder, monitor="val_loss", filename="{epoch}")
    last = lightning.ModelCheckpoint(folder / "all", "{epoch}", save_top_k=-1)
    fit(folder, [*stages(), saver, last], Scripted(), epochs=5, ckpt_path=ckpt_path)
    return saver


def test_each_stage_keeps_its_best_checkpoint(tmp_path: Path) -> None:
    saver = best_of_stages(tmp_path)
    expected = {
        "normalize": str(tmp_path / "normalize-epoch=0.ckpt"),
        "quantize": str(tmp_path / "quantize-epoch=3.ckpt"),
    }
    assert saver.best_by_stage == expected
    assert saver.best_model_path == expected["quantize"]
    assert float(saver.best_model_score) == pytest.approx(0.8)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [
        "normalize-epoch=0.ckpt",
        "quantize-epoch=3.ckpt",
    ]
    best = linger.load_checkpoint(Scripted, saver.best_model_path)
    assert instrumentation_of(best).switches.quantize


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_the_bests_of_stages_survive_a_resume(tmp_path: Path, epoch: int) -> None:
    first = best_of_stages(tmp_path)
    if epoch < 3:
        Path(first.best_model_path).unlink()
    again = best_of_stages(tmp_path, tmp_path / "all" / f"epoch={epoch}.ckpt")
    assert again.best_by_stage == first.best_by_stage
    assert again.best_model_path == first.best_model_path


def test_plain_lightning_would_take_the_float_model(tmp_path: Path) -> None:
    saver = lightning.ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss")
    fit(tmp_path, [*stages(), saver], Scripted(), epochs=5)
    best = linger.load_checkpoint(Scripted, saver.best_model_path)
    assert not instrumentation_of(best).switches.quantize


def test_best_is_that_of_the_latest_stage(tmp_path: Path) -> None:
    saver = StageModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
    run = trainer(tmp_path, [*stages(), saver], 5, enable_checkpointing=True)
    pl.seed_everything(6, verbose=False)
    run.fit(Scripted(), loader(), loader(2, shuffle=False))
    fresh = Scripted()
    other = trainer(tmp_path, stages())
    other.predict(fresh, loader(1), ckpt_path=saver.best_model_path)
    assert instrumentation_of(fresh).switches.quantize
    run.test(ckpt_path="best", dataloaders=loader(1), verbose=False)


def test_the_progress_of_a_run_without_stages(tmp_path: Path) -> None:
    saver = StageModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
    fit(tmp_path, [saver], epochs=1)
    assert list(saver.best_by_stage) == ["float"]
