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


@pytest.mark.parametrize("arguments", [{"at_epoch": 9}, {"at_epoch": 0, "end_epoch": 1}])
def test_while_it_is_off_no_bit_changes(tmp_path: Path, arguments: Any) -> None:
    plain, watched = fresh(Classifier), fresh(Classifier)
    fit(tmp_path, stages(), plain, epochs=3)
    fit(tmp_path, [*stages(), DistillationCallback(**arguments)], watched, epochs=3)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


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
        ({"temperature": float("inf")}, "`temperature`"),
        ({"loss": "l1"}, "`loss` must be one of"),
        ({"teacher": "other"}, "`teacher` must be one of"),
        ({"at_epoch": 3, "end_epoch": 3}, "must come after"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillationCallback(**arguments)
