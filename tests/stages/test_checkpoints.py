"""A model from its class and a checkpoint: the same structure, the same integers, or an error."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_linger as linger
from lightning_linger.callbacks import FuseBNCallback, NormalizeCallback, QuantizeCallback
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.recipe import (
    decode,
    differences,
    encode,
    graph_from_plain,
    graph_to_plain,
    value_from_plain,
    value_to_plain,
)
from lightning_linger.stages.checkpoints import (
    RECIPE_KEY,
    recipe_of,
    recorded_example,
    restore,
)
from tests.callbacks.boring import Classifier, fitted, loader, trainer
from tests.models import Chain, Lambda, ResNet, images, train
from tests.ops.cases import ALL, Case
from tests.ops.test_harness import each_case

Make = Callable[..., nn.Module]


def saved(model: nn.Module, folder: Path) -> Path:
    path = folder / "model.pt"
    torch.save(model.state_dict(), path)
    return path


def results(model: nn.Module, *inputs: Any) -> list[Tensor]:
    """Outputs in fake-quant and in integers, if the quantize stage is on."""
    model.eval()
    with torch.no_grad():
        found = tree_leaves(model(*inputs))
        if instrumentation_of(model).switches.quantize:
            with linger.integer(model):
                found += tree_leaves(model(*inputs))
    return found


def assert_same(model: nn.Module, twin: nn.Module, *inputs: Any) -> None:
    assert list(twin.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key
    for a, b in zip(results(model, *inputs), results(twin, *inputs), strict=True):
        assert torch.equal(a, b)


# --- every stage and every op -------------------------------------------------------------------

STAGES: dict[str, Callable[[nn.Module], Any]] = {
    "prepared": lambda model: model,
    "fused": lambda model: linger.fuse_bn(model, "frozen", ["layers.*"]),
    "normalized": lambda model: linger.normalize(model, "9*mean", "99%", "99.9%"),
    "quantized": lambda model: linger.quantize(
        model,
        linger.QuantConfig(platform="arcs", weight_bits=4, range="absmax"),
        types=[nn.Conv2d, "linear"],
        overrides={"stem": {"weight_bits": 8}, "layers.0": None},
    ),
    "all": lambda model: linger.quantize(linger.normalize(linger.fuse_bn(model))),
    "quantized, then limited": lambda model: linger.normalize(linger.quantize(model)),
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_every_stage_comes_back(stage: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    x = images()
    model = linger.prepare(ResNet(channels=5), (x,))
    stage(model)
    train(model, (x,), 2, 0.05)
    path = saved(model, tmp_path)
    twin = linger.load_checkpoint(ResNet, path, channels=5)
    assert twin.training
    assert str(linger.summary(twin)) == str(linger.summary(model))
    assert_same(model, twin, x)
    again = linger.load_checkpoint(ResNet, saved(twin, tmp_path), channels=5)
    assert_same(model, again, x)


def test_a_loaded_model_trains_on_with_the_same_bits(tmp_path: Path) -> None:
    x = images()
    model = linger.prepare(ResNet(), (x,))
    STAGES["all"](model)
    train(model, (x,), 2, 0.05)
    twin = linger.load_checkpoint(ResNet, saved(model, tmp_path))
    for each in (model, twin):
        train(each, (x * 1.5,), 3, 0.05)
    assert_same(model, twin, x)


@each_case
def test_every_op_comes_back(case: Case) -> None:
    torch.manual_seed(3)
    model, inputs = case.build(random.Random(case.id))
    linger.prepare(model, inputs)
    linger.quantize(model)
    train(model, inputs, 2, 0.0)
    torch.manual_seed(3)
    twin, _ = case.build(random.Random(case.id))
    restore(twin, model.state_dict())
    twin.load_state_dict(model.state_dict())
    assert_same(model, twin, *inputs)


def test_the_recorded_dataflow_is_read_as_it_was() -> None:
    for case in ALL[::10]:
        model, inputs = case.build(random.Random(case.id))
        graph = instrumentation_of(linger.prepare(model, inputs)).graph
        again = graph_from_plain(json.loads(json.dumps(graph_to_plain(graph))))
        assert again.runs == graph.runs, case.id


VALUES: dict[str, Any] = {
    "plain": [None, True, 3, 0.5, float("inf"), "text"],
    "nested": ({"a": (1, [2, (3,)])}, []),
    "indices": (slice(None, 3), Ellipsis, slice(1, None, 2)),
    "torch": (torch.float16, torch.channels_last, torch.strided, torch.device("cpu")),
    "size": torch.Size([1, 2]),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_are_read_as_they_were(value: Any) -> None:
    again = value_from_plain(json.loads(json.dumps(value_to_plain(value))))
    assert again == value
    assert type(again) is type(value)


def test_marks_on_modules_come_back(tmp_path: Path) -> None:
    x = images()
    model = ResNet()
    linger.disable_quant(model.layers[0])
    linger.quant_module(model.fc, weight_bits=5)
    linger.disable_normalize(model.fc)
    linger.prepare(model, (x,))
    linger.quantize(linger.normalize(model, weight=0.1))
    train(model, (x,), 2, 0.05)
    assert_same(model, linger.load_checkpoint(ResNet, saved(model, tmp_path)), x)


# --- Lightning ----------------------------------------------------------------------------------


class Sized(Classifier):
    """A classifier with hyperparameters and a hook of its own."""

    def __init__(self, dropout: float, classes: int = 4) -> None:
        super().__init__(dropout)
        self.save_hyperparameters()
        self.fc = nn.Linear(8, classes)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=classes)
        self.epochs = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epochs"] = self.current_epoch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.epochs = checkpoint["epochs"]


def stages() -> list[Any]:
    return [
        FuseBNCallback(),
        NormalizeCallback(weight=4.0),
        QuantizeCallback(at_epoch=1, types=[nn.Conv2d, nn.Linear]),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sized]:
    pl.seed_everything(3, verbose=False)
    folder = tmp_path_factory.mktemp("run")
    model = Sized(0.2, classes=6)
    runner = trainer(folder, stages(), epochs=2)
    runner.fit(model, loader())
    runner.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt", model


def test_a_lightning_checkpoint_makes_the_model(run: tuple[Path, Sized]) -> None:
    path, model = run
    twin = linger.load_checkpoint(Sized, path)
    assert (twin.epochs, twin.hparams.dropout, twin.fc.out_features) == (2, 0.2, 6)
    assert_same(model, twin, next(iter(loader()))[0])


def test_arguments_replace_hyperparameters(run: tuple[Path, Sized]) -> None:
    assert linger.load_checkpoint(Sized, run[0], dropout=0.7).hparams.dropout == 0.7


def test_a_loaded_model_goes_on_with_the_callbacks_it_was_trained_with(
    run: tuple[Path, Sized], tmp_path: Path
) -> None:
    model = linger.load_checkpoint(Sized, run[0])
    before = {k: v.clone() for k, v in model.state_dict().items() if k.endswith(".range")}
    trainer(tmp_path, stages(), epochs=1).validate(model, loader(), verbose=False)
    after = model.state_dict()
    assert before
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_other_callbacks_are_refused_with_the_difference(
    run: tuple[Path, Sized], tmp_path: Path
) -> None:
    model = linger.load_checkpoint(Sized, run[0])
    other = [FuseBNCallback(), NormalizeCallback(weight=4.0), QuantizeCallback(weight_bits=4)]
    with pytest.raises(Exception, match=r"quantize\.weight_bits: 8, here 4.*strip"):
        trainer(tmp_path, other, epochs=1).validate(model, loader(), verbose=False)


def test_a_step_that_calls_one_part_comes_back(tmp_path: Path) -> None:
    class Part(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    model = Part()
    trainer(tmp_path, [QuantizeCallback()], epochs=1).fit(model, loader())
    twin = linger.load_checkpoint(Part, saved(model, tmp_path))
    target, args, kwargs = recorded_example(twin)
    assert target is twin.net
    assert [x.shape for x in args] == [(8, 1, 6, 6)]
    assert kwargs == {}
    x = next(iter(loader()))[0]
    assert torch.equal(model.eval().net(x), twin.eval().net(x))


def test_whole_numbers_among_the_inputs_are_kept() -> None:
    def forward(m: Any, tokens: Tensor, scale: float, extra: Tensor) -> Tensor:
        return m.fc(m.table(tokens) * scale + extra)

    model = Lambda(forward, table=nn.Embedding(9, 4), fc=nn.Linear(4, 3))
    tokens = torch.tensor([[8, 1], [3, 0]])
    linger.prepare(model, (tokens, 2.0), {"extra": torch.zeros(2, 2, 4)})
    _, args, kwargs = recorded_example(model)
    assert torch.equal(args[0], tokens)
    assert args[1] == 2.0
    assert kwargs["extra"].shape == (2, 2, 4)
    assert kwargs["extra"].std() > 0


# --- what does not fit --------------------------------------------------------------------------


class Other(ResNet):
    """The same weights, another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].relu = nn.GELU()


class Rewritten(ResNet):
    """The same modules, another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


def prepared() -> nn.Module:
    model = linger.prepare(ResNet(), (images(),))
    linger.quantize(model)
    train(model, (images(),), 1, 0.0)
    return model


def with_recipe(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    state = prepared().state_dict()
    recipe = recipe_of(state)
    change(recipe)
    return {**state, RECIPE_KEY: encode(recipe, {})}


def written(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


MISMATCHES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no file": (lambda f: linger.load_checkpoint(ResNet, f / "none.pt"), r"cannot read.*none\.pt"),
    "a float checkpoint": (
        lambda f: linger.load_checkpoint(ResNet, written(ResNet().state_dict(), f)),
        r"no quantization state.*linger\.prepare",
    ),
    "a pickled model": (
        lambda f: linger.load_checkpoint(ResNet, written({"model": nn.ReLU()}, f)),
        r"holds torch\.nn\.modules\.activation\.ReLU, which is not loaded",
    ),
    "another class": (
        lambda f: linger.load_checkpoint(lambda: Chain(nn.Linear(3, 3)), saved(prepared(), f)),
        r"another model than Chain: `bn` is BatchNorm2d in the checkpoint and missing here",
    ),
    "another layer": (
        lambda f: linger.load_checkpoint(Other, saved(prepared(), f)),
        r"`layers\.0\.relu` is ReLU in the checkpoint and GELU here",
    ),
    "another forward": (
        lambda f: linger.load_checkpoint(
            Rewritten, saved(prepared(), f), example_inputs=(images(),)
        ),
        r"does not make the calls.*Only in the checkpoint: \[\]; only here: \['/mul/0'\]",
    ),
    "another width": (
        lambda f: linger.load_checkpoint(ResNet, saved(prepared(), f), channels=7),
        r"model\.pt' does not fit ResNet.*size mismatch for stem\.weight",
    ),
    "missing arguments": (
        lambda f: linger.load_checkpoint(Sized, saved(prepared(), f)),
        r"cannot make Sized\(\).*dropout.*load_checkpoint",
    ),
    "an older format": (
        lambda f: linger.load_checkpoint(
            ResNet, written(with_recipe(lambda r: r.update(format=1)), f)
        ),
        r"format 1 of the quantization state, this version reads 2",
    ),
    "a damaged recipe": (
        lambda f: linger.load_checkpoint(
            ResNet,
            written({**prepared().state_dict(), RECIPE_KEY: torch.zeros(9, dtype=torch.uint8)}, f),
        ),
        r"quantization state of the checkpoint is damaged",
    ),
    "a recipe without its dataflow": (
        lambda f: linger.load_checkpoint(ResNet, written(with_recipe(lambda r: r.pop("graph")), f)),
        r"cannot be read \(KeyError\('graph'\)\)",
    ),
    "a setting of another version": (
        lambda f: linger.load_checkpoint(
            ResNet, written(with_recipe(lambda r: r["plans"]["quantize"].update(turbo=1)), f)
        ),
        r"QuantConfig has no field 'turbo'",
    ),
    "a stage of another version": (
        lambda f: linger.load_checkpoint(
            ResNet, written(with_recipe(lambda r: r["plans"].update(prune={})), f)
        ),
        r"a stage 'prune' that this version does not know",
    ),
    "an op that is not registered": (
        lambda f: linger.load_checkpoint(
            ResNet,
            written(with_recipe(lambda r: [n.update(op="mine") for n in r["graph"]["nodes"]]), f),
        ),
        r"the op 'mine' is not registered\. Import",
    ),
    "an argument that is no plain data": (
        lambda f: linger.load_checkpoint(
            ResNet,
            written(
                with_recipe(
                    lambda r: r["graph"]["nodes"][0]["args"]["tuple"].append(
                        {"unreadable": "Thing <thing>"}
                    )
                ),
                f,
            ),
        ),
        r"takes an argument that a checkpoint does not hold: Thing.*example_inputs",
    ),
}


@pytest.mark.parametrize(("load", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_what_does_not_fit_is_named(
    load: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(linger.LingerError, match=f"(?s){message}"):
        load(tmp_path)


def test_a_model_that_does_not_fit_is_left_float() -> None:
    model = Other()
    with pytest.raises(linger.ConfigError):
        restore(model, prepared().state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(linger.ConfigError):
        restore(ResNet(), with_recipe(lambda r: r["plans"].update(prune={})))


def test_the_same_forward_passes_the_check(tmp_path: Path) -> None:
    model, x = prepared(), images()
    twin = linger.load_checkpoint(ResNet, saved(model, tmp_path), example_inputs=(x,))
    assert_same(model, twin, x)


def test_a_state_of_other_settings_is_refused_with_the_difference() -> None:
    model = linger.prepare(ResNet(), (images(),))
    linger.quantize(model, linger.QuantConfig(weight_bits=4), overrides={"stem": None})
    with pytest.raises(linger.ConfigError, match=r"quantize\.weight_bits: 8, here 4"):
        model.load_state_dict(prepared().state_dict())


def test_the_recipe_is_plain_readable_data() -> None:
    recipe = decode(prepared().state_dict()[RECIPE_KEY])
    assert recipe["quantize"] is True
    assert recipe["plans"]["quantize"]["platform"] == "venusa"
    assert recipe["owners"]["stem"] == "Conv2d"
    assert json.loads(json.dumps(recipe)) == recipe


def test_plans_stand_in_the_order_of_planning() -> None:
    model = linger.prepare(ResNet(), (images(),))
    linger.normalize(model)
    linger.fuse_bn(model)
    linger.quantize(model)
    linger.normalize(model, weight=2.0)
    plans = recipe_of(model.state_dict())["plans"]
    assert list(plans) == ["fuse_bn", "quantize", "normalize"]
    assert plans["normalize"]["weight"] == 2.0


def test_settings_are_compared_by_name() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": {}}) == [
        "a.c: 2, here 3",
        "d: nothing, here {}",
    ]


def test_a_run_without_its_stages_says_so(tmp_path: Path) -> None:
    model = fitted(tmp_path, [], epochs=1)
    with pytest.raises(linger.ConfigError, match="no quantization state"):
        linger.load_checkpoint(Classifier, saved(model, tmp_path))
