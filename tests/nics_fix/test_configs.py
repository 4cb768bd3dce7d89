"""Fix configurations: exact, nested, and what they restore is used; rows 21, 22, 24, 29."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.nics_fix import (
    FIX_AUTO,
    FIX_FIXED,
    FIX_NONE,
    fix_configs_as,
    fix_table,
    get_fix_configs,
    load_fix_configs,
    print_fix_configs,
    set_fix_method,
)
from tests.models import Chain
from tests.nics_fix.models import batch, network, train

CONFIGS: dict[str, dict[str, Any]] = {
    "power of two": {},
    "free": {"float_scale": True},
    "per channel": {"granularity": "channel"},
    "free per channel": {"float_scale": True, "granularity": "channel"},
    "four bits": {"bitwidth": 4},
    "strict": {"strict_maximum": True},
    "zero points": {"platform": "tflite"},
    "learned": {"range": "tqt", "weight_range": "lsq"},
}


def evaluated(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch())


def test_row21_a_dict_of_module_item_and_gradient() -> None:
    model, x = network(bitwidth=4, gradient_bits=16)
    model(x).square().sum().backward()
    data, grads = get_fix_configs(model), get_fix_configs(model, grad=True, data_only=True)
    assert list(data) == ["net.0", "net.2.inner.0", "net.2", "net.4"]
    assert list(data["net.0"]) == ["weight", "bias", "input0", "activation"]
    assert list(data["net.2"]) == ["activation"]
    weight = data["net.0"]["weight"]
    assert (weight["method"], weight["bitwidth"], weight["range_method"]) == (1, 4, 0)
    largest = model.net[0].weight.detach().abs().max()
    assert isinstance(weight["scale"], Tensor)
    assert weight["scale"] / 2 < largest <= weight["scale"]
    assert data["net.0"]["bias"] == {
        "method": 1,
        "scale": None,
        "bitwidth": 32,
        "range_method": 0,
    }
    assert {c["bitwidth"] for items in grads.values() for c in items.values()} == {16}
    assert grads["net.0"]["weight"]["scale"] > 0
    # The input has no gradient.
    assert grads["net.0"]["input0"]["scale"] is None


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_row21_row22_scales_are_exact_in_json_and_yaml_and_used_again(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    model, _ = network(**fields)
    train(model, 4)
    set_fix_method(model, FIX_FIXED)
    # The optimizer has moved the weights since: FIXED keeps the scales of the latest forward.
    expected = evaluated(model)
    configs = get_fix_configs(model, data_only=True)
    found = [torch.tensor(c["scale"] or 1.0) for i in configs.values() for c in i.values()]
    assert "range" in fields or any((scale < 1).any() for scale in found)
    file = tmp_path / "fix.yaml"
    file.write_text(yaml.safe_dump({"data": configs}))
    assert yaml.safe_load(file.read_text())["data"] == configs
    assert json.loads(json.dumps(configs)) == configs

    other, x = network(**fields)
    other(x * 40)
    for learned in linger.learned_ranges(other).values():
        learned.data.mul_(2.5)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("_linger")}
    other.load_state_dict(weights, strict=False)
    other.train()
    assert not torch.equal(evaluated(other), expected)
    report = load_fix_configs(other, yaml.safe_load(file.read_text())["data"])
    assert report.missing == report.unexpected == []
    assert torch.equal(evaluated(other), expected)
    assert get_fix_configs(other, data_only=True) == configs
    train(other, 10)
    assert get_fix_configs(other, data_only=True) == configs


def test_row22_into_a_model_that_has_seen_nothing() -> None:
    model, x = network()
    train(model, 2)
    set_fix_method(model, FIX_FIXED)
    expected = evaluated(model)
    torch.manual_seed(0)
    fresh = copy.deepcopy(linger.strip(copy.deepcopy(model)))
    linger.prepare(fresh, (x,))
    linger.quantize(fresh, linger.preset("nics_fix"))
    assert not torch.equal(evaluated(fresh), expected)
    load_fix_configs(fresh, get_fix_configs(model))
    assert torch.equal(evaluated(fresh), expected)


def test_row22_recurrent_layers_have_a_scale_per_weight() -> None:
    def build() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = nn.LSTM(4, 3, batch_first=True)
        x = torch.randn(2, 5, 4)
        linger.prepare(model, (x,))
        linger.quantize(model, linger.preset("nics_fix"))
        return model, x

    model, x = build()
    model(x)
    model.weight_hh_l0.data.mul_(9)
    model(x)
    set_fix_method(model, FIX_FIXED)
    configs = get_fix_configs(model, data_only=True)
    (items,) = configs.values()
    scales = {name: config["scale"] for name, config in items.items() if "hh" in name}
    assert list(scales.values()) == [8.0]
    other, _ = build()
    load_fix_configs(other, configs)
    assert get_fix_configs(other, data_only=True) == configs
    other.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("_linger")}, strict=False
    )
    with torch.no_grad():
        assert torch.equal(other.eval()(x)[0], model.eval()(x)[0])


def test_row22_what_does_not_fit_is_reported_and_changes_nothing() -> None:
    model, _ = network()
    before = get_fix_configs(model, data_only=True)
    configs = copy.deepcopy(before)
    configs["net.0"]["activation"]["scale"] = 64.0
    for item in ("activation", "input0"):
        configs["net.0"][item]["method"] = FIX_FIXED
    configs["net.9"] = configs.pop("net.4")
    with pytest.raises(ConfigError, match=r"Missing: \['net.4: weight'.*model: \['net.9: weight'"):
        load_fix_configs(model, configs)
    assert get_fix_configs(model, data_only=True) == before
    report = load_fix_configs(model, configs, strict=False)
    assert report.missing == ["net.4: weight", "net.4: bias", "net.4: activation"]
    assert report.unexpected == ["net.9: weight", "net.9: bias", "net.9: activation"]
    assert get_fix_configs(model, data_only=True)["net.0"]["activation"]["scale"] == 64.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bitwidth": 4}, "`net.0: weight` has 8 bits here and 4 in the fix configs"),
        ({"range_method": 3}, "has range method 0 here and 3"),
        ({"method": 3}, r"one of FIX_NONE \(0\).*Found: 3"),
        ({"scale": -1.0}, "a scale is a positive number"),
        ({"scale": 0.3}, "has no step"),
        ({"bits": 8}, "no field 'bits'"),
        ({"method": "auto"}, "one of FIX_NONE.*Found: 'auto'"),
        ({"scale": "wide"}, "a scale is a number, or a list of numbers. Found: 'wide'"),
        ({"scale": [1.0, 2.0]}, "`net.0: weight` has 1 scales here and 2 in the fix configs"),
    ],
)
def test_row22_wrong_values_are_refused(change: dict[str, Any], message: str) -> None:
    model, _ = network()
    before = get_fix_configs(model, data_only=True)
    with pytest.raises(ConfigError, match=message):
        load_fix_configs(model, {"net.0": {"weight": change}}, strict=False)
    assert get_fix_configs(model, data_only=True) == before


@pytest.mark.parametrize("configs", [None, [], {"net.0": 2}, {"net.0": {"weight": 2}}])
def test_row22_what_is_no_configuration_is_refused(configs: Any) -> None:
    model, _ = network()
    with pytest.raises(ConfigError, match=r"fix configs are \{module: \{item: \{field: value"):
        load_fix_configs(model, configs)


@pytest.mark.parametrize(("item", "grad"), [("activation", False), ("weight", True)])
def test_row22_one_value_has_one_scale(item: str, grad: bool) -> None:
    model, _ = network(gradient_bits=8)
    before = get_fix_configs(model, grad, data_only=True)
    with pytest.raises(ConfigError, match=f"`net.0: {item}` has 1 scales here and 3"):
        load_fix_configs(model, {"net.0": {item: {"scale": [1.0] * 3}}}, grad, strict=False)
    assert get_fix_configs(model, grad, data_only=True) == before


def test_row22_as_many_scales_as_channels_also_before_the_first_forward() -> None:
    model, x = Chain(nn.Linear(4, 3)), torch.randn(2, 4)
    linger.prepare(model, (x,))
    linger.quantize(model, linger.preset("nics_fix", granularity="channel"))
    weight = {"method": FIX_FIXED, "scale": [1.0, 2.0]}
    load_fix_configs(model, {"net.0": {"weight": weight}}, strict=False)
    with pytest.raises(ConfigError, match=r"`net.0/linear/0`: its weight has 3 scales.* 2 fixed"):
        model(x)


def test_row22_gradients() -> None:
    model, x = network(gradient_bits=8)
    model(x).square().sum().backward()
    configs = get_fix_configs(model, grad=True, data_only=True)
    configs["net.0"]["weight"]["scale"] = 2.0**-20
    configs["net.0"]["weight"]["method"] = FIX_FIXED
    load_fix_configs(model, configs, grad=True)
    model.zero_grad()
    model(x).square().sum().backward()
    found = model.net[0].weight.grad
    assert found is not None
    assert found.abs().max() == 2.0**-20
    assert get_fix_configs(model, grad=True)["net.0"]["weight"]["scale"] == 2.0**-20


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_row22_gradients_of_several_weights_have_a_scale_each(kind: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layer: Any = nn.LSTM(4, 4) if kind == "lstm" else nn.MultiheadAttention(4, 2)
        example = (x,) if kind == "lstm" else (x, x, x)
        linger.prepare(layer, example)
        return linger.quantize(layer, linger.preset("nics_fix", gradient_bits=6))

    def gradients(model: nn.Module, factor: float) -> None:
        y = (model(x) if kind == "lstm" else model(x, x, x))[0]
        y.square().sum().mul(factor).backward()

    x = torch.randn(5, 2, 4)
    model = build()
    gradients(model, 1.0)
    (items,) = get_fix_configs(model, grad=True, data_only=True).values()
    found = {name: one["scale"] for name, one in items.items() if name.endswith("weight")}
    assert len(found) == (2 if kind == "lstm" else 4)
    assert len(set(found.values())) > 1
    set_fix_method(model, FIX_FIXED, grad=True)
    configs = get_fix_configs(model, grad=True, data_only=True)
    other = build()
    load_fix_configs(other, configs, grad=True)
    for one in (model, other):
        gradients(one, 50.0)
    for one in (model, other):
        (items,) = get_fix_configs(one, grad=True, data_only=True).values()
        assert {n: items[n]["scale"] for n in found} == found


def test_row26_statistics_have_no_gradient() -> None:
    model, x = Chain(nn.BatchNorm1d(4)), torch.randn(6, 4)
    linger.prepare(model, (x,))
    linger.quantize(model, linger.preset("nics_fix", gradient_bits=6, statistics_bits=6))
    model(x).sum().backward()
    model.eval()(x)
    assert "running_mean" in get_fix_configs(model)["net.0"]
    gradients = get_fix_configs(model, grad=True)["net.0"]
    assert [name for name in gradients if name.startswith("running")] == []


def test_row24_a_table_of_scales_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = network(gradient_bits=16)
    model(x).square().sum().backward()
    set_fix_method(model, FIX_FIXED, by_name={"net.4": {"weight": FIX_NONE}})
    set_fix_method(model, FIX_FIXED, grad=True)
    table = fix_table(model)
    assert capsys.readouterr().out == ""
    row = next(row for row in table if (row.module, row.item) == ("net.0", "activation"))
    config = get_fix_configs(model, data_only=True)["net.0"]["activation"]
    exponent = torch.log2(torch.tensor(config["scale"])).item()
    assert (row.bits, row.scale, row.method) == ("8", f"2^{exponent:.0f}", "fixed")
    assert (row.grad_bits, row.grad_method) == ("16", "fixed")
    assert row.grad_scale.startswith("2^-")
    floating = next(row for row in table if (row.module, row.item) == ("net.4", "weight"))
    assert (floating.bits, floating.scale, floating.method) == ("f", "", "none")
    lines = str(table).splitlines()
    assert len(lines) == 1 + len(table)
    assert lines[0].split() == ["module", "item", *("bits", "scale", "method")] + [
        f"grad_{name}" for name in ("bits", "scale", "method")
    ]
    print_fix_configs(model)
    assert capsys.readouterr().out == f"{table}\n"


def test_row29_other_configs_for_one_forward() -> None:
    model, x = network()
    train(model, 2)
    model.train()
    before = get_fix_configs(model, data_only=True)
    state = copy.deepcopy(instrumentation_of(model).state_dict())
    plain = evaluated(model)
    override = {"net.4": {"activation": {"method": FIX_FIXED, "scale": 2.0**-4}}}
    with fix_configs_as(model, override):
        narrow = evaluated(model)
    assert narrow.abs().max() <= 2.0**-4
    assert not torch.equal(narrow, plain)
    assert torch.equal(evaluated(model), plain)
    model.train()
    # What a forward inside moves is not kept either.
    with fix_configs_as(model, {"net.0": {"weight": {"method": FIX_NONE}}}):
        model(x * 50)
    assert get_fix_configs(model, data_only=True) == before
    after = instrumentation_of(model).state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)


def everything(model: nn.Module) -> tuple[Any, ...]:
    configs = [get_fix_configs(model, grad=grad, data_only=True) for grad in (False, True)]
    return (*configs, str(linger.summary(model)), instrumentation_of(model).switches.quantize)


def test_row29_what_a_configuration_changes_comes_back() -> None:
    """A scale of a weight, a step of a result, a method of a gradient, quantization itself."""
    model, x = network(gradient_bits=8)
    train(model, 2)
    before = everything(model)
    weight = {"net.0": {"weight": {"method": FIX_AUTO, "scale": 8.0}}}
    with fix_configs_as(model, weight):
        assert everything(model) != before
    assert everything(model) == before
    result = {"net.4": {"activation": {"method": FIX_FIXED, "scale": 2.0**-9}}}
    with fix_configs_as(model, result):
        model(x)
        assert everything(model)[2] != before[2]
    assert everything(model) == before
    gradient = {"net.0": {"weight": {"method": FIX_NONE}, "bias": {"method": FIX_FIXED}}}
    with fix_configs_as(model, gradient, grad=True):
        assert everything(model)[1] != before[1]
    assert everything(model) == before
    set_fix_method(model, FIX_NONE)
    in_float = everything(model)
    with fix_configs_as(model, {"net.0": {"weight": {"method": FIX_AUTO}}}):
        assert instrumentation_of(model).switches.quantize
    assert everything(model) == in_float


def test_row29_ends_at_an_error() -> None:
    model, _ = network()
    before = get_fix_configs(model, data_only=True)
    override = {"net.0": {"activation": {"method": FIX_NONE}, "input0": {"method": FIX_NONE}}}
    wrong = torch.zeros(1, 9, 6, 6)
    with pytest.raises(RuntimeError, match="channels"), fix_configs_as(model, override):
        model(wrong)
    assert get_fix_configs(model, data_only=True) == before
    with (
        pytest.raises(ConfigError, match=r"the model has no net.7: weight"),
        fix_configs_as(model, {"net.7": {"weight": {"method": FIX_NONE}}}),
    ):
        pass
    assert get_fix_configs(model, data_only=True) == before


def test_a_model_that_is_not_quantized() -> None:
    model = Chain(nn.Linear(2, 2))
    linger.prepare(model, (torch.randn(3, 2),))
    with pytest.raises(ConfigError, match="is not quantized"):
        get_fix_configs(model)


def test_a_module_that_makes_several_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.fc(self.fc(x)) + x)

    model, x = Twice(), torch.randn(3, 4)
    linger.prepare(model, (x,))
    linger.quantize(model)
    model(x)
    assert list(get_fix_configs(model)) == ["fc", "fc@1", "/add/0", "/tanh/0"]
    assert get_fix_configs(model)["fc"]["weight"]["method"] == FIX_AUTO
