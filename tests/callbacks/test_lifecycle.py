"""The stage callbacks in a Trainer: what they change, when, and what they leave alone."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.callbacks import (
    FuseBNCallback,
    IntegerValidatorCallback,
    NormalizeCallback,
    QuantErrorCallback,
    QuantizeCallback,
)
from lightning_linger.core.instrumentation import STATE_PREFIX, instrumentation_of
from tests.callbacks.boring import Classifier, fitted, loader, trainer

LATER = 1000


class Spy(pl.Callback):
    """Notes which stages are on in each epoch."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool, bool]] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        switches = instrumentation_of(pl_module).switches
        self.seen.append((switches.fuse, switches.normalize, switches.quantize))


def all_stages(at_epoch: int = 0) -> list[Any]:
    return [
        FuseBNCallback(at_epoch=at_epoch),
        NormalizeCallback(at_epoch=at_epoch, weight=8.0, bias=8.0, output=8.0),
        QuantizeCallback(at_epoch=at_epoch),
    ]


def test_stages_that_are_off_change_no_bit(tmp_path: Path) -> None:
    plain = fitted(tmp_path, [])
    waiting = [*all_stages(LATER), IntegerValidatorCallback(), QuantErrorCallback()]
    instrumented = fitted(tmp_path, waiting)
    assert torch.equal(torch.stack(plain.losses), torch.stack(instrumented.losses))
    state = instrumented.state_dict()
    own = {key: value for key, value in state.items() if not key.startswith(STATE_PREFIX)}
    assert list(own) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, own[key]), key


def test_stages_that_are_on_do_change_training(tmp_path: Path) -> None:
    plain, quantized = fitted(tmp_path, []), fitted(tmp_path, all_stages())
    assert not torch.equal(torch.stack(plain.losses), torch.stack(quantized.losses))


def test_each_stage_switches_at_its_epoch(tmp_path: Path) -> None:
    spy = Spy()
    stages = [
        FuseBNCallback(at_epoch=1),
        NormalizeCallback(at_epoch=1, end_epoch=3),
        QuantizeCallback(at_epoch=2),
        spy,
    ]
    fitted(tmp_path, stages, epochs=4)
    assert spy.seen[::3] == [
        (False, False, False),
        (True, True, False),
        (True, True, True),
        (True, False, True),
    ]


def test_a_stage_may_start_at_a_step_or_on_a_condition(tmp_path: Path) -> None:
    spy = Spy()
    calls: list[int] = []

    def when(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        calls.append(trainer.current_epoch)
        return trainer.current_epoch == 1

    fitted(tmp_path, [FuseBNCallback(at_step=2), QuantizeCallback(when=when), spy], epochs=3)
    assert [fuse for fuse, _, _ in spy.seen] == [False] * 2 + [True] * 7
    assert [quantize for _, _, quantize in spy.seen] == [False] * 3 + [True] * 6
    assert calls == [1], "asked once folding is on; what held once is not asked again"


def test_fast_dev_run_exercises_every_stage(tmp_path: Path) -> None:
    spy = Spy()
    model = Classifier()
    run = trainer(tmp_path, [*all_stages(LATER), spy], fast_dev_run=True)
    run.fit(model, loader(), loader())
    assert spy.seen == [(True, True, True)]


def test_freezing_statistics_from_an_epoch_on(tmp_path: Path) -> None:
    means: list[Tensor] = []

    class Means(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            means.append(pl_module.bn.running_mean.clone())

    fitted(tmp_path, [FuseBNCallback(freeze_at_epoch=1), Means()], epochs=3)
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[1], means[2])


def test_ranges_move_in_training_steps_only(tmp_path: Path) -> None:
    model = fitted(tmp_path, all_stages(), epochs=1)
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(STATE_PREFIX)}
    run = trainer(tmp_path, all_stages())
    run.validate(model, loader(), verbose=False)
    run.predict(model, loader())
    for key, value in before.items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_sanity_check_runs_float_before_any_range_is_known(tmp_path: Path) -> None:
    model = fitted(tmp_path, all_stages(), epochs=1, num_sanity_val_steps=2)
    assert instrumentation_of(model).switches.quantize


def test_losses_and_metrics_stay_outside(tmp_path: Path) -> None:
    model = fitted(tmp_path, all_stages(), epochs=1)
    owners = {site.node.owner for site in instrumentation_of(model).sites}
    assert "criterion" not in owners
    assert "accuracy" not in owners


def test_discovery_leaves_metrics_logs_and_randomness_alone(tmp_path: Path) -> None:
    class Counting(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.logged = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.accuracy.update(self(batch[0]), batch[1])
            return super().training_step(batch, batch_idx)

        def on_fit_start(self) -> None:
            self.updates_at_start = self.accuracy._update_count
            self.correct_at_start = self.accuracy.tp.clone()
            self.statistics_at_start = self.bn.running_mean.clone()

    pl.seed_everything(0, verbose=False)
    model = Counting()
    trainer(tmp_path, all_stages(), epochs=1).fit(model, loader())
    assert model.updates_at_start == 0
    assert not model.correct_at_start.any()
    assert torch.equal(model.statistics_at_start, torch.zeros(8))


def test_sites_come_from_the_example_input_array_if_there_is_one(tmp_path: Path) -> None:
    model = Classifier()
    model.example_input_array = torch.zeros(1, 1, 6, 6)
    run = trainer(tmp_path, all_stages(), epochs=1)
    run.fit(model, (batch for batch in loader()))
    assert len(instrumentation_of(model).sites) == 9


def test_a_step_that_calls_parts_of_the_model(tmp_path: Path) -> None:
    class Parts(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
            self.decoder = nn.Linear(64, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.decoder(self.encoder(batch[0])), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    model = Parts()
    trainer(tmp_path, [QuantizeCallback()], epochs=1).fit(model, loader())
    keys = [site.key for site in instrumentation_of(model).sites if site.quantized]
    assert keys == ["encoder.0/conv2d/0", "encoder.1/relu/0", "decoder/linear/0"]
    model.eval()
    x = next(iter(loader()))[0]
    with torch.no_grad():
        fake = model.decoder(model.encoder(x))
        with linger.integer(model):
            assert torch.equal(model.decoder(model.encoder(x)), fake)


def test_integer_equals_fake_quant_after_training(tmp_path: Path) -> None:
    model = fitted(tmp_path, all_stages()).eval()
    x = next(iter(loader()))[0]
    with torch.no_grad():
        fake = model(x)
        with linger.integer(model):
            assert torch.equal(model(x), fake)


def test_a_second_fit_continues(tmp_path: Path) -> None:
    model = fitted(tmp_path, all_stages(), epochs=1)
    trainer(tmp_path, all_stages(), epochs=1).fit(model, loader())
    assert instrumentation_of(model).switches.quantize


def test_a_second_fit_with_other_arguments_is_refused(tmp_path: Path) -> None:
    model = fitted(tmp_path, all_stages(), epochs=1)
    other = [FuseBNCallback(), QuantizeCallback(weight_bits=4)]
    with pytest.raises(Exception, match=r"other arguments.*linger.strip"):
        trainer(tmp_path, other, epochs=1).fit(model, loader())


def test_checkpoint_restores_stage_and_scales(tmp_path: Path) -> None:
    pl.seed_everything(1, verbose=False)
    model = Classifier()
    run = trainer(tmp_path, all_stages(), epochs=1)
    run.fit(model, loader())
    path = tmp_path / "model.ckpt"
    run.save_checkpoint(path)
    x = next(iter(loader()))[0]
    expected = model.eval()(x)
    assert torch.load(path, weights_only=True)["state_dict"]
    fresh = Classifier()
    trainer(tmp_path, all_stages()).validate(fresh, loader(), ckpt_path=path, verbose=False)
    assert torch.equal(fresh.eval()(x), expected)


def test_float_checkpoint_loads_into_every_stage(tmp_path: Path) -> None:
    plain = fitted(tmp_path, [], epochs=1)
    model = fitted(tmp_path, all_stages(), epochs=1)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.stem.weight, plain.stem.weight)


def test_bf16_mixed_precision_trains_on_the_grid(tmp_path: Path) -> None:
    model = fitted(tmp_path, all_stages(), epochs=1, precision="bf16-mixed").eval()
    x = next(iter(loader()))[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fake = model(x)
    with torch.no_grad(), linger.integer(model):
        assert torch.equal(model(x), fake.float())


def test_the_unified_namespace_works_too(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    # `lightning` is imported in the test, so a type checker does not know the class.
    class Unified(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(36, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    model = Unified()
    run = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[QuantizeCallback()],
    )
    run.fit(model, loader())
    assert instrumentation_of(model).switches.quantize
    assert isinstance(QuantizeCallback(), lightning.Callback)
    assert isinstance(QuantizeCallback(), pl.Callback)


def test_evaluation_between_steps_changes_no_bit_of_training() -> None:
    """Lightning returns to training by setting `training`; nothing frozen may survive that."""
    x, y = next(iter(loader(1, 24, shuffle=False)))
    losses: dict[bool, list[Tensor]] = {}
    for evaluates in (False, True):
        pl.seed_everything(3, verbose=False)
        model = Classifier(dropout=0.0)
        linger.quantize(linger.fuse_bn(linger.prepare(model, (x,))))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses[evaluates] = []
        for _ in range(6):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[evaluates].append(loss.detach())
            if evaluates:
                for on in (False, True):
                    for module in model.modules():
                        module.training = on
                    if not on:
                        with torch.no_grad():
                            model(x)
    assert torch.equal(torch.stack(losses[False]), torch.stack(losses[True]))


def test_a_model_in_evaluation_mode_is_named(tmp_path: Path) -> None:
    with pytest.warns(
        linger.QuantizationWarning, match=r"Classifier is in evaluation mode.*train\(\)"
    ):
        trainer(tmp_path, [QuantizeCallback()], 1).fit(Classifier().eval(), loader())
