"""A checkpoint that does not fit stops the run, and says what differs and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import lightning_linger as linger
from lightning_linger.callbacks import (
    FuseBNCallback,
    NormalizeCallback,
    QuantizeCallback,
    RNGStateCallback,
)
from lightning_linger.callbacks.strategies import refuse_unsupported_strategy
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.recipe import decode, encode
from lightning_linger.stages.checkpoints import RECIPE_KEY
from tests.callbacks.boring import Classifier, loader, trainer


def stages(**quantize: Any) -> list[Any]:
    return [FuseBNCallback(), NormalizeCallback(), QuantizeCallback(**quantize)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    pl.seed_everything(2, verbose=False)
    run = trainer(tmp_path, stages(), epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "made.ckpt")
    return tmp_path / "made.ckpt"


def resume(path: Path, callbacks: list[Any], model: Any = None, epochs: int = 2) -> Any:
    model = model or Classifier()
    fit = trainer(path.parent, callbacks, epochs)
    fit.fit(model, loader(), ckpt_path=path)
    return model


def with_recipe(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = torch.load(path, weights_only=True)
    recipe = decode(content["state_dict"][RECIPE_KEY])
    change(recipe)
    content["state_dict"][RECIPE_KEY] = encode(recipe, {})
    torch.save(content, path)
    return path


def without_quantization_state(path: Path) -> Path:
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    content["state_dict"] = {k: v for k, v in state.items() if not k.startswith("_linger.")}
    torch.save(content, path)
    return path


def damaged(path: Path) -> Path:
    content = torch.load(path, weights_only=True)
    content["state_dict"][RECIPE_KEY] = content["state_dict"][RECIPE_KEY][:100]
    torch.save(content, path)
    return path


class Wider(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 5, padding=2)


class Deeper(Classifier):
    def forward(self, x: Any) -> Any:
        return super().forward(self.stem(x)[:, :1])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights of another shape": (lambda p: resume(p, stages(), Wider()), r"size mismatch.*conv"),
    "other calls": (
        lambda p: resume(p, stages(), Deeper()),
        r"only in the checkpoint.*only here.*stem@1",
    ),
    "an older format": (
        lambda p: resume(with_recipe(p, lambda r: r.update(format=1)), stages()),
        r"format 1.*this version reads \d",
    ),
    "a newer format": (
        lambda p: resume(with_recipe(p, lambda r: r.update(format=99)), stages()),
        r"format 99.*version that wrote it",
    ),
    "a damaged recipe": (lambda p: resume(damaged(p), stages()), r"damaged.*another checkpoint"),
    "a missing callback": (
        lambda p: resume(p, [FuseBNCallback(), QuantizeCallback()]),
        r"'normalize' is missing here.*load_checkpoint.*allow_changes=True",
    ),
    "changed bits": (
        lambda p: resume(p, stages(weight_bits=4)),
        r"quantize\.weight_bits: 8, here 4.*allow_changes=True",
    ),
    "a changed limit": (
        lambda p: resume(p, [FuseBNCallback(), NormalizeCallback(weight=2.0), QuantizeCallback()]),
        r"normalize\.weight: 8\.0, here 2\.0",
    ),
    "other layers": (
        lambda p: resume(p, stages(overrides={"fc": None})),
        r"quantize\.overrides.*quantizers only in the checkpoint.*fc/linear/0",
    ),
    "a file that is none": (
        lambda p: p.write_bytes(b"nothing") and resume(p, stages()),
        r"(?i)pickle|load",
    ),
}


@pytest.mark.parametrize(("load", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(
    checkpoint: Path, load: Callable[[Path], Any], message: str
) -> None:
    with pytest.raises(Exception, match=f"(?s){message}"):
        load(checkpoint)


def test_the_same_arguments_are_no_change(checkpoint: Path) -> None:
    resume(checkpoint, stages())


def test_a_schedule_is_no_change(checkpoint: Path) -> None:
    """When a stage starts is not how: it may be moved."""
    model = resume(checkpoint, stages(at_epoch=1))
    assert instrumentation_of(model).switches.quantize


def test_changes_can_be_allowed(checkpoint: Path) -> None:
    """Training goes on with fewer bits, from the ranges of the checkpoint."""
    expected = torch.load(checkpoint, weights_only=True)["state_dict"]
    seen: dict[str, Any] = {}

    class Spy(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    changed = stages(weight_bits=4, overrides={"fc": None}, allow_changes=True)
    model = resume(checkpoint, [*changed, Spy()])
    ranges = [key for key in seen if key.endswith(".range")]
    assert ranges
    assert all(torch.equal(seen[key], expected[key]) for key in ranges)
    assert not any("fc/linear" in key for key in ranges)
    weights = [site.weights for site in instrumentation_of(model).sites]
    assert {one.bits for one in weights if one.grid} == {4}


def test_a_stage_that_is_gone_can_be_allowed(checkpoint: Path) -> None:
    model = resume(checkpoint, [QuantizeCallback(allow_changes=True)])
    switches = instrumentation_of(model).switches
    assert (switches.fuse, switches.normalize, switches.quantize) == (False, False, True)


def test_a_second_fit_with_other_arguments_can_be_allowed(tmp_path: Path) -> None:
    model = Classifier()
    trainer(tmp_path, stages(), epochs=1).fit(model, loader())
    before = {
        k: v.clone()
        for k, v in model.state_dict().items()
        if k.endswith("fc/linear/0.output.estimator.range")
    }
    changed = stages(weight_bits=4, allow_changes=True)
    trainer(tmp_path, changed).validate(model, loader(), verbose=False)
    after = model.state_dict()
    assert before
    assert all(torch.equal(after[key], value) for key, value in before.items())
    weights = [site.weights for site in instrumentation_of(model).sites]
    assert {one.bits for one in weights if one.grid} == {4}
    assert instrumentation_of(model).switches.quantize


def test_a_stage_may_be_added(tmp_path: Path) -> None:
    """First a float run with folding, then one that quantizes: from a file, or from memory."""
    pl.seed_everything(2, verbose=False)
    model = Classifier()
    first = trainer(tmp_path, [FuseBNCallback()], epochs=1)
    first.fit(model, loader())
    first.save_checkpoint(tmp_path / "float.ckpt")
    resumed = resume(tmp_path / "float.ckpt", [FuseBNCallback(), QuantizeCallback()])
    assert instrumentation_of(resumed).switches.quantize
    trainer(tmp_path, [FuseBNCallback(), QuantizeCallback()], epochs=1).fit(model, loader())
    switches = instrumentation_of(model).switches
    assert (switches.fuse, switches.quantize) == (True, True)


def test_a_float_checkpoint_loads_into_a_run_with_stages(checkpoint: Path) -> None:
    model = Classifier()
    path = without_quantization_state(checkpoint)
    trainer(path.parent, stages()).validate(model, loader(), ckpt_path=path, verbose=False)
    assert not instrumentation_of(model).switches.quantize


def test_a_missing_random_state_is_named_by_lightning(tmp_path: Path) -> None:
    run = trainer(tmp_path, [*stages(), RNGStateCallback()], epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "made.ckpt")
    with pytest.warns(UserWarning, match="LingerRNGState"):
        resume(tmp_path / "made.ckpt", stages())


TWINS: dict[str, Callable[[], Any]] = {
    "QuantizeCallback": QuantizeCallback,
    "FuseBNCallback": FuseBNCallback,
    "NormalizeCallback": NormalizeCallback,
    "RNGStateCallback": RNGStateCallback,
}


@pytest.mark.parametrize("make", TWINS.values(), ids=TWINS)
def test_two_instances_of_one_callback_are_refused(tmp_path: Path, make: Callable[[], Any]) -> None:
    name = make().__class__.__name__
    with pytest.raises(Exception, match=rf"two {name}s|more than one stateful.*{name}"):
        trainer(tmp_path, [make(), make()], epochs=1).fit(Classifier(), loader())


class FSDPStrategy:
    """Named as Lightning's, which needs a GPU."""


class DeepSpeedStrategy(FSDPStrategy):
    """Derived from another one."""


class Synchronized:
    _layer_sync = object()


@pytest.mark.parametrize(
    ("strategy", "module", "message"),
    [
        (FSDPStrategy(), nn.Identity(), r"FSDPStrategy.*flat tensor.*HINT.*ModelParallel.*ddp"),
        (DeepSpeedStrategy(), nn.Identity(), r"DeepSpeedStrategy.*flat tensor.*HINT"),
        (Synchronized(), nn.Identity(), r"sync_batchnorm.*replaces.*HINT"),
        (object(), nn.Sequential(nn.SyncBatchNorm(2)), r"sync_batchnorm.*HINT"),
    ],
)
def test_unsupported_strategies_are_refused(strategy: Any, module: Any, message: str) -> None:
    with pytest.raises(Exception, match=f"(?s){message}"):
        refuse_unsupported_strategy(SimpleNamespace(strategy=strategy), module)


def test_a_torch_user_is_told_the_difference_too() -> None:
    x = torch.randn(4, 1, 6, 6)
    eight, four = (linger.prepare(Classifier(), (x,)) for _ in range(2))
    linger.quantize(eight)
    linger.quantize(four, linger.QuantConfig(weight_bits=4))
    with pytest.raises(linger.ConfigError, match=r"quantize\.weight_bits: 8, here 4"):
        four.load_state_dict(eight.state_dict())
    unplanned = linger.prepare(Classifier(), (x,))
    with pytest.raises(linger.ConfigError, match="'quantize' is missing here"):
        unplanned.load_state_dict(eight.state_dict())


def test_the_recipe_is_text_in_a_tensor(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    recipe = json.loads(bytes(state[RECIPE_KEY].tolist()))
    assert list(recipe["plans"]) == ["fuse_bn", "normalize", "quantize"]
    assert all(isinstance(value, torch.Tensor) for value in state.values())
