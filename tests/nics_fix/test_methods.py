"""Methods switch for real: float, moving, fixed; rows 1, 16, 17, 19, 20, 23, 25, 31."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, UnsupportedError
from lightning_linger.core.fake_quantize import fake_quantize
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.nics_fix import (
    FIX_AUTO,
    FIX_FIXED,
    FIX_NONE,
    RANGE_3SIGMA,
    RANGE_MAX,
    RANGE_MAX_TENPERCENT,
    RANGE_SWEEP,
    fix_state_dict,
    get_fix_configs,
    set_fix_method,
)
from tests.models import Chain, assert_integer_exact, site_of
from tests.nics_fix.models import network, train


def methods(model: nn.Module, grad: bool = False) -> dict[tuple[str, str], int]:
    configs = get_fix_configs(model, grad=grad)
    return {(m, item): c["method"] for m, items in configs.items() for item, c in items.items()}


def scales(model: nn.Module, grad: bool = False) -> dict[tuple[str, str], Any]:
    configs = get_fix_configs(model, grad=grad, data_only=True)
    return {(m, item): c["scale"] for m, items in configs.items() for item, c in items.items()}


def test_row01_constants() -> None:
    assert (FIX_NONE, FIX_AUTO, FIX_FIXED) == (0, 1, 2)
    assert (RANGE_MAX, RANGE_3SIGMA, RANGE_MAX_TENPERCENT, RANGE_SWEEP) == (0, 1, 2, 3)


def test_row01_none_is_the_float_model_and_keeps_every_scale() -> None:
    model, x = network()
    train(model, 2)
    model.train()
    before = scales(model)
    float_model = linger.strip(copy.deepcopy(model))
    set_fix_method(model, FIX_NONE)
    assert set(methods(model).values()) == {FIX_NONE}
    assert torch.equal(model(x * 7), float_model(x * 7))
    set_fix_method(model, FIX_AUTO)
    assert scales(model) == before
    assert not torch.equal(model(x * 70), float_model(x * 70))
    assert scales(model) != before


@pytest.mark.parametrize("float_scale", [False, True])
def test_row16_fixed_never_changes_a_scale(float_scale: bool) -> None:
    model, _ = network(float_scale=float_scale, gradient_bits=8)
    train(model, 3)
    set_fix_method(model, FIX_FIXED)
    set_fix_method(model, FIX_FIXED, grad=True)
    data, grads, weight = scales(model), scales(model, grad=True), model.net[0].weight.clone()
    train(model, 10)
    assert scales(model) == data
    assert scales(model, grad=True) == grads
    assert not torch.equal(model.net[0].weight, weight)
    set_fix_method(model, FIX_AUTO)
    set_fix_method(model, FIX_AUTO, grad=True)
    train(model, 6, seed=9)
    assert scales(model) != data
    assert scales(model, grad=True) != grads


@pytest.mark.parametrize("item", ["weight", "activation"])
def test_row17_items_of_one_module_are_fixed_apart(item: str) -> None:
    model, _ = network(float_scale=True)
    train(model, 2)
    before = scales(model)
    set_fix_method(model, by_name={"net.0": {item: FIX_FIXED}})
    train(model, 12, lr=2.0, seed=4)
    after = scales(model)
    moved = {key for key in before if before[key] != after[key] and key[0] == "net.0"}
    names = {"weight": {"weight"}, "activation": {"activation", "input0"}}
    still = {("net.0", name) for name in names[item]}
    assert moved == {("net.0", n) for n in ("weight", "input0", "activation")} - still


def test_row17_one_config_object_for_all_modules_shares_no_state() -> None:
    config = linger.preset("nics_fix")
    model = Chain(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(5, 4)
    linger.prepare(model, (x,))
    linger.quantize(model, config)
    model.net[1].weight.data.mul_(32)
    model(x)
    found = scales(model)
    assert found[("net.1", "weight")] == 32 * found[("net.0", "weight")]
    assert found[("net.1", "activation")] > 4 * found[("net.0", "activation")]
    set_fix_method(model, by_name={"net.1": {"weight": FIX_FIXED}})
    assert methods(model)[("net.0", "weight")] == FIX_AUTO


def test_row17_gradients_of_items_are_set_apart() -> None:
    model, x = network(gradient_bits=4)
    set_fix_method(model, FIX_NONE, by_name={"net.4": {"weight": FIX_AUTO}}, grad=True)
    train(model, 1)
    found = methods(model, grad=True)
    assert found.pop(("net.4", "weight")) == FIX_AUTO
    assert set(found.values()) == {FIX_NONE}
    model.train()
    model(x)
    model.zero_grad()
    model(x).square().sum().backward()
    scale = scales(model, grad=True)[("net.4", "weight")]
    codes = model.net[4].weight.grad / (scale / 8)
    assert torch.equal(codes, codes.round())
    bias = model.net[4].bias.grad
    set_fix_method(model, FIX_NONE, grad=True)
    model.zero_grad()
    model(x).square().sum().backward()
    assert torch.equal(bias, model.net[4].bias.grad)
    assert not torch.equal(codes * (scale / 8), model.net[4].weight.grad)


@pytest.mark.parametrize("kind", ["weight", "bias", "activation"])
@pytest.mark.parametrize("training", [True, False])
def test_row17_one_item_in_float_and_the_others_on_their_grids(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(6, 4), nn.Linear(4, 3))
    x = torch.randn(5, 6)
    linger.prepare(model, (x,))
    # A result is rounded to the accumulator's grid or a coarser one: behind it no bias shows.
    output_bits = None if kind == "bias" else 14
    config = linger.preset("nics_fix", bitwidth=4, bias_bits=8, output_bits=output_bits)
    linger.quantize(model, config)
    model(x)
    set_fix_method(model, FIX_FIXED, by_name={"net.0": {kind: FIX_NONE}})
    model.train(training)
    first = site_of(model, "net.0/linear/0")
    step = {name: float(q.step()) for name, q in first.inputs.items()}["0"]
    weight = first.weights.step_in_use("weight").item()

    def on_grid(values: Tensor, step: float, bits: int, item: str) -> Tensor:
        if kind == item:
            return values
        return fake_quantize(values, step, -(1 << (bits - 1)), (1 << (bits - 1)) - 1, "half_up")

    layer = model.net[0]
    y = nn.functional.linear(
        on_grid(x, step, 4, "activation"),
        on_grid(layer.weight, weight, 4, "weight"),
        on_grid(layer.bias, weight * step, 8, "bias"),
    )
    if first.output is not None:
        y = on_grid(y, float(first.output.step(weight * step)), 14, "activation")
    seen: list[Tensor] = []
    hook = model.net[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    model(x)
    hook.remove()
    torch.testing.assert_close(seen[0], y, atol=1e-6, rtol=1e-6)
    assert not torch.equal(y, on_grid_all(model, x)), "the item would have been rounded"


def on_grid_all(model: nn.Module, x: Tensor) -> Tensor:
    other = copy.deepcopy(model)
    set_fix_method(other, FIX_FIXED)
    seen: list[Tensor] = []
    other.net[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    other(x)
    return seen[0]


@pytest.mark.parametrize("reader", [nn.Softmax(-1), nn.Tanh()], ids=["softmax", "tanh"])
def test_row17_what_stays_float_keeps_its_range_and_is_read_as_it_is(reader: nn.Module) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(6, 4), copy.deepcopy(reader))
    x = torch.randn(5, 6)
    linger.prepare(model, (x,))
    linger.quantize(model, linger.preset("nics_fix", bitwidth=3, output_bits=3))
    model(x)
    before = scales(model)
    set_fix_method(model, FIX_NONE, by_name={"net.1": {"activation": FIX_AUTO}})
    model(x * 9)
    assert scales(model) == before
    model.eval()
    with torch.no_grad():
        found = model(x)
        layer = model.net[0]
        real = reader(nn.functional.linear(x, layer.weight, layer.bias))
    step = 0.25
    expected = fake_quantize(real, step, -4, 3, "half_up")
    assert torch.equal(found, expected)
    set_fix_method(model, FIX_AUTO)
    with torch.no_grad():
        assert not torch.equal(model(x), expected)


def test_integers_need_every_item_on_its_grid() -> None:
    model, x = network()
    set_fix_method(model, FIX_FIXED, by_name={"net.4": {"weight": FIX_NONE}})
    rows = {row.site: row.why_float for row in linger.summary(model)}
    assert rows["net.4/linear/0"] == "left in float: weights"
    assert rows["net.0/conv2d/0"] == ""
    model.eval()
    with (
        pytest.raises(UnsupportedError, match=r"net.4/linear/0.*weights are left in float"),
        linger.integer(model),
    ):
        model(x)
    set_fix_method(model, FIX_FIXED)
    assert_integer_exact(model, x)


@pytest.mark.parametrize("layer", [nn.Softmax(-1), nn.LayerNorm(4), nn.MultiheadAttention(4, 1)])
def test_what_an_op_cannot_leave_in_float(layer: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.last = nn.Linear(4, 4), layer, nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = self.layer(y, y, y)[0] if isinstance(layer, nn.MultiheadAttention) else layer(y)
            return self.last(y)

    model, x = Net(), torch.randn(3, 4)
    linger.prepare(model, (x,))
    linger.quantize(model)
    model(x)
    override = {"layer": {"activation": FIX_NONE}}
    if isinstance(layer, nn.Softmax):
        set_fix_method(model, by_name=override)
        model.eval()
        seen: list[Tensor] = []
        model.last.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(x)
        assert torch.equal(seen[1], torch.softmax(seen[0], -1))
    else:
        with pytest.raises(UnsupportedError, match=r"`layer: .*no form with a part in float"):
            set_fix_method(model, by_name=override)
        assert not any(site.floating for site in instrumentation_of(model).sites)
        set_fix_method(model, FIX_NONE)
        assert set(methods(model).values()) == {FIX_NONE}


def test_row20_masters_stay_float_and_both_views_can_be_read() -> None:
    model, x = network(bitwidth=3)
    train(model, 3)
    model.eval()
    with torch.no_grad():
        model(x)
    masters, fixed = model.state_dict(), fix_state_dict(model)
    for name in ("net.0.weight", "net.2.inner.0.weight", "net.4.weight"):
        step = fixed[f"{name}_fp_scale"] / 4
        codes = fixed[name] / step
        assert torch.equal(codes, codes.round())
        assert codes.abs().max() <= 4
        master = masters[name] / step
        assert not torch.equal(master, master.round())
        assert (fixed[name] - masters[name]).abs().max() <= step
        assert model.get_parameter(name).dtype == torch.float32


def test_row20_an_optimizer_moves_the_masters_by_rounded_gradients() -> None:
    model, x = network(bitwidth=3, gradient_bits=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    scale = scales(model, grad=True)[("net.4", "weight")]
    weight = model.net[4].weight
    assert weight.grad is not None
    assert torch.equal(weight.grad / (scale / 8), (weight.grad / (scale / 8)).round())
    assert weight.grad.abs().max() > 0
    assert all(torch.equal(p, before[name] - p.grad) for name, p in model.named_parameters())


def test_row23_precedence_of_name_type_and_all() -> None:
    model, _ = network()
    set_fix_method(
        model,
        FIX_AUTO,
        by_type={
            nn.Conv2d: {"weight": FIX_FIXED, "activation": FIX_FIXED},
            "add": {"activation": 2},
        },
        by_name={"net.2.inner.0": {"weight": FIX_NONE}, "net.2.*": {"activation": FIX_NONE}},
    )
    found = methods(model)
    assert found[("net.0", "weight")] == FIX_FIXED
    assert found[("net.0", "activation")] == FIX_FIXED
    assert found[("net.4", "weight")] == FIX_AUTO
    # In a nested container: the weight by name, the activation by the glob.
    assert found[("net.2.inner.0", "weight")] == FIX_NONE
    assert found[("net.2.inner.0", "activation")] == FIX_NONE
    assert found[("net.2", "activation")] == FIX_FIXED
    # An item that neither its name nor its type says anything of has the method of all.
    set_fix_method(model, FIX_AUTO, {nn.Conv2d: {"weight": FIX_FIXED}}, {"net.4": {"weight": 2}})
    found = methods(model)
    fixed = {("net.0", "weight"), ("net.2.inner.0", "weight"), ("net.4", "weight")}
    follow = {(module, "bias") for module, _ in fixed}
    for key, method in found.items():
        assert key in follow or method == (FIX_FIXED if key in fixed else FIX_AUTO), key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": 3}, r"one of FIX_NONE \(0\), FIX_AUTO \(1\), FIX_FIXED \(2\). Found: 3"),
        ({"method": "auto"}, "one of FIX_NONE.*Found: 'auto'"),
        ({"by_name": {"net.0": 2}}, "'net.0' needs a method for each item.*Found: 2"),
        ({"by_name": {"net.0": {"weigth": 1}}}, "'net.0' has no item 'weigth'. Items: weight"),
        ({"by_name": {"net.2": {"running_mean": 1}}}, "no item 'running_mean'"),
        ({"by_type": {"ReLU": {"weight": 1}}}, "'ReLU' has no item 'weight' that is quantized"),
        ({"by_name": {"net.7": {"weight": 1}}}, "'net.7' matches no module"),
        ({"by_type": {nn.Conv3d: {"weight": 1}}}, "names no type of this model"),
        ({"method": 1, "grad": True}, "no gradient on a grid. Quantize with `gradient_bits`"),
    ],
)
def test_row23_what_does_not_exist_is_an_error(arguments: dict[str, Any], message: str) -> None:
    model, _ = network()
    before = methods(model)
    with pytest.raises(ConfigError, match=message):
        set_fix_method(model, **arguments)
    assert methods(model) == before


@pytest.mark.parametrize("fields", [{}, {"granularity": "channel"}, {"float_scale": True}])
def test_row25_values_used_last_stand_beside_the_masters(fields: dict[str, Any]) -> None:
    model, x = network(**fields)
    train(model, 3)
    model.eval()
    used: dict[str, Tensor] = {}
    instrumentation = instrumentation_of(model)
    instrumentation.switches.rounded = collected = []
    with torch.no_grad():
        model(x)
    instrumentation.switches.rounded = None
    for entry in collected:
        used[f"{entry.site.partition('/')[0]}.{entry.name}"] = entry.values
    before = copy.deepcopy(model.state_dict())
    model.net[2].train()  # one part is in another mode than the rest, and stays so
    fixed = fix_state_dict(model)
    assert [m.training for m in model.net] == [False, False, True, False, False]
    model.eval()
    for entry in collected:
        name = f"{entry.site.partition('/')[0]}.{entry.name}"
        step = entry.step.reshape(-1, *[1] * (entry.values.dim() - 1))
        assert torch.equal(torch.round(entry.values / step) * step, entry.values)
        half_range = entry.step * (1 if entry.name == "bias" else 128)
        assert torch.equal(fixed[f"{name}_fp_scale"], half_range)
    assert len(used) == 6
    assert all(torch.equal(fixed[name], values) for name, values in used.items())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The float layers, run with what stands there, give what the quantized layer gave.
    layer = copy.deepcopy(linger.strip(copy.deepcopy(model)).net[4])
    layer.load_state_dict({"weight": fixed["net.4.weight"], "bias": fixed["net.4.bias"]})
    seen: list[Tensor] = []
    model.net[4].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        y = model(x)
        step = scales(model)[("net.4", "activation")] / 128
        difference = (layer(seen[0]).clamp(-128 * step, 127 * step) - y).abs().max()
        assert difference <= step / 2 * (1 + 1e-5)


def test_row25_before_a_range_is_known_the_values_are_float() -> None:
    model = Chain(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    linger.prepare(model, (x,))
    linger.quantize(model, linger.preset("nics_fix"))
    fixed = fix_state_dict(model)
    assert set(fixed) == {"net.0.weight", "net.0.bias"}
    assert torch.equal(fixed["net.0.weight"], model.net[0].weight)


def test_row25_a_folded_layer_and_parts_of_a_parameter() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(3, 4, 1, bias=False), nn.BatchNorm1d(4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x)).transpose(1, 2)
            return self.attention(y, y, y)[0]

    model, x = Net(), torch.randn(6, 3, 5)
    linger.prepare(model, (x,))
    linger.fuse_bn(model)
    linger.quantize(model, linger.preset("nics_fix"))
    model(x)
    fixed = fix_state_dict(model)
    factor = model.bn.weight / torch.sqrt(model.bn.running_var + model.bn.eps)
    folded = model.conv.weight * factor.view(-1, 1, 1)
    step = fixed["conv.weight_fp_scale"] / 128
    assert (fixed["conv.weight"] - folded).abs().max() <= step / 2 * (1 + 1e-5)
    assert "conv.bias" in fixed
    projection = fixed["attention.in_proj_weight"]
    assert projection.shape == (12, 4)
    names = [name for name in fixed if name.startswith("attention.in_proj_weight.")]
    assert len(names) == 2
    key = fixed["attention.in_proj_weight.key_fp_scale"] / 128
    assert torch.equal(projection[4:8] / key, (projection[4:8] / key).round())
    assert not torch.equal(projection[4:8], model.attention.in_proj_weight[4:8])


def test_row25_a_checkpoint_resumes_with_scales_and_methods(tmp_path: Path) -> None:
    model, x = network(gradient_bits=8)
    train(model, 2)
    set_fix_method(model, FIX_FIXED, by_name={"net.4": {"bias": FIX_NONE, "weight": FIX_AUTO}})
    set_fix_method(model, FIX_NONE, by_name={"net.0": {"weight": FIX_FIXED}}, grad=True)
    train(model, 1)
    path = tmp_path / "state.pt"
    torch.save(model.state_dict(), path)

    def build() -> nn.Module:
        return linger.strip(network()[0])

    other = linger.load_checkpoint(build, path)
    assert methods(other) == methods(model)
    assert methods(other, grad=True) == methods(model, grad=True)
    for one in (model, other):
        train(one, 2, seed=3)
    assert scales(other) == scales(model)
    assert scales(other, grad=True) == scales(model, grad=True)
    assert torch.equal(other.eval()(x), model.eval()(x))
