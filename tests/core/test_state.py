"""State: the float model stays what it is, under every stage, through copies and files."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import ResNet, assert_integer_exact, float_state, images, train

STAGES: dict[str, Callable[[nn.Module], Any]] = {
    "prepared": lambda model: model,
    "fused": linger.fuse_bn,
    "normalized": linger.normalize,
    "normalized-dynamic": lambda model: linger.normalize(model, "9*mean", "99%", "99.9%"),
    "quantized": linger.quantize,
    "all": lambda model: linger.quantize(linger.normalize(linger.fuse_bn(model))),
}


def staged(name: str, model: nn.Module | None = None) -> nn.Module:
    model = linger.prepare(model or ResNet(), (images(),))
    STAGES[name](model)
    return model


each_stage = pytest.mark.parametrize("stage", STAGES)


@each_stage
def test_the_float_keys_and_tensors_are_untouched(stage: str) -> None:
    model = ResNet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    staged(stage, model)
    after = float_state(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(isinstance(value, Tensor) for value in model.state_dict().values())


@each_stage
def test_a_float_checkpoint_loads_strictly(stage: str) -> None:
    checkpoint = ResNet().state_dict()
    model = staged(stage)
    model.load_state_dict(checkpoint, strict=True)
    assert all(torch.equal(model.state_dict()[key], checkpoint[key]) for key in checkpoint)


@each_stage
def test_strict_loading_still_finds_what_is_missing(stage: str) -> None:
    model = staged(stage)
    checkpoint = model.state_dict()
    del checkpoint["fc.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*fc\.bias"):
        model.load_state_dict(checkpoint)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*nonsense"):
        model.load_state_dict({**model.state_dict(), "nonsense": torch.zeros(1)})


@each_stage
def test_parameters_keep_their_identity(stage: str) -> None:
    model = ResNet()
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    optimizer = torch.optim.AdamW(
        [{"params": model.fc.parameters(), "lr": 1e-2}, {"params": model.layers.parameters()}]
    )
    before = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    staged(stage, model)
    train(model, (images(),), 1, 0.01)
    now = dict(model.named_parameters())
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] for name in parameters)
    found = {name: module for name, module in model.named_modules() if "_linger" not in name}
    assert list(found) == list(modules)
    assert all(found[name] is modules[name] for name in modules)
    assert type(model.stem) is nn.Conv2d
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == before


@each_stage
def test_tied_weights_stay_tied(stage: str) -> None:
    model = ResNet()
    model.layers[1].conv1.weight = model.layers[0].conv1.weight
    staged(stage, model)
    train(model, (images(),), 2, 0.05)
    assert model.layers[1].conv1.weight is model.layers[0].conv1.weight
    twin = copy.deepcopy(model)
    assert twin.layers[1].conv1.weight is twin.layers[0].conv1.weight


@each_stage
def test_strip_gives_the_float_model_back(stage: str) -> None:
    model = ResNet()
    reference = copy.deepcopy(model)
    x = images()
    staged(stage, model)
    with torch.no_grad():
        model.eval()(x)
    assert linger.strip(model) is model
    assert list(model.state_dict()) == list(reference.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(x), reference.eval()(x))
    assert not hasattr(model, "_linger")
    assert linger.strip(model) is model


@each_stage
def test_strip_after_training_keeps_what_was_trained(stage: str) -> None:
    model = staged(stage)
    train(model, (images(),), 2, 0.05)
    state = {key: value.clone() for key, value in float_state(model).items()}
    linger.strip(model).eval()
    reference = ResNet().eval()
    reference.load_state_dict(state)
    x = images()
    assert torch.equal(model(x), reference(x))


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_stage
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, _pickled, _saved], ids=["deepcopy", "pickle", "save"]
)
def test_copies(stage: str, copier: Callable[[nn.Module], nn.Module]) -> None:
    model = staged(stage)
    x = images()
    train(model, (x,), 2, 0.05)
    model.eval()
    expected = model(x)
    twin = copier(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert torch.equal(twin(x), expected)
    if stage in ("quantized", "all"):
        assert_integer_exact(twin, x)
        with linger.integer(twin):
            assert torch.equal(model(x), expected)
    # A copy stands on its own: training it moves neither weights nor ranges of the original.
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(twin, (x * 3,), 2, 0.05)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin.eval()(x), expected)


@each_stage
def test_a_state_dict_in_a_file_restores_the_ranges(stage: str) -> None:
    model = staged(stage)
    x = images()
    train(model, (x,), 2, 0.05)
    expected = model.eval()(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = staged(stage)
    twin.load_state_dict(torch.load(file, weights_only=True))
    twin.eval()
    assert torch.equal(twin(x), expected)
    if stage in ("quantized", "all"):
        assert_integer_exact(twin, x)


def test_loading_in_evaluation_mode_forgets_what_was_derived() -> None:
    x = images()
    source, target = staged("all"), staged("all")
    train(source, (x * 4,), 2, 0.05)
    train(target, (x,), 2, 0.05)
    source.eval()
    target.eval()
    target(x)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))
    assert_integer_exact(target, x)


def _ranges(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.endswith(("range", "output_bound"))}


@pytest.mark.parametrize("stage", ["quantized", "normalized-dynamic", "all"])
@pytest.mark.parametrize("convert", ["to", "double", "half", "bfloat16"])
def test_ranges_stay_float32(stage: str, convert: str) -> None:
    model = staged(stage)
    train(model, (images(),), 2, 0.0)
    before = {key: value.clone() for key, value in _ranges(model).items()}
    assert before
    if convert == "to":
        model.to("cpu")
    else:
        getattr(model, convert)()
    after = _ranges(model)
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_model_in_double_is_exact() -> None:
    model = ResNet().double()
    x = images().double()
    linger.prepare(model, (x,))
    linger.quantize(linger.fuse_bn(model))
    train(model, (x,), 3, 0.05)
    assert_integer_exact(model.eval(), x)
    assert model(x).dtype == torch.float64


def test_a_model_switched_to_double_is_exact() -> None:
    model = staged("all")
    x = images()
    train(model, (x,), 3, 0.05)
    model.double().eval()
    assert_integer_exact(model, x.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_is_exact(dtype: torch.dtype) -> None:
    model = ResNet().to(dtype)
    x = images().to(dtype)
    linger.prepare(model, (x,))
    linger.quantize(model)
    train(model, (x,), 2, 0.0)
    model.eval()
    assert model(x).dtype == dtype
    assert_integer_exact(model, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = staged("all")
    x = images()
    model.train()
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype):
            model(x).float().sum().backward()
    model.eval()
    with torch.autocast("cpu", dtype=dtype):
        assert_integer_exact(model, x)


def _run(model: nn.Module, steps: int, seed: int = 5) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9
    )
    outputs = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        outputs.append(model(torch.randn(4, 3, 12, 12)))
        outputs[-1].square().mean().backward()
        optimizer.step()
    outputs += [p.grad for p in model.parameters()]
    outputs.append(model.eval()(torch.randn(4, 3, 12, 12)))
    return outputs, float_state(model)


OFF: dict[str, Callable[[nn.Module], Any]] = {
    "prepared": lambda model: model,
    "planned": lambda model: _plan_everything(model),
    "switched-off": lambda model: _switch_everything_off(model),
    "stripped": lambda model: linger.strip(linger.quantize(linger.fuse_bn(model))),
}


def _plan_everything(model: nn.Module) -> None:
    from lightning_linger.stages.fuse_bn import plan_fuse_bn
    from lightning_linger.stages.normalize import plan_normalize
    from lightning_linger.stages.quantize import plan_quantize

    plan_fuse_bn(model, linger.FuseConfig())
    plan_normalize(model, linger.NormalizeConfig(0.01, 0.01, 0.01))
    plan_quantize(model, linger.QuantConfig())


def _switch_everything_off(model: nn.Module) -> None:
    linger.quantize(linger.normalize(linger.fuse_bn(model), 0.01, 0.01, 0.01))
    with torch.no_grad():
        model.eval()(images())
    switches = instrumentation_of(model).switches
    switches.fuse = switches.normalize = switches.quantize = False


@pytest.mark.parametrize("off", OFF.values(), ids=OFF)
def test_stages_that_are_off_change_no_bit(off: Callable[[nn.Module], Any]) -> None:
    plain = ResNet(dropout=0.3)
    model = copy.deepcopy(plain)
    linger.prepare(model, (images(),))
    off(model)
    expected, state = _run(plain, 4)
    found, after = _run(model, 4)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)


def test_integer_context() -> None:
    x = images()
    model = linger.prepare(ResNet(), (x,))
    with pytest.raises(linger.NotReadyError, match="quantize stage is off"), linger.integer(model):
        pass
    linger.quantize(model)
    with pytest.raises(linger.NotReadyError, match="training mode"), linger.integer(model):
        pass
    train(model, (x,), 2, 0.0)
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fake = model(x)
    with linger.integer(model) as inner:
        assert inner is model
        with linger.integer(model):
            model(x)
        assert instrumentation_of(model).switches.system == "integer"
        model(x)
    assert instrumentation_of(model).switches.system == "fake"
    with pytest.raises(KeyError), linger.integer(model):
        raise KeyError
    assert instrumentation_of(model).switches.system == "fake"
    assert torch.equal(model(x), fake)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_evaluation_moves_no_range() -> None:
    model = staged("all")
    train(model, (images(),), 2, 0.0)
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(images() * 100)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_training_moves_ranges_without_gradients_too() -> None:
    model = staged("quantized")
    with torch.no_grad():
        model(images())
        before = {key: value.clone() for key, value in _ranges(model).items()}
        model(images() * 10)
    after = _ranges(model)
    assert any(not torch.equal(after[key], before[key]) for key in before)
