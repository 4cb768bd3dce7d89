"""Every way into Lightning works with the callbacks in the Trainer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_linger as linger
from lightning_linger.callbacks import (
    FuseBNCallback,
    IntegerValidatorCallback,
    NormalizeCallback,
    ONNXExportCallback,
    QuantErrorCallback,
    QuantizeCallback,
)
from lightning_linger.core.instrumentation import instrumentation_of
from tests.callbacks.boring import Classifier, loader, trainer

QUANTIZED_AT = 2


class Owned(linger.LingerMixin, Classifier):
    """A class of one's own."""


class Tested(Classifier):
    """Logs a metric that a checkpoint can monitor, and may be tested."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.criterion(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.criterion(self(batch[0]), batch[1]))


def stages(at_epoch: int = 0) -> list[Any]:
    return [FuseBNCallback(), NormalizeCallback(), QuantizeCallback(at_epoch=at_epoch)]


def run(folder: Path, model: Any, callbacks: list[Any] | None = None, **kwargs: Any) -> Any:
    """Fit for one epoch, unless told otherwise, and return the trainer."""
    pl.seed_everything(4, verbose=False)
    data = kwargs.pop("data", loader())
    validation = kwargs.pop("validation", loader(2, shuffle=False))
    fit = trainer(folder, stages() if callbacks is None else callbacks, **{"epochs": 1, **kwargs})
    fit.fit(model, data, validation)
    return fit


def images() -> Tensor:
    return next(iter(loader(shuffle=False)))[0]


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images())


def is_quantized(model: nn.Module) -> bool:
    return instrumentation_of(model).switches.quantize


def assert_integer_exact(model: nn.Module) -> None:
    expected = outputs(model)
    with torch.no_grad(), linger.integer(model):
        assert torch.equal(model(images()), expected)


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Any, Tested, Path]:
    """A finished run with a checkpoint per epoch: float in 0 and 1, quantized in 2."""
    folder = tmp_path / "checkpoints"
    saver = pl.callbacks.ModelCheckpoint(
        folder, "{epoch}", monitor="val_loss", save_top_k=-1, save_last=True
    )
    model = Tested()
    fit = run(tmp_path, model, [*stages(QUANTIZED_AT), saver], epochs=3, enable_checkpointing=True)
    return fit, model, folder


def reloaded(path: Path) -> Tested:
    return linger.load_checkpoint(Tested, path)


@pytest.mark.parametrize("entry", ["validate", "test"])
@pytest.mark.parametrize("which", ["best", "last", "epoch=0", "epoch=2"])
def test_evaluation_of_a_checkpoint(
    checkpoints: tuple[Any, Tested, Path], entry: str, which: str
) -> None:
    """In the trainer that made it, in another one with a fresh model, and without callbacks."""
    fit, model, folder = checkpoints
    path = Path(fit.checkpoint_callback.best_model_path)
    if which != "best":
        path = folder / f"{which}.ckpt"
    expected = reloaded(path)
    data = loader(2, shuffle=False)
    (direct,) = getattr(trainer(folder, []), entry)(expected, data, verbose=False)

    alias = which if which in ("best", "last") else path
    (same,) = getattr(fit, entry)(model, data, ckpt_path=alias, verbose=False)
    assert same == direct
    assert is_quantized(model) == is_quantized(expected)

    fresh = Tested()
    other = trainer(folder, stages(QUANTIZED_AT))
    (again,) = getattr(other, entry)(fresh, data, ckpt_path=path, verbose=False)
    assert again == direct
    assert is_quantized(fresh) == is_quantized(expected)
    if which != "best":
        assert is_quantized(fresh) == (which != "epoch=0")


@pytest.mark.parametrize("entry", ["validate", "test"])
def test_evaluation_without_a_checkpoint(checkpoints: tuple[Any, Tested, Path], entry: str) -> None:
    fit, model, folder = checkpoints
    data = loader(2, shuffle=False)
    (same,) = getattr(fit, entry)(model, data, verbose=False)
    last = reloaded(folder / "last.ckpt")
    (direct,) = getattr(trainer(folder, []), entry)(last, data, verbose=False)
    assert same == direct


@pytest.mark.parametrize("which", ["best", "last"])
def test_prediction_of_a_checkpoint(checkpoints: tuple[Any, Tested, Path], which: str) -> None:
    fit, _, folder = checkpoints
    path = fit.checkpoint_callback.best_model_path if which == "best" else folder / "last.ckpt"
    expected = outputs(reloaded(Path(path)))
    found = fit.predict(None, loader(shuffle=False), ckpt_path=which)
    assert torch.equal(found[0], expected)
    fresh = Tested()
    found = trainer(folder, stages(QUANTIZED_AT)).predict(
        fresh, loader(shuffle=False), ckpt_path=path
    )
    assert torch.equal(found[0], expected)


def test_earlier_and_later_stages_load_into_each_other(
    checkpoints: tuple[Any, Tested, Path],
) -> None:
    _, model, folder = checkpoints
    early, late = folder / "epoch=0.ckpt", folder / "epoch=2.ckpt"
    data = loader(1)
    for path, quantized in ((early, False), (late, True), (early, False), (late, True)):
        trainer(folder, stages(QUANTIZED_AT)).validate(model, data, ckpt_path=path, verbose=False)
        assert is_quantized(model) == quantized
        assert torch.equal(outputs(model), outputs(reloaded(path)))
    assert_integer_exact(model)


def test_weights_only_checkpoints_carry_the_structure(tmp_path: Path) -> None:
    model = Tested()
    fit = run(tmp_path, model)
    path = tmp_path / "weights.ckpt"
    fit.save_checkpoint(path, weights_only=True)
    assert "optimizer_states" not in torch.load(path, weights_only=True)
    assert torch.equal(outputs(reloaded(path)), outputs(model))
    fresh = Tested()
    trainer(tmp_path, stages()).validate(fresh, loader(1), ckpt_path=path, verbose=False)
    assert torch.equal(outputs(fresh), outputs(model))


def test_a_class_with_the_mixin_loads_by_itself(tmp_path: Path) -> None:
    model = Owned()
    fit = run(tmp_path, model)
    path = tmp_path / "owned.ckpt"
    fit.save_checkpoint(path)
    twin = Owned.load_from_checkpoint(path)
    assert torch.equal(outputs(twin), outputs(model))
    assert_integer_exact(twin)
    plain = Owned()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(outputs(plain), outputs(model))
    without_callbacks = Owned()
    trainer(tmp_path, []).validate(without_callbacks, loader(1), ckpt_path=path, verbose=False)
    assert torch.equal(outputs(without_callbacks), outputs(model))


def test_a_class_with_the_mixin_still_loads_float_states() -> None:
    source, target = Classifier(), Owned()
    target.load_state_dict(source.state_dict())
    assert torch.equal(outputs(target), outputs(source))


def test_without_the_mixin_the_keys_are_named(tmp_path: Path) -> None:
    fit = run(tmp_path, Tested())
    path = tmp_path / "tested.ckpt"
    fit.save_checkpoint(path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_linger\._extra_state"):
        Tested.load_from_checkpoint(path)


def test_training_goes_on_without_the_callbacks(tmp_path: Path) -> None:
    """Stages stay on until `strip`; the Trainer need not know them."""
    model = Owned()
    path = tmp_path / "owned.ckpt"
    run(tmp_path, model).save_checkpoint(path)
    fresh = Owned()
    trainer(tmp_path, [], epochs=2).fit(fresh, loader(), ckpt_path=path)
    assert is_quantized(fresh)
    assert not torch.equal(outputs(fresh), outputs(model))
    assert_integer_exact(fresh)


OPTIONS: dict[str, dict[str, Any]] = {
    "overfit_batches": {"overfit_batches": 1},
    "limits": {"limit_train_batches": 0.5, "limit_val_batches": 1},
    "no validation": {"limit_val_batches": 0},
    "validation inside the epoch": {"val_check_interval": 1, "epochs": 2},
    "barebones": {
        "barebones": True,
        **dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        ),
        "log_every_n_steps": None,
    },
    "max_steps": {"epochs": None, "max_steps": 4},
    "no inference mode": {"inference_mode": False},
    "double": {"precision": "64-true"},
    "gradient clipping": {"gradient_clip_val": 0.1},
    "detect_anomaly": {"detect_anomaly": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    model = Classifier()
    callbacks = [*stages(), IntegerValidatorCallback(), QuantErrorCallback()]
    run(tmp_path, model, callbacks, **options)
    assert is_quantized(model)
    if "precision" in options:
        model.float()
    assert_integer_exact(model)


class Manual(Classifier):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.example_input_array = torch.zeros(2, 1, 6, 6)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.criterion(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.stem.parameters(), 0.1)
        rest = [*self.bn.parameters(), *self.conv.parameters(), *self.fc.parameters()]
        return [first, torch.optim.AdamW(rest, 1e-2)], []


class Late(Classifier):
    """Makes its layers in `configure_model`, which Lightning may call twice."""

    def __init__(self) -> None:
        super().__init__()
        del self.fc
        self.fc: Any = None

    def configure_model(self) -> None:
        if self.fc is None:
            self.fc = nn.Linear(8, 4)


class Dictionary(Classifier):
    """Takes keyword inputs, and says so by an example."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = {"x": torch.zeros(2, 1, 6, 6), "gain": torch.ones(())}

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        return super().forward(x if gain is None else x * gain)


class Compiled(Classifier):
    """Compiles a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.compile(backend="aot_eager")


class Quiet(Classifier):
    """Logs nothing: torch 2.13 cannot compile `log` of Lightning 2.6."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])


class Several(Classifier):
    """Takes a batch of each of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(F.cross_entropy(self(x), y) for x, y in batch.values())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(loader(shuffle=False).dataset)


MODELS: dict[str, Any] = {
    "manual optimization, two optimizers": (Manual, {}),
    "configure_model": (Late, {}),
    "example_input_array with keywords": (Dictionary, {}),
    "a compiled part": pytest.param(Compiled, {}, marks=pytest.mark.slow),
    "IterableDataset": (Classifier, {"data": DataLoader(Stream(), 8)}),
    "several loaders": (
        Several,
        {
            "data": {"one": loader(), "other": loader(2)},
            "validation": [loader(1), loader(2)],
        },
    ),
}


@pytest.mark.parametrize(("model", "options"), MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore:Your `IterableDataset`")
def test_kinds_of_modules_and_data(
    tmp_path: Path, model: Callable[[], Any], options: dict[str, Any]
) -> None:
    module = model()
    callbacks = [*stages(), IntegerValidatorCallback(), ONNXExportCallback(tmp_path / "m.onnx")]
    run(tmp_path, module, callbacks, **options)
    assert is_quantized(module)
    assert_integer_exact(module)
    assert callbacks[-1].mismatches == 0


@pytest.mark.slow
def test_a_compiled_lightning_module(tmp_path: Path) -> None:
    module = Quiet()
    run(tmp_path, torch.compile(module, backend="aot_eager"))
    assert is_quantized(module)
    assert_integer_exact(module)


def test_inference_mode_gives_the_same_bits(tmp_path: Path) -> None:
    model = Classifier()
    run(tmp_path, model)
    expected = outputs(model)
    with torch.inference_mode():
        assert torch.equal(model.eval()(images()), expected)
        with linger.integer(model):
            assert torch.equal(model(images()), expected)
    # What inference has prepared does not break training.
    model.train()(images()).sum().backward()
    assert model.stem.weight.grad is not None


def test_a_second_fit_after_a_test(checkpoints: tuple[Any, Tested, Path]) -> None:
    fit, model, folder = checkpoints
    fit.test(model, loader(1), verbose=False)
    again = trainer(folder, stages(0), epochs=1)
    again.fit(model, loader())
    assert_integer_exact(model)
