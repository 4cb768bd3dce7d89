"""Sensitivities: what each layer costs, of a model that stays as it was."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, NonFiniteError, QuantConfig, UnsupportedError
from lightning_linger.analysis.sensitivity import (
    Sensitivities,
    SensitivityRow,
    read_sensitivities,
)
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import Chain, ResNet


class Net(nn.Module):
    """A folded layer, a residual sum, a module called twice, products of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.stem(x))).transpose(1, 2)
        y = y + torch.tanh(self.mix(self.mix(y)))
        return self.head((y @ y.transpose(1, 2)).softmax(-1) @ y).mean(1)


def batches(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 3, 6, generator=generator) for _ in range(count)]


def prepared() -> nn.Module:
    torch.manual_seed(1)
    model = Net()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    linger.prepare(model, (batches()[0],))
    return linger.fuse_bn(model)


WIDE = {"weight_bits": 16, "activation_bits": 16, "output_bits": 16}


@torch.no_grad()
def noise_of(config: QuantConfig, overrides: dict[str, Any]) -> float:
    """Plan, calibrate and compare by hand."""
    model = prepared().eval()
    references = [model(x).double() for x in batches()]
    if config.range == "ema_absmax":
        # Such ranges are found once: with all layers wide.
        linger.calibrate(linger.quantize(model, config), batches())
        linger.change_bits(model, overrides)
    else:
        linger.calibrate(linger.quantize(model, config, overrides=overrides), batches())
    outputs = [model(x).double() for x in batches()]
    pairs = list(zip(outputs, references, strict=True))
    noise = sum((y - r).square().sum() for y, r in pairs)
    return float(noise / sum(r.square().sum() for r in references))


@pytest.mark.parametrize("range_", ["ema_absmax", "mse", "lsq"])
@pytest.mark.parametrize("part", ["weights", "activations", "both"])
def test_one_layer_at_a_time(part: Any, range_: str) -> None:
    config = QuantConfig(range=range_, weight_range="mse" if range_ == "mse" else "absmax")
    rows = linger.sensitivity(prepared(), batches(), bits=(3, 8), part=part, config=config)
    assert {row.part for row in rows} == {part}
    wide = config.override(WIDE)
    floor = noise_of(wide, {})
    found = {(row.site, row.bits): row.drop for row in rows}
    layers = ["stem", "mix", "head"]
    assert list(dict.fromkeys(row.site for row in rows))[:2] == layers[:2]
    weights, codes = {"weight_bits": 3}, {"activation_bits": 3, "output_bits": 3}
    narrow = {"weights": weights, "activations": codes, "both": {**weights, **codes}}[part]
    for layer in layers:
        assert found[layer, 3] == noise_of(wide, {layer: narrow}) - floor, layer
        assert found[layer, 3] > found[layer, 8]
    if part == "weights":
        assert {site for site, _ in found} == set(layers)
    else:
        product = "/matmul/1"
        assert found[product, 3] == noise_of(wide, {product: narrow}) - floor


def test_all_layers_but_one() -> None:
    rows = linger.sensitivity(
        prepared(), batches(), bits=(4,), mode="all_but_one", part="weights", config=QuantConfig()
    )
    wide = QuantConfig().override(WIDE)
    narrow = {layer: {"weight_bits": 4} for layer in ("stem", "mix", "head")}
    whole = noise_of(wide, narrow)
    for row in rows:
        assert row.drop == whole - noise_of(wide, {**narrow, row.site: {}}), row.site


def accuracy(model: nn.Module, data: Any) -> float:
    right = sum(int((model(x).argmax(1) == torch.arange(4)).sum()) for x in data)
    return right / (4 * len(data))


@torch.no_grad()
def test_a_metric_of_the_user_is_better_when_it_is_higher() -> None:
    model = prepared().eval()
    seen: list[float] = []

    def metric(module: nn.Module, data: Any) -> float:
        assert module is model
        assert not module.training
        seen.append(accuracy(module, data))
        return seen[-1]

    rows = linger.sensitivity(model, batches(8), metric, bits=(2,))
    in_float, wide, *values = seen
    assert in_float == accuracy(model, batches(8))
    assert [row.drop for row in rows] == [wide - value for value in values]


@torch.no_grad()
def test_the_divergence_of_decisions() -> None:
    rows = linger.sensitivity(prepared(), batches(), "kl", bits=(2,), modules=["head"])
    model = prepared().eval()
    reference = torch.cat([model(x).double() for x in batches()])
    values = []
    for bits in (16, 2):
        model = prepared().eval()
        overrides = {"head": {"weight_bits": bits}}
        linger.quantize(model, QuantConfig().override(WIDE), overrides=overrides)
        linger.calibrate(model, batches())
        ours = torch.cat([model(x).double() for x in batches()]).log_softmax(1)
        right = reference.softmax(1)
        values.append(float(F.kl_div(ours, right, reduction="batchmean")))
    assert [row.site for row in rows] == ["head"]
    assert rows[0].drop == pytest.approx(values[1] - values[0], rel=1e-9)


def planned() -> nn.Module:
    model = prepared()
    plan = QuantConfig(range="lsq", weight_range="lsq", rounding="stochastic", gradient_bits=8)
    linger.quantize(model, plan, overrides={"head": {"weight_bits": 6}})
    optimizer = torch.optim.Adam(linger.parameter_groups(model), lr=1e-2)
    model.train()(batches()[0]).sum().backward()
    optimizer.step()
    linger.change_bits(model, {"mix": {"weight_bits": 5}})
    return linger.freeze_ranges(model, parts=["weights"])


@pytest.mark.parametrize("make", [prepared, planned])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_was(make: Callable[[], nn.Module], fails: bool) -> None:
    model = make().train()
    model.bn.eval()
    twin = make().train()
    twin.bn.eval()
    for one in (model, twin):
        torch.manual_seed(7)
        one(batches()[1]).sum().backward()
    instrumentation = instrumentation_of(model)
    objects = [id(q) for site in instrumentation.sites for q in site.modules()]
    modes = [module.training for module in model.modules()]
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    def metric(module: nn.Module, data: Any) -> float:
        torch.rand(1), random.random(), np.random.rand()
        return float("nan") if fails else float(sum(module(x).sum() for x in data))

    if fails:
        with pytest.raises(NonFiniteError, match="the metric is nan of Net"):
            linger.sensitivity(model, batches(), metric)
    else:
        assert len(linger.sensitivity(model, batches(), metric)) == 3 * 3

    state, other = model.state_dict(), twin.state_dict()
    assert list(state) == list(other)
    for name, value in state.items():
        assert torch.equal(value, other[name]), name
    assert [id(q) for site in instrumentation.sites for q in site.modules()] == objects
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)
    # What comes next is the same too.
    assert torch.equal(model(batches()[0]), twin(batches()[0]))
    assert str(linger.summary(model)) == str(linger.summary(twin))


def test_a_plan_is_measured_as_it_is() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    data = [torch.randn(16, 6)]
    linger.prepare(model, (data[0],))
    linger.quantize(model, QuantConfig(range=0.5), overrides={"net.2": None})
    rows = linger.sensitivity(model, data, bits=(4,))
    assert [row.site for row in rows] == ["net.0"]
    with pytest.raises(ConfigError, match="measured as that plan has it"):
        linger.sensitivity(model, data, config=QuantConfig())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": (1,)}, ConfigError, "`bits` holds integers from 2 to 16"),
        ({"bits": ()}, ConfigError, "`bits` holds"),
        ({"bits": (True,)}, ConfigError, "`bits` holds"),
        ({"mode": "each"}, ConfigError, r"`mode` must be one of .* Found: 'each'"),
        ({"part": "bias"}, ConfigError, "`part` must be one of"),
        ({"metric": "mse"}, ConfigError, "`metric` must be a function or one of"),
        ({"modules": ["nothing.*"]}, ConfigError, "matches no module"),
        ({"loader": []}, ConfigError, "gave no batch"),
        ({"loader": [torch.full((1, 3, 6), torch.nan)]}, NonFiniteError, "NaN"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linger.sensitivity(prepared(), **{"loader": batches(), **arguments})


def test_a_model_without_the_part_is_refused() -> None:
    model = linger.prepare(Chain(nn.Linear(6, 3), nn.Tanh()), (torch.zeros(2, 6),))
    with pytest.raises(UnsupportedError, match=r"no layer to measure for part='weights'"):
        linger.sensitivity(model, [torch.zeros(2, 6)], modules=["net.1"])


def test_the_resnet_on_every_kind_of_platform() -> None:
    torch.manual_seed(0)
    model, x = ResNet(), torch.randn(4, 3, 12, 12)
    linger.prepare(model, (x,))
    linger.fuse_bn(model)
    for platform in ("venusa", "onnxruntime", "tflite"):
        config = QuantConfig(platform=platform)
        rows = linger.sensitivity(model, [x], bits=(2, 8), part="both", config=config)
        drops = {(row.site, row.bits): row.drop for row in rows}
        assert all(drops[site, 2] > drops[site, 8] for site, _ in drops)


@pytest.mark.parametrize("ending", ["csv", "json", "txt"])
def test_tables_are_written_and_read_back(tmp_path: Path, ending: str) -> None:
    rows = Sensitivities(
        [SensitivityRow("a.b", 4, 0.25, "weights"), SensitivityRow("/add/0", 8, -1e-9, "both")]
    )
    path = rows.save(tmp_path / f"table.{ending}")
    if ending == "csv":
        assert list(read_sensitivities(path)) == list(rows)
    elif ending == "json":
        assert json.loads(path.read_text()) == [vars(row) for row in rows]
    else:
        assert path.read_text() == f"{rows}\n"
    assert "a.b" in str(rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [("a,4,x,both", "`drop` a number"), ("a,4,1.0,bias", "`part` one of"), (",4,1,both", "named")],
)
def test_a_damaged_table_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(f"site,bits,drop,part\n{line}\n")
    with pytest.raises(ConfigError, match=f"line 2 of .*{message}"):
        read_sensitivities(tmp_path / "t.csv")
