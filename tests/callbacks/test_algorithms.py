"""Equalization, bias correction, statistics and learned rounding inside a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_linger as linger
from lightning_linger.callbacks import (
    AdaRoundCallback,
    BiasCorrectionCallback,
    CalibrateCallback,
    EqualizeCallback,
    FuseBNCallback,
    NormalizeCallback,
    ONNXExportCallback,
    QuantizeCallback,
    ReestimateBNCallback,
    RNGStateCallback,
)
from lightning_linger.callbacks.batches import training_calls
from lightning_linger.core.instrumentation import instrumentation_of
from tests.callbacks.boring import Classifier, fitted, loader, trainer
from tests.callbacks.test_calibrate import own
from tests.callbacks.test_entry_points import Manual, assert_integer_exact
from tests.callbacks.test_resume import run, unequal

STEPS = 3


def quick(**arguments: Any) -> AdaRoundCallback:
    return AdaRoundCallback(batches=2, steps=20, learning_rate=0.1, **arguments)


class Spy(pl.Callback):
    """Notes what has been applied, at the end of each epoch and of the run."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def _note(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(list(instrumentation_of(pl_module).applied))

    on_train_epoch_end = _note
    on_train_end = _note


def test_a_whole_run_of_post_training_quantization(tmp_path: Path) -> None:
    export = ONNXExportCallback(tmp_path / "model.onnx")
    spy = Spy()
    callbacks = [
        *(FuseBNCallback(), EqualizeCallback(), CalibrateCallback(batches=2, weight_bits=4)),
        *(ReestimateBNCallback(batches=2), quick(), spy, export),
    ]
    plain = fitted(tmp_path, [FuseBNCallback()])
    model = fitted(tmp_path, callbacks)
    assert torch.equal(torch.stack(plain.losses), torch.stack(model.losses[: len(plain.losses)]))
    assert spy.seen == [[], [], [], ["equalize", "reestimate_bn", "adaround"]]
    assert not model.training or instrumentation_of(model).calls is None
    assert_integer_exact(model)
    assert export.mismatches == 0
    path = tmp_path / "model.ckpt"
    torch.save(model.state_dict(), path)
    twin = linger.load_checkpoint(Classifier, path)
    assert instrumentation_of(twin).applied == spy.seen[-1]
    x = next(iter(loader()))[0]
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), model.eval()(x))


ACTING: dict[str, tuple[Callable[[int], Any], Callable[[Any, list[Tensor]], Any]]] = {
    "bias": (
        lambda n: BiasCorrectionCallback(batches=n),
        lambda model, batches: linger.correct_bias(model, batches),
    ),
    "statistics": (
        lambda n: ReestimateBNCallback(batches=n),
        lambda model, batches: linger.reestimate_bn(model, batches),
    ),
    "rounding": (
        lambda n: AdaRoundCallback(batches=n, steps=20, learning_rate=0.1),
        lambda model, batches: linger.adaround(
            model, batches, linger.AdaRoundConfig(steps=20, learning_rate=0.1)
        ),
    ),
}


@pytest.mark.parametrize(("make", "function"), ACTING.values(), ids=ACTING)
def test_the_callback_does_what_the_function_does(make: Any, function: Any, tmp_path: Path) -> None:
    """On the first training batches, as the loader gives them."""

    def ready(extra: list[Any]) -> Classifier:
        pl.seed_everything(2, verbose=False)
        model = Classifier()
        calibrate = CalibrateCallback(batches=3, weight_bits=3)
        callbacks = [FuseBNCallback(), calibrate, *extra]
        trainer(tmp_path, callbacks, epochs=1).fit(model, ordered)
        return model

    ordered = loader(3, shuffle=False)
    batches = [batch[0] for batch, _ in zip(ordered, range(2), strict=False)]
    model, twin = ready([make(2)]), ready([])
    before = own(twin)
    before = {k: v.clone() for k, v in before.items()}
    twin.eval()
    function(twin, batches)
    changed = {k for k, v in own(twin).items() if not torch.equal(v, before[k])}
    assert changed
    assert all(torch.equal(v, own(twin)[k]) for k, v in own(model).items())


def test_equalizing_in_a_run_changes_no_bit_of_the_float_model(tmp_path: Path) -> None:
    """The loss behind it is, bit for bit, that of the run without it."""

    class Deep(Classifier):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.hidden = torch.nn.Linear(8, 16)
            self.out = torch.nn.Linear(16, 4)
            with torch.no_grad():
                scale = torch.exp2(torch.arange(16.0) - 8).view(-1, 1)
                self.hidden.weight.mul_(scale)
                self.out.weight.div_(scale.t())

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.bn(self.stem(x))).mean((2, 3))
            return self.out(torch.relu(self.hidden(x)))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    class Moments(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            state = trainer.optimizers[0].state
            self.forgotten = [n for n, p in pl_module.named_parameters() if p not in state]

    def fit(callbacks: list[Any]) -> Deep:
        pl.seed_everything(3, verbose=False)
        model = Deep()
        trainer(tmp_path, callbacks, epochs=2).fit(model, loader(1, shuffle=False))
        return model

    moments = Moments()
    stages = [FuseBNCallback(), EqualizeCallback(at_epoch=1), QuantizeCallback(at_epoch=2)]
    plain = fit([FuseBNCallback(), QuantizeCallback(at_epoch=2)])
    model = fit([*stages, moments])
    assert torch.equal(torch.stack(plain.losses), torch.stack(model.losses))
    assert instrumentation_of(model).applied == ["equalize"]
    assert {"hidden.weight", "hidden.bias", "out.weight"} <= set(moments.forgotten)
    assert "conv.weight" in moments.forgotten, "has no gradient"
    assert "stem.weight" not in moments.forgotten
    assert "out.bias" not in moments.forgotten
    spread = [m.hidden.weight.detach().abs().amax(1).log2().std() for m in (plain, model)]
    assert spread[1] < 0.75 * spread[0]


MOMENTS: dict[str, tuple[Callable[[], list[Any]], list[list[str]]]] = {
    "at an epoch": (
        lambda: [QuantizeCallback(), BiasCorrectionCallback(at_epoch=1, batches=1)],
        [[], ["correct_bias"], ["correct_bias"], ["correct_bias"]],
    ),
    "at a step": (
        lambda: [QuantizeCallback(at_step=2), BiasCorrectionCallback(at_step=4, batches=1)],
        [[], ["correct_bias"], ["correct_bias"], ["correct_bias"]],
    ),
    "at the end": (
        lambda: [QuantizeCallback(at_epoch=1), ReestimateBNCallback(batches=1)],
        [[], [], [], ["reestimate_bn"]],
    ),
    "with quantization": (
        lambda: [QuantizeCallback(at_epoch=1), EqualizeCallback(at_epoch=1)],
        [[], ["equalize"], ["equalize"], ["equalize"]],
    ),
    "when a condition holds": (
        lambda: [
            QuantizeCallback(when=lambda trainer, module: trainer.current_epoch > 0),
            quick(at_epoch=2),
        ],
        [[], [], ["adaround"], ["adaround"]],
    ),
}


@pytest.mark.parametrize(("make", "applied"), MOMENTS.values(), ids=MOMENTS)
def test_when_they_act(make: Any, applied: list[list[str]], tmp_path: Path) -> None:
    spy = Spy()
    model = fitted(tmp_path, [*make(), spy])
    assert spy.seen == applied
    again = Spy()
    trainer(tmp_path, [*make(), again], 1).fit(model, loader())
    assert again.seen[-1] == applied[-1], "a second run does not act again"


def test_nothing_is_done_where_quantization_never_starts(tmp_path: Path) -> None:
    callbacks = [QuantizeCallback(when=lambda *_: False), BiasCorrectionCallback(batches=1)]
    with pytest.warns(linger.QuantizationWarning, match="BiasCorrectionCallback did nothing"):
        fitted(tmp_path, callbacks)


def test_with_fast_dev_run_everything_acts(tmp_path: Path) -> None:
    spy = Spy()
    stages = [FuseBNCallback(at_epoch=3), EqualizeCallback(at_epoch=4)]
    later = [QuantizeCallback(at_epoch=5), BiasCorrectionCallback(at_epoch=7), spy]
    fitted(tmp_path, [*stages, *later], fast_dev_run=True)
    assert spy.seen[-1] == ["equalize", "correct_bias"]


WRONG: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "no quantization": (lambda: [FuseBNCallback(), EqualizeCallback()], "add a CalibrateCallback"),
    "alone": (lambda: [BiasCorrectionCallback()], "HINT: add a CalibrateCallback or a Quantize"),
    "two of a kind": (
        lambda: [CalibrateCallback(), quick(), quick()],
        "two AdaRoundCallbacks",
    ),
    "two that exclude each other": (
        lambda: [CalibrateCallback(), quick(), BiasCorrectionCallback()],
        "AdaRoundCallback and BiasCorrectionCallback both bring.*HINT: keep",
    ),
    "equalizing after ranges": (
        lambda: [QuantizeCallback(), EqualizeCallback(at_epoch=1)],
        r"EqualizeCallback\(at_epoch=1\) has to act before QuantizeCallback\(at_epoch=0\)",
    ),
    "equalizing at the end": (
        lambda: [QuantizeCallback(), EqualizeCallback()],
        r"EqualizeCallback\(at the end\) has to act before QuantizeCallback",
    ),
    "equalizing behind calibration": (
        lambda: [CalibrateCallback(), EqualizeCallback()],
        "has to act before CalibrateCallback.*list it before",
    ),
    "equalizing after limits": (
        lambda: [NormalizeCallback(at_epoch=1), EqualizeCallback(at_epoch=1), CalibrateCallback()],
        r"has to act before NormalizeCallback\(at_epoch=1\)",
    ),
    "before quantization": (
        lambda: [QuantizeCallback(at_epoch=2), quick(at_epoch=1)],
        r"AdaRoundCallback\(at_epoch=1\) needs a quantized model.*QuantizeCallback\(at_epoch=2\)",
    ),
    "as quantization starts": (
        lambda: [QuantizeCallback(at_epoch=2), quick(at_epoch=2)],
        "needs a quantized model that has seen ranges.*in a later epoch",
    ),
    "before calibration": (
        lambda: [ReestimateBNCallback(), CalibrateCallback()],
        r"needs a quantized model.*CalibrateCallback\(at the end\).*list it behind",
    ),
    "after the end": (
        lambda: [QuantizeCallback(), quick(at_epoch=3)],
        r"AdaRoundCallback\(at_epoch=3\) never acts with max_epochs=3.*the last one is 2",
    ),
    "in the wrong order": (
        lambda: [CalibrateCallback(), quick(), ReestimateBNCallback()],
        r"ReestimateBNCallback\(at the end\) has to act before AdaRoundCallback\(at the end\)",
    ),
    "a step before an epoch": (
        lambda: [QuantizeCallback(at_epoch=2), quick(at_step=5)],
        r"AdaRoundCallback\(at_step=5\) needs a quantized model",
    ),
    "averages": (
        lambda: [
            CalibrateCallback(),
            quick(),
            pl.callbacks.StochasticWeightAveraging(1e-3),
        ],
        r"StochasticWeightAveraging would average.*`linger.adaround` after",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_work_is_refused_before_training(
    make: Any, message: str, tmp_path: Path
) -> None:
    model = Classifier()
    before = model.fc.weight.clone()
    with pytest.raises(Exception, match=f"(?s){message}"):
        trainer(tmp_path, make()).fit(model, loader(), loader(1))
    assert torch.equal(model.fc.weight, before)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batches.*positive.*0"):
        BiasCorrectionCallback(batches=0)
    with pytest.raises(ValueError, match=r"one of `at_epoch`"):
        ReestimateBNCallback(at_epoch=1, at_step=2)
    with pytest.raises(ValueError, match=r"steps.*positive"):
        AdaRoundCallback(steps=0)
    with pytest.raises(Exception, match=r"manual optimization.*linger.correct_bias"):
        trainer(tmp_path, [QuantizeCallback(), BiasCorrectionCallback(at_epoch=1)]).fit(
            Manual(), loader()
        )


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """From before and behind each of them; behind it, it does not act again."""

    def callbacks() -> list[Any]:
        return [
            *(FuseBNCallback(), EqualizeCallback(at_epoch=1), QuantizeCallback(at_epoch=1)),
            *(ReestimateBNCallback(at_epoch=2, batches=2), quick(at_epoch=2)),
        ]

    whole = run(tmp_path, "whole", callbacks=callbacks)
    saved = torch.load(whole / "final.ckpt", weights_only=True)["state_dict"]
    assert any("held_weight" in key for key in saved)
    for epoch in range(3):
        resumed = run(tmp_path, f"from-{epoch}", whole / f"epoch={epoch}.ckpt", callbacks=callbacks)
        assert not unequal(resumed / "final.ckpt", whole / "final.ckpt"), epoch


class Reading(pl.Callback):
    """Reads calibration batches at the start of an epoch, and in the middle of one."""

    def __init__(self, batches: int = 2) -> None:
        self.batches = batches
        self.inputs: list[Tensor] = []

    def _read(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        calls = training_calls(trainer, pl_module, self.batches)
        self.inputs += [call.args[0] for call in calls]

    on_train_epoch_start = _read
    on_train_batch_start = _read


@pytest.mark.parametrize("generator", [None, 5])
def test_reading_batches_leaves_no_trace(generator: int | None, tmp_path: Path) -> None:
    def fit(callbacks: list[Any]) -> Classifier:
        pl.seed_everything(4, verbose=False)
        made = loader(4)
        own = None if generator is None else torch.Generator().manual_seed(generator)
        data = DataLoader(made.dataset, 8, shuffle=True, generator=own)
        model = Classifier()
        stages = [FuseBNCallback(), QuantizeCallback(at_epoch=1), *callbacks]
        trainer(tmp_path, stages).fit(model, data)
        return model

    reading = Reading()
    plain, model = fit([]), fit([reading])
    assert len(reading.inputs) == 2 * (3 + 3 * 4)
    assert torch.equal(torch.stack(plain.losses), torch.stack(model.losses))
    state = plain.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_persistent_workers_go_on_where_they_were(tmp_path: Path) -> None:
    """They have one iterator per loader, which a second reader would start anew."""

    def losses(callbacks: list[Any]) -> Tensor:
        pl.seed_everything(4, verbose=False)
        data = DataLoader(loader(3).dataset, 8, num_workers=1, persistent_workers=True)
        model = Classifier()
        trainer(tmp_path, [QuantizeCallback(), *callbacks], 1).fit(model, data)
        return torch.stack(model.losses)

    assert torch.equal(losses([]), losses([Reading(1)]))


def test_several_loaders_side_by_side(tmp_path: Path) -> None:
    class Two(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["left"], batch_idx)

    pl.seed_everything(4, verbose=False)
    model = Two()
    callbacks = [QuantizeCallback(), BiasCorrectionCallback(at_epoch=1, batches=2)]
    trainer(tmp_path, callbacks, 2).fit(model, {"left": loader(), "right": loader(1)})
    assert instrumentation_of(model).applied == ["correct_bias"]


def test_the_random_state_goes_on(tmp_path: Path) -> None:
    """With the states of a run in its checkpoints, drawing must not depend on the algorithm."""
    stages = [QuantizeCallback(), ReestimateBNCallback(at_epoch=1, batches=1), RNGStateCallback()]
    fitted(tmp_path, stages)
    after = torch.random.get_rng_state()
    fitted(tmp_path, [QuantizeCallback(), RNGStateCallback()])
    assert torch.equal(torch.random.get_rng_state(), after)
