"""Widths changed in place: the same as planned so, with the same quantizers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, NotReadyError, QuantConfig
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.sites import Site
from lightning_linger.stages.widths import change_bits, change_model_bits
from tests.models import Chain, ResNet, assert_integer_exact


class Mixture(nn.Module):
    """Sites with parts, known ranges, widths of their own, and a folded layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.rnn = nn.GRU(8, 6, batch_first=True)
        self.gate = nn.GLU()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x))).transpose(1, 2)
        y = self.norm(y + self.attention(y, y, y)[0])
        y = self.gate(self.rnn(y)[0])
        return torch.softmax(torch.sigmoid(self.head(y)), dim=-1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mixture": (Mixture, (2, 6, 5)),
    "resnet": (ResNet, (2, 3, 12, 12)),
}
BITS = {"weight_bits": 4, "activation_bits": 6, "output_bits": 5}


def quantized(name: str, config: QuantConfig, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    linger.prepare(model, (x,))
    linger.fuse_bn(model)
    linger.quantize(model, config, **options)
    linger.calibrate(model, [x])
    return model.eval(), x


def plan_of(site: Site) -> dict[str, Any]:
    inputs = {name: q.grid for name, q in site.inputs.items()}
    parts = {name: q.grid for name, q in site.parts.items()}
    output = site.output.grid if site.output is not None else None
    return {
        "config": site.config,
        "weight": site.weights.grid,
        "operands": site.operand_bits,
        "grids": (inputs, parts, output),
        "estimators": [(q.estimator.grid, q.estimator.kind) for q in site.quantizers()],
        "known": [q.estimator.range.tolist() for q in site.quantizers() if q.estimator.fixed],
    }


@torch.no_grad()
@pytest.mark.parametrize("platform", ["venusa", "onnxruntime", "tflite"])
@pytest.mark.parametrize("name", list(MODELS))
def test_changed_is_planned(name: str, platform: str) -> None:
    wide = QuantConfig(platform=platform, range="absmax")
    changed, x = quantized(name, wide)
    before = changed(x)
    quantizers = [id(q) for site in instrumentation_of(changed).sites for q in site.quantizers()]
    change_model_bits(changed, BITS)
    planned, _ = quantized(name, QuantConfig(platform=platform, range="absmax", **BITS))
    own, other = instrumentation_of(changed), instrumentation_of(planned)
    for site, twin in zip(own.sites, other.sites, strict=True):
        assert plan_of(site) == plan_of(twin), site.key
    # What flowed at calibration had other widths; with the same ranges all bits are the same.
    state = changed.state_dict()
    state["_linger._extra_state"] = planned.state_dict()["_linger._extra_state"]
    planned.load_state_dict(state)
    assert torch.equal(changed(x), planned(x))
    assert not torch.equal(changed(x), before)
    if platform == "venusa":
        assert_integer_exact(changed, x)
    change_model_bits(changed, dict.fromkeys(BITS, 8))
    assert torch.equal(changed(x), before)
    after = [id(q) for site in own.sites for q in site.quantizers()]
    assert after == quantizers


@torch.no_grad()
@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
@pytest.mark.parametrize("kind", ["lsq", "tqt", "pact"])
def test_changed_is_planned_with_learned_ranges(kind: str, platform: str) -> None:
    changed, _ = quantized("resnet", QuantConfig(platform=platform, range=kind))
    change_model_bits(changed, BITS)
    planned, _ = quantized("resnet", QuantConfig(platform=platform, range=kind, **BITS))
    sites = zip(instrumentation_of(changed).sites, instrumentation_of(planned).sites, strict=True)
    for site, twin in sites:
        assert plan_of(site) == plan_of(twin), site.key


@torch.no_grad()
def test_a_layer_keeps_what_an_override_gives_it() -> None:
    overrides = {"stem": {"weight_bits": 5}, "fc": {"output_bits": None}}
    model, _ = quantized("resnet", QuantConfig(), overrides=overrides)
    change_model_bits(model, BITS, modules=["stem", "fc"])
    sites = {site.key: site for site in instrumentation_of(model).sites}
    rows = {row.site: row.bits for row in linger.summary(model)}
    assert rows["stem/conv2d/0"] == "5/6/5"
    assert rows["fc/linear/0"] == "4/6/float"
    assert rows["layers.0.conv1/conv2d/0"] == "8/8/8"
    assert sites["bn/batch_norm/0"].config == sites["stem/conv2d/0"].config


@torch.no_grad()
def test_widths_that_are_not_named_stay() -> None:
    model, _ = quantized("resnet", QuantConfig())
    change_bits(model, {"stem": {"weight_bits": 3}})
    change_model_bits(model, {"output_bits": 6})
    rows = {row.site: row.bits for row in linger.summary(model)}
    assert rows["stem/conv2d/0"] == "3/8/6"
    assert rows["fc/linear/0"] == "8/8/6"


@torch.no_grad()
def test_layers_are_chosen_by_pattern_and_type() -> None:
    model, x = quantized("resnet", QuantConfig())
    change_bits(
        model,
        {
            "type:Conv2d": {"weight_bits": 6},
            "layers.0": {"weight_bits": 4},
            "layers.0.conv2": {"weight_bits": 3, "range": "mse"},
        },
    )
    rows = {row.site: row.bits for row in linger.summary(model)}
    assert rows["stem/conv2d/0"] == "6/8/8"
    assert rows["layers.0.conv1/conv2d/0"] == "4/8/8"
    assert rows["layers.0.conv2/conv2d/0"] == "3/8/8"
    assert rows["fc/linear/0"] == "8/8/8"
    assert_integer_exact(model, x)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"nothing": {"weight_bits": 4}}, "matches no module"),
        ({"stem": {"weight_bits": 1}}, "`weight_bits` must be an integer from 2 to 16"),
        ({"fc": {"output_bits": 32}}, "cannot become one of 32"),
    ],
)
def test_a_wrong_width_is_refused_and_nothing_changes(
    overrides: dict[str, Any], message: str
) -> None:
    model, _ = quantized("resnet", QuantConfig())
    before = str(linger.summary(model))
    with pytest.raises(ConfigError, match=message):
        change_bits(model, {"layers.0.conv1": {"weight_bits": 3}, **overrides})
    assert str(linger.summary(model)) == before


def test_a_model_without_quantizers_is_refused() -> None:
    model = linger.prepare(Chain(nn.Linear(2, 2)), (torch.zeros(1, 2),))
    with pytest.raises(NotReadyError, match="has no quantizers yet"):
        change_bits(model, {"*": {"weight_bits": 4}})
    with pytest.raises(ConfigError, match=r"widths are named .*Found: \['bits'\]"):
        change_model_bits(linger.quantize(model), {"bits": 4})


@pytest.mark.parametrize("kind", ["lsq", "tqt", "pact"])
def test_a_learned_range_stays_the_same_parameter_with_the_same_half_range(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(16, 6)
    weight_range = "absmax" if kind == "pact" else kind
    linger.prepare(model, (x,))
    linger.quantize(
        model, QuantConfig(platform="onnxruntime", range=kind, weight_range=weight_range)
    )
    optimizer = torch.optim.Adam(linger.parameter_groups(model), lr=1e-2)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    step()
    learned = linger.learned_ranges(model)
    before = {name: (id(p), p.detach().clone()) for name, p in learned.items()}
    change_model_bits(model, {"weight_bits": 4, "activation_bits": 4, "output_bits": 4})
    for name, parameter in linger.learned_ranges(model).items():
        identity, value = before[name]
        assert id(parameter) == identity
        assert torch.equal(parameter.detach(), value), name
    step()
    assert all(parameter.grad is not None for parameter in learned.values())


@torch.no_grad()
def test_checkpoints_hold_the_widths_in_force(tmp_path: Path) -> None:
    model, x = quantized("mixture", QuantConfig())
    wide = copy.deepcopy(model.state_dict())
    change_model_bits(model, BITS)
    expected = model(x)
    torch.save(model.state_dict(), tmp_path / "narrow.ckpt")

    loaded = linger.load_checkpoint(Mixture, tmp_path / "narrow.ckpt").eval()
    assert torch.equal(loaded(x), expected)
    assert str(linger.summary(loaded)) == str(linger.summary(model))
    # A checkpoint from before brings the widths of then, in a model that has changed since.
    loaded.load_state_dict(wide)
    fresh, _ = quantized("mixture", QuantConfig())
    assert [row.bits for row in linger.summary(loaded)] == [
        row.bits for row in linger.summary(fresh)
    ]
    assert torch.equal(loaded(x), fresh(x))


def test_steps_that_were_held_are_those_of_the_new_width() -> None:
    model, x = quantized("resnet", QuantConfig())
    linger.freeze_ranges(model)
    model.train()(x)
    change_model_bits(model, {"weight_bits": 4})
    model.train()(x)
    planned, _ = quantized("resnet", QuantConfig(weight_bits=4))
    linger.freeze_ranges(planned)
    planned.train()(x)
    held = {name: v for name, v in model.state_dict().items() if "held_" in name}
    assert held
    for name, value in held.items():
        assert torch.equal(value, planned.state_dict()[name]), name


@torch.no_grad()
def test_frozen_weights_keep_their_steps_where_other_widths_change() -> None:
    model, x = quantized("resnet", QuantConfig())
    linger.freeze_ranges(model)
    model.train()(x)
    held = {name: v.clone() for name, v in model.state_dict().items() if "held_" in name}
    for parameter in model.parameters():
        parameter.mul_(3.0)
    change_model_bits(model, {"activation_bits": 6, "output_bits": 6})
    model.train()(x)
    state = model.state_dict()
    assert held
    assert all(torch.equal(state[name], value) for name, value in held.items())
    assert_integer_exact(model.eval(), x)


@torch.no_grad()
def test_learned_rounding_is_not_undone_by_another_width() -> None:
    model, x = quantized("resnet", QuantConfig(weight_bits=3))
    config = linger.AdaRoundConfig(steps=30, learning_rate=0.1)
    rows = linger.adaround(model, [x], config, modules=["stem", "layers.*"])
    learned = [row.site for row in rows if row.changed]
    assert learned

    def codes() -> dict[str, Tensor]:
        model.eval()(x)
        sites = instrumentation_of(model).sites
        return {key: s.prepared["weights"].codes for s in sites if (key := s.key) in learned}

    before, told = codes(), str(linger.summary(model))
    with pytest.raises(ConfigError, match=r"rounded as `adaround` has learned for 3 bits, which 8"):
        change_model_bits(model, {"weight_bits": 8})
    with pytest.raises(ConfigError, match=rf"`{learned[0]}`.*Change widths first"):
        change_bits(model, {"fc": {"weight_bits": 5}, learned[0]: {"weight_bits": 4}})
    assert str(linger.summary(model)) == told
    # What has learned nothing can change, and so can what flows between the layers.
    change_bits(model, {"fc": {"weight_bits": 5}})
    change_model_bits(model, {"activation_bits": 6, "output_bits": 6})
    after = codes()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert_integer_exact(model, x)
    # It can be given up.
    linger.freeze_ranges(model, frozen=False, parts=["weights"])
    change_model_bits(model, {"weight_bits": 8})
    assert not all(torch.equal(codes()[key], value) for key, value in before.items())
