"""Distillation: the term that is added, with what, and runs that resume with it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_linger.callbacks import (
    CalibrateCallback,
    DistillationCallback,
    FuseBNCallback,
    NormalizeCallback,
    ONNXExportCallback,
    QuantizeCallback,
    RNGStateCallback,
)
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import instrumentation_of, is_prepared
from lightning_linger.simulate.integer import number_system
from tests.callbacks.boring import Classifier, loader, trainer

EPOCHS = 4


class Plain(Classifier):
    """Gradients of every step, and no dropout."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(dropout=0.0)
        self.grads: list[dict[str, Tensor]] = []
        self.optimizer = optimizer

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append(
            {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer(self.parameters())
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class ByHand(Plain):
    """The same term, written into `training_step`."""

    def __init__(self, live: bool, weight: float, temperature: float, loss: str) -> None:
        super().__init__()
        self.live, self.weight, self.temperature, self.loss = live, weight, temperature, loss
        self.__dict__["kept"] = None

    def float_output(self, x: Tensor) -> Tensor:
        kept = self.__dict__["kept"]
        if kept is None or self.live:
            self.__dict__["kept"] = None
            self.__dict__["kept"] = kept = copy.deepcopy(self)
        instrumentation_of(kept).switches.quantize = True
        with torch.no_grad(), number_system(kept.eval(), "float"):
            return kept(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        # Running statistics move in the student's forward; a copy is made before it.
        on = is_prepared(self) and instrumentation_of(self).switches.quantize
        if on and not self.live:
            wanted = self.float_output(x)
        logits = self(x)
        loss = self.criterion(logits, y)
        if not on:
            return loss
        if self.live:
            wanted = self.float_output(x)
        if self.loss == "mse":
            return loss + self.weight * F.mse_loss(logits, wanted)
        t = self.temperature
        divergence = F.kl_div(
            (logits / t).log_softmax(1), (wanted / t).softmax(1), reduction="batchmean"
        )
        return loss + self.weight * t**2 * divergence


def stages(at_epoch: int = 1) -> list[Any]:
    return [
        FuseBNCallback(),
        NormalizeCallback(output=1.0),
        QuantizeCallback(at_epoch=at_epoch, weight_bits=3, output_bits=4),
    ]


def fit(folder: Path, callbacks: list[Any], model: Any, **kwargs: Any) -> Any:
    pl.seed_everything(6, verbose=False)
    ckpt = kwargs.pop("ckpt_path", None)
    run = trainer(folder, callbacks, **{"epochs": 2, **kwargs})
    run.fit(model, loader(), ckpt_path=ckpt)
    return run


def fresh(make: Any, *args: Any) -> Any:
    torch.manual_seed(4)
    return make(*args)


@pytest.mark.parametrize("teacher", ["frozen", "live"])
@pytest.mark.parametrize(("loss", "weight", "temperature"), [("kl", 0.7, 3.0), ("mse", 2.0, 1.0)])
def test_gradients_are_those_of_the_sum_of_both_losses(
    tmp_path: Path, teacher: Any, loss: Any, weight: float, temperature: float
) -> None:
    callback = DistillationCallback(weight, temperature, loss, teacher)
    model = fresh(Plain)
    run = fit(tmp_path, [*stages(), callback], model)
    hand = fresh(ByHand, teacher == "live", weight, temperature, loss)
    fit(tmp_path, stages(), hand)
    plain = fresh(Plain)
    fit(tmp_path, stages(), plain)
    assert len(model.grads) == len(hand.grads) == 6
    for mine, theirs in zip(model.grads, hand.grads, strict=True):
        for name, grad in mine.items():
            assert torch.allclose(grad, theirs[name], rtol=1e-4, atol=1e-6), name
    # The float epoch is untouched, to the last bit; the quantized one is not.
    for mine, theirs in zip(model.grads[:3], plain.grads[:3], strict=True):
        assert all(torch.equal(grad, theirs[name]) for name, grad in mine.items())
    assert not torch.equal(model.grads[3]["fc.weight"], plain.grads[3]["fc.weight"])
    assert run.callback_metrics["distillation_loss"] > 0


def test_what_the_user_logs_is_the_loss_of_the_step(tmp_path: Path) -> None:
    model = fresh(Plain)
    run = fit(tmp_path, [*stages(0), DistillationCallback(50.0)], model, epochs=1)
    assert run.callback_metrics["train_loss"] == model.losses[-1]


def test_accumulated_steps_and_scaled_losses(tmp_path: Path) -> None:
    whole, halves = fresh(Plain), fresh(Plain)
    callbacks = [QuantizeCallback(range=4.0), DistillationCallback(2.0)]
    for part in (whole, halves):
        part.bn = nn.Identity()
    run = trainer(tmp_path, callbacks, epochs=1)
    run.fit(whole, loader(1, 8, shuffle=False))
    callbacks = [QuantizeCallback(range=4.0), DistillationCallback(2.0)]
    run = trainer(tmp_path, callbacks, epochs=1, accumulate_grad_batches=2)
    dataset = loader(1, 8, shuffle=False).dataset
    run.fit(halves, torch.utils.data.DataLoader(dataset, 4))
    for name, grad in whole.grads[0].items():
        assert torch.allclose(grad, halves.grads[0][name], rtol=1e-4, atol=1e-6), name

    class Scaled(pl.plugins.precision.Precision):
        """Scales the loss as mixed precision does."""

        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:
            return super().pre_backward(self.scaler.scale(tensor), module)

    scaled = fresh(Plain)
    scaled.bn = nn.Identity()
    callbacks = [QuantizeCallback(range=4.0), DistillationCallback(2.0)]
    run = trainer(tmp_path, callbacks, epochs=1, plugins=[Scaled()])
    run.fit(scaled, loader(1, 8, shuffle=False))
    for name, grad in whole.grads[0].items():
        assert torch.equal(grad * 1024.0, scaled.grads[0][name]), name


def test_every_closure_of_a_step_has_the_term(tmp_path: Path) -> None:
    def lbfgs(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)

    seen: list[float] = []

    class Spy(pl.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            seen.append(float(loss) - float(pl_module.losses[-1]))

    model = fresh(Plain, lbfgs)
    fit(tmp_path, [*stages(0), DistillationCallback(), Spy()], model, epochs=1)
    assert len(seen) > 3
    assert all(term > 0 for term in seen)


class Parts(Plain):
    """Lightning's own template: the step calls parts of the model one after the other."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU())
        self.decoder = nn.Linear(8, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        z = self.encoder(x)
        return self.criterion(self.decoder(z * 2 if self.between else z), y)


def test_a_step_of_several_calls(tmp_path: Path) -> None:
    model = Parts(between=False)
    run = fit(tmp_path, [QuantizeCallback(weight_bits=2), DistillationCallback()], model, epochs=1)
    assert run.callback_metrics["distillation_loss"] > 0
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="cannot repeat"):
        fit(tmp_path, [QuantizeCallback(), DistillationCallback()], Parts(between=True), epochs=1)


def states(folder: Path, teacher: Any, ckpt: Path | None = None) -> tuple[Any, dict[str, Tensor]]:
    saver = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    distillation = DistillationCallback(teacher=teacher, end_epoch=3)
    model = fresh(Classifier)
    fit(
        folder,
        [*stages(), distillation, RNGStateCallback(), saver],
        model,
        epochs=EPOCHS,
        enable_checkpointing=True,
        ckpt_path=ckpt,
    )
    return model, model.state_dict()


@pytest.mark.parametrize("teacher", ["frozen", "live"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, teacher: Any) -> None:
    _, whole = states(tmp_path / "whole", teacher)
    for epoch in range(EPOCHS - 1):
        path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        _, resumed = states(tmp_path / f"from-{epoch}", teacher, path)
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), (epoch, name)
        saved = torch.load(path, weights_only=True)["callbacks"]["DistillationCallback"]["weights"]
        # Before quantization, and of the live teacher, nothing is saved twice.
        assert bool(saved) == (teacher == "frozen" and epoch >= 1)
        assert not any(name.startswith("_linger.") for name in saved)


def test_the_teacher_is_the_model_from_before_quantization(tmp_path: Path) -> None:
    callback = DistillationCallback()
    model = fresh(Plain)
    before: dict[str, Tensor] = {}

    class Spy(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                state = pl_module.state_dict()
                before.update({name: x.clone() for name, x in state.items()})

    fit(tmp_path, [*stages(), Spy(), callback], model)
    kept = callback.state_dict()["weights"]
    assert set(kept) == {name for name in before if not name.startswith("_linger.")}
    assert all(torch.equal(value, before[name]) for name, value in kept.items())
    assert not torch.equal(kept["fc.weight"], model.fc.weight)


class Epochs(pl.Callback):
    """Notes the state at the start of every epoch, before anything else acts there."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.states.append({name: x.clone() for name, x in pl_module.state_dict().items()})


def test_before_it_begins_no_bit_changes(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [DistillationCallback(at_epoch=2)]):
        seen = Epochs()
        fit(tmp_path, [seen, *stages(), *callbacks], fresh(Classifier), epochs=4)
        states.append(seen.states)
    for epoch, same in enumerate((True, True, True, False)):
        plain, watched = states[0][epoch], states[1][epoch]
        assert all(torch.equal(x, watched[name]) for name, x in plain.items()) == same, epoch


def test_the_loss_has_the_term_in_its_epochs(tmp_path: Path) -> None:
    class Spy(pl.Callback):
        def __init__(self) -> None:
            self.added: dict[int, bool] = {}

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            self.added[trainer.current_epoch] = not torch.equal(loss, pl_module.losses[-1])

    spy = Spy()
    fit(tmp_path, [*stages(), DistillationCallback(end_epoch=3), spy], fresh(Plain), epochs=4)
    assert spy.added == {0: False, 1: True, 2: True, 3: False}


@pytest.mark.parametrize("at_epoch", [None, 3])
def test_a_late_term_has_the_same_teacher(tmp_path: Path, at_epoch: int | None) -> None:
    callback, seen = DistillationCallback(at_epoch=at_epoch), Epochs()
    # Quantization starts in epoch 1.
    fit(tmp_path, [seen, *stages(), callback], fresh(Plain), epochs=4)
    kept = callback.state_dict()["weights"]
    assert all(torch.equal(value, seen.states[1][name]) for name, value in kept.items())


def test_another_run_has_a_teacher_of_its_own(tmp_path: Path) -> None:
    callback = DistillationCallback()
    fit(tmp_path, [*stages(), callback], fresh(Plain), epochs=2)
    other, seen = fresh(Plain), Epochs()
    torch.nn.init.normal_(other.fc.weight)
    fit(tmp_path, [seen, *stages(), callback], other, epochs=2)
    kept = callback.state_dict()["weights"]
    assert all(torch.equal(value, seen.states[1][name]) for name, value in kept.items())


class Auxiliary(Plain):
    """A second output in training, in front of or behind the one of evaluation."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        if not self.training:
            return y
        other = torch.cat([y, y])
        return (other, y) if self.first else (y, other)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self(batch[0])
        return F.cross_entropy(outputs[self.first], batch[1])


def test_auxiliary_outputs_of_training_are_left_out(tmp_path: Path) -> None:
    grads = []
    for model in (Plain(), Auxiliary(first=False)):
        model.load_state_dict(fresh(Plain).state_dict())
        fit(tmp_path, [QuantizeCallback(), DistillationCallback()], model, epochs=1)
        grads.append(model.grads[0])
    assert all(torch.equal(x, grads[1][name]) for name, x in grads[0].items())


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_a_teacher_of_another_shape_is_refused(tmp_path: Path, loss: Any) -> None:
    error = pl.utilities.exceptions.MisconfigurationException
    callbacks = [QuantizeCallback(), DistillationCallback(loss=loss)]
    with pytest.raises(error, match=r"shape \(\d+, \d\), in evaluation.* be the same in both"):
        fit(tmp_path, callbacks, Auxiliary(first=True), epochs=1)


def test_exports_find_their_example_beside_it(tmp_path: Path) -> None:
    export = ONNXExportCallback(tmp_path / "model.onnx")
    model = fresh(Plain)
    for order in ([DistillationCallback(), export], [export, DistillationCallback()]):
        (tmp_path / "model.onnx").unlink(missing_ok=True)
        fit(tmp_path, [QuantizeCallback(), *order], copy.deepcopy(model), epochs=1)
        assert export.mismatches == 0


def test_modes_of_single_modules_are_kept(tmp_path: Path) -> None:
    class Evaluated(Plain):
        def on_train_epoch_start(self) -> None:
            self.bn.eval()

        def on_train_batch_end(self, *_: Any) -> None:
            assert self.stem.training
            assert not self.bn.training

    fit(tmp_path, [QuantizeCallback(), DistillationCallback()], fresh(Evaluated), epochs=1)


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.example_input_array = torch.zeros(1, 1, 6, 6)


@pytest.mark.parametrize(
    ("callbacks", "model", "message"),
    [
        ([DistillationCallback()], Classifier, "follows no QuantizeCallback"),
        ([DistillationCallback(), QuantizeCallback()], Classifier, "follows no QuantizeCallback"),
        ([CalibrateCallback(), DistillationCallback()], Classifier, "follows no QuantizeCallback"),
        ([QuantizeCallback(), DistillationCallback()], Manual, "manual optimization"),
        ([QuantizeCallback(), DistillationCallback(class_dim=2)], Classifier, "pass `class_dim`"),
        ([QuantizeCallback(), DistillationCallback(at_epoch=3)], Classifier, "the last one is 1"),
        (
            [QuantizeCallback(at_epoch=2), DistillationCallback(end_epoch=2)],
            Classifier,
            "ends before quantization starts in epoch 2",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, callbacks: list[Any], model: Any, message: str
) -> None:
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=message):
        fit(tmp_path, callbacks, model())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 0.0}, "`weight` must be a positive number"),
        ({"weight": "1"}, "`weight` must be a positive number"),
        ({"at_epoch": -1}, "`at_epoch` must be a non-negative integer"),
        ({"temperature": float("inf")}, "`temperature`"),
        ({"loss": "l1"}, "`loss` must be one of"),
        ({"teacher": "other"}, "`teacher` must be one of"),
        ({"at_epoch": 3, "end_epoch": 3}, "must come after"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillationCallback(**arguments)
