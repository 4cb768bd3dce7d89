"""Post-training quantization for Cambricon's MLU: calibrate, and run what comes of it.

The numbers in the test names are those of the rows that describe what the engine's own tools do.
"""

import copy
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.core.grid import Grid
from lightning_linger.core.instrumentation import is_prepared
from lightning_linger.core.sites import Site
from tests.models import Chain, Lambda, site_of


def config(**fields: Any) -> linger.QuantConfig:
    return linger.QuantConfig(platform="mlu", output_bits=None, range="minmax").override(fields)


WIDE = {"weight_bits": 16, "activation_bits": 16}


class Net(nn.Module):
    """A small classifier with a batch norm, whose layers are called in another order than made."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)
        self.late = nn.Conv2d(6, 8, 3, stride=2)
        self.early = nn.Conv2d(channels, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.early(x)))
        x = F.relu(self.late(x))
        return self.fc(x.mean((2, 3)))


def data(batches: int = 3, channels: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, channels, 9, 9, generator=generator) for _ in range(batches)]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Return the result in evaluation, after checking that integers give the same."""
    with torch.no_grad():
        fake = model.eval()(x)
        with linger.integer(model):
            assert torch.equal(model(x), fake)
    return fake


def step_in(model: nn.Module, key: str) -> float:
    quantizer: Any = site_of(model, key).inputs["0"]
    return float(quantizer.eval().step())


def weights_of(model: nn.Module, key: str, x: Tensor) -> Any:
    run(model, x)
    return site_of(model, key).prepared["weights"]


# --- ranges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "qmax"), [(8, 127), (16, 32767)])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_row34_row38_scales(bits: int, qmax: int, granularity: str) -> None:
    batches = data()
    settings = {"weight_bits": bits, "activation_bits": bits, "granularity": granularity}
    model = linger.calibrate(net(), batches, config(**settings))
    largest = torch.stack(batches).abs().max()
    assert step_in(model, "early/conv2d/0") == float(largest / qmax)
    found = weights_of(model, "early/conv2d/0", batches[0])
    weight = model.early.weight.detach()
    rows = weight.flatten(1).abs().amax(1) if granularity == "channel" else weight.abs().max()
    assert torch.equal(torch.tensor(found.steps), (rows / qmax).reshape(-1))
    # Ranges are covered to the very end: the largest magnitude has the largest code.
    assert found.codes.abs().max() == qmax


def test_row34_layers_of_both_widths_in_one_model() -> None:
    x = data()[0]
    model = linger.calibrate(net(), [x], config(), overrides={"late": WIDE, "fc": WIDE})
    widths = {
        site.key: (site.weights.bits, site.inputs["0"].grid.bits)  # type: ignore[union-attr]
        for site in (site_of(model, key) for key in KEYS)
    }
    assert widths == dict(zip(KEYS, [(8, 8), (16, 16), (16, 16)], strict=True))
    assert [weights_of(model, key, x).codes.dtype for key in KEYS] == [
        torch.int8,
        torch.int16,
        torch.int16,
    ]


KEYS = ("early/conv2d/0", "late/conv2d/0", "fc/linear/0")


@pytest.mark.parametrize(
    ("range_", "weights"),
    [
        pytest.param("minmax", None, id="row35-running-extremes"),
        pytest.param("mean_minmax", [1, 1, 1], id="row35-use-avg"),
        pytest.param("catch_minmax", [2, 1, 1], id="row35-use-avg-as-CATCH"),
    ],
)
def test_row35_batches_come_together(range_: str, weights: Sequence[int] | None) -> None:
    batches = [torch.tensor([[low, high]]) for low, high in ((-2.0, 1.0), (-8.0, 3.0), (-3.5, 9.0))]
    model = linger.calibrate(nn.Linear(2, 1), batches, config(range=range_))
    found: Any = site_of(model, "/linear/0").inputs["0"]
    ends = np.array([batch[0].numpy() for batch in batches], np.float64)
    expected = [ends[:, 0].min(), ends[:, 1].max()]
    if weights is not None:
        expected = np.average(ends, axis=0, weights=weights).tolist()
    assert found.estimator.range.tolist() == pytest.approx(expected, rel=1e-6)


def test_row36_data_scale_is_of_inputs_alone() -> None:
    x = data()[0]
    plain = linger.calibrate(net(), [x], config(granularity="channel"))
    scaled = linger.calibrate(net(), [x], config(granularity="channel", data_scale=1.5))
    for key in KEYS[:1]:
        assert step_in(scaled, key) == float(torch.tensor(1.5) * x.abs().max() / 127)
    for key in KEYS:
        assert weights_of(plain, key, x).steps == weights_of(scaled, key, x).steps
        assert step_in(scaled, key) > step_in(plain, key)


@pytest.mark.parametrize("sized", [True, False])
def test_row37_batches_beyond_the_limit(sized: bool, caplog: pytest.LogCaptureFixture) -> None:
    batches = data(4)
    loader = batches if sized else iter(batches)
    with caplog.at_level(logging.WARNING, "lightning_linger"):
        model = linger.calibrate(net(), loader, config(), batches=2)
    quantizer: Any = site_of(model, KEYS[0]).inputs["0"]
    assert quantizer.estimator.batches == 2
    assert quantizer.estimator.absmax() == torch.stack(batches[:2]).abs().max()
    (said,) = [r.getMessage() for r in caplog.records if "batches" in r.getMessage()]
    assert said == f"calibration used the first 2{' of 4' if sized else ''} batches"


def test_row37_all_batches_by_default(caplog: pytest.LogCaptureFixture) -> None:
    for limit in ({}, {"batches": None}, {"batches": 4}):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lightning_linger"):
            model = linger.calibrate(net(), data(4), config(), **limit)
        quantizer: Any = site_of(model, KEYS[0]).inputs["0"]
        assert quantizer.estimator.batches == 4
        assert not caplog.records


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
        (nn.Conv3d(4, 6, 2), (2, 4, 5, 5, 5)),
        (nn.Linear(4, 6), (2, 3, 4)),
        (nn.Linear(4, 6, bias=False), (4,)),
        (nn.Conv2d(4, 6, 3), (4, 9, 9)),
    ],
    ids=str,
)
def test_row38_row44_one_scale_per_output_channel(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """The root module is the layer itself."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    expected = layer(x)
    model = linger.calibrate(layer, [x], config(granularity="channel", **WIDE))
    assert model is layer
    key = f"/{linger.summary(model)[0].op}/0"
    assert torch.allclose(run(model, x), expected, atol=2e-3)
    assert len(weights_of(model, key, x).steps) == 6
    assert [row.system for row in linger.summary(model)] == ["fake"]


# --- what is refused, and what is said ----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param({"loader": None}, r"`loader` gives batches.* Found: NoneType", id="loader"),
        pytest.param({"loader": data()[0]}, r"\[x\] for a single batch", id="tensor"),
        pytest.param({"config": {"dtype": "int8"}}, "`config` is a linger.QuantConfig", id="spec"),
        pytest.param({"batches": 0}, "`batches` must be a positive integer", id="no-batches"),
        pytest.param({"batches": 1.5}, "`batches` must be a positive integer", id="half-batches"),
        pytest.param({"firstconv": True}, "`firstconv` is a linger.FirstConv", id="firstconv"),
        pytest.param({"overrides": {"fc": {"bits": 8}}}, "no field 'bits'", id="field"),
        pytest.param({"overrides": {"cf": WIDE}}, "'cf' matches no module", id="module"),
        pytest.param({"types": ["Conv9d"]}, "'Conv9d' names no type", id="type"),
    ],
)
def test_row39_wrong_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    model = net()
    with pytest.raises(linger.ConfigError, match=named):
        linger.calibrate(model, **{"loader": data(), "config": config(), **arguments})
    assert not is_prepared(model)


def test_row39_a_model_is_a_module() -> None:
    with pytest.raises(linger.ConfigError, match=r"`model` is a torch.nn.Module. Found: str"):
        linger.calibrate("net", data(), config())  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "1", True])
def test_row39_data_scale_is_positive(value: Any) -> None:
    with pytest.raises(linger.ConfigError, match="`data_scale`"):
        config(data_scale=value)


def test_row39_results_are_real() -> None:
    with pytest.raises(linger.ConfigError, match=r"give real results. Set output_bits=None"):
        linger.calibrate(net(), data(), linger.QuantConfig(platform="mlu"))


def test_row39_there_are_no_zero_points() -> None:
    with pytest.raises(linger.ConfigError, match="'mlu' has no zero points"):
        linger.calibrate(net(), data(), config(symmetry="affine"))


def test_row39_a_quantized_model_keeps_its_settings() -> None:
    """A second calibration with others would ignore them."""
    model = linger.calibrate(net(), data(), config(), overrides={"fc": WIDE})
    for given in (
        {"config": config(**WIDE)},
        {"overrides": {"late": WIDE}},
        {"types": ["conv2d"]},
        {"modules": ["early"]},
    ):
        name = "weight_bits, activation_bits" if "config" in given else next(iter(given))
        with pytest.raises(linger.ConfigError, match=f"Net is quantized already.*: {name}. "):
            linger.calibrate(model, data(), **given)
    before = step_in(model, "fc/linear/0")
    larger = [10 * x for x in data()]
    for given in ({}, {"config": config(), "overrides": {"fc": WIDE}}):
        linger.calibrate(model, larger, **given)
    assert step_in(model, "fc/linear/0") > before


class OwnConv(nn.Conv2d):
    """A subclass, which CATCH leaves in float without a word."""


class Functional(nn.Module):
    """A layer of one's own, which is no subclass of any."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel)


def own_layers() -> nn.Module:
    torch.manual_seed(3)
    return Chain(nn.Conv2d(3, 6, 3), OwnConv(6, 6, 3), Functional())


def test_row33_row42_layers_of_ones_own_are_quantized() -> None:
    x = data()[0]
    model = linger.calibrate(own_layers(), [x], config())
    assert [row.system for row in linger.summary(model)] == ["fake"] * 3
    run(model, x)


def test_row42_the_mapping_replaces_the_table() -> None:
    x = data()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # somebody chose what stays float
        model = linger.calibrate(own_layers(), [x], config(), types=[OwnConv, "Functional"])
    assert [row.system for row in linger.summary(model)] == ["float", "fake", "fake"]
    run(model, x)


def test_row43_skipped_layers_are_listed() -> None:
    x = data()[0]
    model = own_layers()
    model.spare = nn.Linear(3, 3)
    with pytest.warns(linger.QuantizationWarning, match="1 layers stay float: `spare`"):
        linger.calibrate(model, [x], config(), overrides={"net.1": None})
    rows = {row.layer: row for row in linger.skipped_layers(model)}
    assert set(rows) == {"net.1/conv2d/0", "spare"}
    assert rows["net.1/conv2d/0"].type == "OwnConv"
    assert rows["net.1/conv2d/0"].chosen
    assert rows["spare"].why == "the example inputs did not reach it"
    assert "OwnConv" in str(linger.skipped_layers(model))


class Attending(nn.Module):
    """Attention reads the weight of its projection, which is a module, without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.attention(x, x, x, need_weights=False)[0]


def test_row43_the_projection_of_attention() -> None:
    x = torch.randn(2, 5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # on this platform it is quantized
        model = linger.calibrate(Attending(), [x], linger.QuantConfig(platform="venusa"))
    assert not linger.skipped_layers(model)
    why = "part of `attention/multi_head_attention_forward/0`: platform 'mlu' quantizes layers only"
    with pytest.warns(linger.QuantizationWarning, match="`attention.out_proj`"):
        model = linger.calibrate(Attending(), [x], config())
    (row,) = linger.skipped_layers(model)
    assert (row.layer, row.why, row.chosen) == ("attention.out_proj", why, False)
    model = linger.calibrate(Attending(), [x], config(), overrides={"attention": None})
    (row,) = linger.skipped_layers(model)
    assert row.chosen


def test_only_layers_are_quantized() -> None:
    x = torch.randn(3, 4, 5)
    chain = Chain(nn.Linear(5, 6), nn.LSTM(6, 6))
    model = linger.calibrate(
        Lambda(lambda self, x: self.chain.net[1](self.chain.net[0](x))[0], chain=chain),
        [x],
        config(),
    )
    rows = {row.op: row for row in linger.summary(model)}
    assert rows["linear"].system == "fake"
    assert rows["lstm"].why_float == "platform 'mlu' quantizes layers only"


# --- in place or not ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("prepared", [True, False])
def test_row45_the_source_of_a_copy_is_unchanged(training: bool, prepared: bool) -> None:
    x = data()[0]
    model = net().train(training)
    if prepared:
        linger.prepare(model, (x,))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    copied = linger.calibrate(model, data(), config(), inplace=False)
    assert copied is not model
    assert copied.training == model.training == training
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert {name: len(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    run(copied, x)
    assert torch.equal(model.eval()(x), net()(x))
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(
        p.data_ptr() for p in copied.parameters()
    )


def test_row45_in_place_is_the_same_object() -> None:
    model = net()
    hooks = model.register_forward_hook(lambda *_: None)
    assert linger.calibrate(model, data(), config(), inplace=True) is model
    assert not model.training
    assert hooks.id in model._forward_hooks


def test_row45_what_cannot_be_copied() -> None:
    model = net()
    model.cache = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(linger.ConfigError, match=r"cannot be copied.*inplace=True"):
        linger.calibrate(model, data(), config(), inplace=False)
    assert not is_prepared(model)


# --- inputs without a range ---------------------------------------------------------------------


def _filled(value: float) -> nn.Module:
    return Lambda(
        lambda self, x: self.late(self.early(x) * 0 + value),
        early=nn.Linear(4, 4),
        late=nn.Linear(4, 4),
    )


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("scale", ["free", "power_of_two"])
def test_row46_the_scale_of_what_was_not_seen_is_one(value: float, scale: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    with pytest.warns(linger.QuantizationWarning, match=r"`late/linear/0:input0`.*scale is 1\.0"):
        model = linger.calibrate(_filled(value), [x], config(scale=scale))
    assert step_in(model, "late/linear/0") == 1.0
    assert step_in(model, "early/linear/0") != 1.0


def test_row46_a_layer_that_calibration_did_not_reach() -> None:
    torch.manual_seed(0)
    model = Lambda(
        lambda self, x, deep=True: self.late(self.early(x)) if deep else self.early(x),
        early=nn.Linear(4, 4),
        late=nn.Linear(4, 4),
    )
    x = torch.randn(2, 4)
    linger.prepare(model, (x,))
    with pytest.warns(linger.QuantizationWarning, match=r"`late/linear/0:input0`.*scale is 1\.0"):
        linger.calibrate(model, [{"x": x, "deep": False}], config())
    run(model, x)


def test_row46_weights_of_zeros() -> None:
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    x = torch.randn(2, 4)
    model = linger.calibrate(layer, [x], config())
    assert torch.equal(run(model, x), layer.bias.expand(2, 3))


# --- steps that are powers of two ---------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("absmax", [4.10149, 4.0, 3.999, 127.0, 128.0, 1.0, 2.0**-20, 0.3, 1e-30])
def test_row48_position(bits: int, absmax: float) -> None:
    """``pos = floor(log2(absmax)) - (bits - 2)``."""
    position = math.floor(math.log2(absmax)) - (bits - 2)
    grid = Grid(bits, "power_of_two", exclusive=True)
    expected = 2.0 ** max(position, -31)
    assert grid.step_value(absmax) == expected
    assert grid.step(torch.tensor([absmax])).item() == expected


def test_row48_power_of_two_only_and_full_scale() -> None:
    x = torch.tensor([[4.10149, -1.0]])
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, 0.5)
    for scale, step, weight_step in (
        ("power_of_two", 0.0625, 2.0**-7),
        ("free", float(np.float32(4.10149) / np.float32(127)), float(np.float32(0.5) / 127)),
    ):
        model = linger.calibrate(copy.deepcopy(layer), [x], config(scale=scale))
        assert step_in(model, "/linear/0") == step
        found = weights_of(model, "/linear/0", x)
        assert found.steps == [weight_step]
        assert found.codes.max() == (64 if scale == "power_of_two" else 127)


def test_row48_weights_per_channel_are_full_scale() -> None:
    """Their common position is made up for by a factor of each channel, ``absmax / qmax``."""
    x = torch.randn(3, 5)
    layer = nn.Linear(5, 4)
    largest = layer.weight.detach().abs().amax(1)
    model = linger.calibrate(layer, [x], config(scale="power_of_two", granularity="channel"))
    assert torch.equal(
        torch.tensor(weights_of(model, "/linear/0", x).steps), largest / torch.tensor(127.0)
    )
    assert math.log2(step_in(model, "/linear/0")).is_integer()


# --- the arithmetic -----------------------------------------------------------------------------


def oracle(x: Tensor, site: Site, layer: nn.Module) -> np.ndarray:
    """``y = qy / s_x / s_w + b`` over int64: what one layer gives, in numpy.

    The only rounding behind the integers is that of three float32 operations.
    """
    quantizer: Any = site.inputs["0"]
    bits = quantizer.grid.bits
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step_x = np.float32(quantizer.step())
    qx = np.clip(np.rint(x.numpy() / step_x), qmin, qmax).astype(np.int64)
    weight = layer.weight.detach().numpy()
    rows = np.abs(weight.reshape(len(weight), -1))
    per_channel = site.granularity == "channel"
    absmax = rows.max(1) if per_channel else np.full(len(weight), rows.max())
    steps = (absmax / np.float32(site.weights.grid.qmax)).astype(np.float32)  # type: ignore[union-attr]
    lifted = steps.reshape(-1, *[1] * (weight.ndim - 1))
    qw = np.clip(np.rint(weight / lifted), qmin, qmax).astype(np.int64)
    if weight.ndim == 2:
        qy = qx @ qw.T
    else:
        stride, padding = layer.stride[0], layer.padding[0]
        qx = np.pad(qx, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        windows = np.lib.stride_tricks.sliding_window_view(qx, weight.shape[2:], (2, 3))
        windows = windows[:, :, ::stride, ::stride]
        qy = np.einsum("nchwij,ocij->nhwo", windows, qw)
    y = qy.astype(np.float32) * (step_x * steps) + layer.bias.detach().numpy()
    assert y.dtype == np.float32
    return y if weight.ndim == 2 else y.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [8, 16])
def test_row49_integers_are_exact(bits: int, granularity: str) -> None:
    x = data()[0]
    model = net()
    settings = {"weight_bits": bits, "activation_bits": bits, "granularity": granularity}
    expected = model(x)
    linger.calibrate(model, [x], config(**settings))
    inputs = {}
    for name in ("early", "late", "fc"):
        layer: Any = getattr(model, name)
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0].clone())
        )
    found = {}
    for name in ("early", "late", "fc"):
        layer = getattr(model, name)
        layer.register_forward_hook(
            lambda _, args, y, name=name: found.__setitem__(name, y.clone())
        )
    y = run(model, x)
    for key in KEYS:
        name = key.partition("/")[0]
        wanted = oracle(inputs[name], site_of(model, key), getattr(model, name))
        assert np.array_equal(found[name].numpy(), wanted), name
    error = ((y - expected) ** 2).sum() / (expected**2).sum()
    assert error < (0.02 if bits == 8 else 1e-6)


def test_row49_half_a_code_is_rounded_to_even() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 127.0)
    model = linger.calibrate(layer, [torch.tensor([[127.0]])], config())
    x = torch.tensor([[0.5], [1.5], [2.5], [-0.5], [-1.5], [500.0], [-500.0]])
    expected = torch.tensor([[0.0], [2.0], [2.0], [0.0], [-2.0], [127.0], [-128.0]])
    assert torch.equal(run(model, x), expected * 127)


def test_gradients_in_evaluation_and_training() -> None:
    x = data()[0]
    # Values at the very end of a range would have no gradient.
    model = linger.calibrate(net(), [x], config(**WIDE, data_scale=1.1))
    expected = run(model, x)
    with torch.enable_grad():
        y = model(x)
        assert torch.equal(y, expected)
        y.square().sum().backward()
    twin = net()
    twin(x).square().sum().backward()
    for name, parameter in twin.named_parameters():
        found = model.get_parameter(name).grad
        assert torch.allclose(found, parameter.grad, rtol=1e-2, atol=1e-2), name
    model.train()(x).sum().backward()


@pytest.mark.parametrize("system", ["fake", "integer"])
@pytest.mark.parametrize("bits", [8, 16])
def test_row50_graphs_reproduce_the_run_model(system: str, bits: int) -> None:
    first, second = data(2)
    settings = config(weight_bits=bits, activation_bits=bits)
    model = linger.calibrate(net(), [first], settings)
    expected = run(model, second)
    run(model, first)
    scope = linger.integer(model) if system == "integer" else torch.no_grad()
    with torch.no_grad(), scope:
        traced = torch.jit.trace(model, first, check_trace=False)
        program = torch.export.export(model, (first,), strict=False)
        assert torch.equal(traced(second), expected)
        assert torch.equal(program.module()(second), expected)


def test_row50_compiled() -> None:
    first, second = data(2)
    model = linger.calibrate(net(), [first], config())
    expected = run(model, second)
    run(model, first)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(second), expected)


@pytest.mark.parametrize(
    ("layer", "shape", "granularity"),
    [
        (nn.Linear(8, 5), (4, 8), "tensor"),
        (nn.Linear(8, 5), (2, 3, 8), "channel"),
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9), "tensor"),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9), "channel"),
        (nn.Conv3d(4, 6, 2, bias=False), (2, 4, 5, 5, 5), "channel"),
    ],
    ids=["matrix", "rows", "conv1d", "conv2d", "conv3d"],
)
def test_an_exported_layer_runs_in_onnxruntime(
    layer: nn.Module, shape: tuple[int, ...], granularity: str, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    model = linger.calibrate(copy.deepcopy(layer), [x], config(granularity=granularity))
    path = linger.export_onnx(model, (x,), tmp_path / "layer.onnx", "qdq")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.array_equal(found, run(model, x).numpy())


def test_what_onnxruntime_cannot_add_up_is_refused(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    model = linger.calibrate(nn.Linear(8, 5), [x], config(**WIDE))
    with pytest.raises(linger.UnsupportedError, match="may exceed 2"):
        linger.export_onnx(model, (x,), tmp_path / "layer.onnx", "qdq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 16])
def test_row51_half_precision(dtype: torch.dtype, bits: int) -> None:
    x = data()[0]
    settings = config(weight_bits=bits, activation_bits=bits)
    model = linger.calibrate(net(), [x], settings)
    expected = run(model, x.to(dtype).float())
    y = run(model, x.to(dtype))
    assert y.dtype == dtype
    assert torch.allclose(y.float(), expected, atol=0.02)
    half = copy.deepcopy(model).to(dtype)
    y = run(half, x.to(dtype))
    assert y.dtype == dtype
    assert torch.allclose(y.float(), expected, atol=0.02)
