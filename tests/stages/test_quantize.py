"""Planning: what a platform can reach, looking ahead, fan-out."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.ops.add import AddOp
from lightning_linger.ops.mul import MulOp
from lightning_linger.ops.weighted import WeightedOp
from tests.models import (
    Chain,
    Lambda,
    ResNet,
    assert_integer_exact,
    bits_of,
    images,
    site_of,
    train,
    trained,
)

NARROW = [
    QuantConfig(),
    QuantConfig(weight_bits=4, activation_bits=4, output_bits=4),
    QuantConfig(weight_bits=4, activation_bits=4, output_bits=16),
    QuantConfig(output_bits=16),
    QuantConfig(weight_bits=2, activation_bits=8, output_bits=16),
]


def _events(model: nn.Module, x: Tensor) -> list[tuple[Any, float, list[float]]]:
    """Site, output step and operand steps of every site that ran."""
    events: list[tuple[Any, float, list[float]]] = []

    def note(event: Any) -> None:
        operands = [t for t in event.site.op.operands(event.call) if isinstance(t, Tensor)]
        steps = [float(t._linger_tag.step) for t in operands if hasattr(t, "_linger_tag")]
        if event.site.quantized and hasattr(event.result, "_linger_tag"):
            events.append((event.site, float(event.result._linger_tag.step), steps))

    instrumentation_of(model).tap = note
    with torch.no_grad():
        model(x)
    instrumentation_of(model).tap = None
    return events


@pytest.mark.parametrize(
    "config", NARROW, ids=lambda c: f"{c.weight_bits}-{c.activation_bits}-{c.output_bits}"
)
@pytest.mark.parametrize("fold", [None, "running"])
def test_no_result_is_finer_than_a_right_shift_reaches(
    config: QuantConfig, fold: str | None
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.net(x)
        return self.fc((y * y).mul(0.01)) + self.fc2(y) * 0.001 - y[:, :3]

    model = Lambda(forward, net=ResNet(), fc=nn.Linear(5, 3), fc2=nn.Linear(5, 3))
    x = images() * 0.05  # small inputs want fine outputs
    trained(model, x, config=config, fold=fold, steps=4, lr=0.02)
    checked = set()
    for site, step, operands in _events(model, x):
        if isinstance(site.op, WeightedOp) and site.output is not None:
            prepared = site.prepared["weights"]
            assert step >= prepared.scale_x * max(prepared.steps)
        elif isinstance(site.op, MulOp) and len(operands) == 2:
            assert step >= operands[0] * operands[1]
        elif isinstance(site.op, AddOp):
            assert step >= max(operands)
        else:
            continue
        checked.add(site.op.kind)
        assert torch.frexp(torch.tensor(step)).mantissa == 0.5
    assert {"conv2d", "linear", "mul", "add", "sub"} <= checked
    assert_integer_exact(model, x)


CLAMPS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
}


def _before_clamp(layer: str, clamp: nn.Module) -> tuple[nn.Module, Tensor, str]:
    if layer == "conv":
        return Chain(nn.Conv2d(3, 4, 3), clamp), torch.randn(8, 3, 6, 6), "net.0/conv2d/0"
    if layer == "linear":
        return Chain(nn.Linear(5, 4), clamp), torch.randn(32, 5), "net.0/linear/0"
    if layer == "bn":
        return Chain(nn.BatchNorm2d(3), clamp), torch.randn(8, 3, 6, 6), "net.0/batch_norm/0"
    net = Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), clamp)
    return net, torch.randn(8, 3, 6, 6), "net.0/conv2d/0"


@pytest.mark.parametrize("layer", ["conv", "linear", "bn", "folded"])
def test_ahead_of_a_relu_codes_are_positive(layer: str) -> None:
    model, x, key = _before_clamp(layer, nn.ReLU())
    with torch.no_grad():
        bias = model.net[1 if layer == "folded" else 0].bias
        bias -= 1.0  # the negative side is the wider one
    fold = "running" if layer == "folded" else None
    raw = copy.deepcopy(model.net[:-1]).train()
    trained(model, x, fold=fold, steps=1)
    site = site_of(model, key)
    y = model(x)
    step = float(y._linger_tag.step)
    codes = bits_of(y, step)
    assert codes.min() == 0
    positive = site.output.estimator.absmax().item()
    assert positive == pytest.approx(raw(x).max().item(), rel=0.05)
    clamp = [s for s in instrumentation_of(model).sites if s.op.kind == "relu"]
    assert clamp[0].merged
    assert_integer_exact(model, x)


@pytest.mark.parametrize(
    ("layer", "switch"),
    [
        ("conv", "ahead_conv_relu"),
        ("linear", "ahead_linear_relu"),
        ("bn", "ahead_bn_relu"),
        ("folded", "ahead_bn_relu"),
    ],
)
def test_looking_ahead_can_be_switched_off(layer: str, switch: str) -> None:
    model, x, key = _before_clamp(layer, nn.ReLU())
    fold = "running" if layer == "folded" else None
    trained(model, x, config=QuantConfig(**{switch: False}), fold=fold, steps=1)
    site = site_of(model, key)
    assert site.output.window.low < 0
    assert not next(s for s in instrumentation_of(model).sites if s.op.kind == "relu").merged
    assert model(x).min() == 0
    assert_integer_exact(model, x)
    other = {"ahead_conv_relu", "ahead_linear_relu", "ahead_bn_relu"} - {switch}
    model, x, key = _before_clamp(layer, nn.ReLU())
    trained(model, x, config=QuantConfig(**dict.fromkeys(other, False)), fold=fold, steps=1)
    assert site_of(model, key).output.window.low == 0


@pytest.mark.parametrize(
    "clamp",
    [
        lambda x: x.clamp(-3, 1),
        lambda x: x.clamp(max=0.5),
        lambda x: x.clamp(-0.5, 3),
        lambda x: x.clamp(min=-0.5),
        lambda x: x.clamp(1, 2),
        lambda x: x.clamp(-2, -1),
        F.relu6,
        lambda x: F.hardtanh(x, -0.25, 1.5),
    ],
    ids=["-3..1", "..0.5", "-0.5..3", "-0.5..", "1..2", "-2..-1", "relu6", "-0.25..1.5"],
)
@pytest.mark.parametrize("kind", ["ema_absmax", "ema_minmax", "absmax", "minmax"])
def test_any_clamp_keeps_what_it_lets_through(clamp: Any, kind: str) -> None:
    model = Lambda(lambda self, x: clamp(self.fc(x)), fc=nn.Linear(4, 6))
    x = torch.randn(64, 4) * 4
    trained(
        model, x, config=QuantConfig(weight_bits=16, activation_bits=16, output_bits=16, range=kind)
    )
    expected = clamp(F.linear(x, model.fc.weight, model.fc.bias))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.01)
    assert_integer_exact(model, x)


def test_fan_out_keeps_one_quantizer() -> None:
    """A value that others read too is quantized once, with its whole range."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.relu()) + self.c(y)

    layers = {name: nn.Linear(4, 4) for name in ("a", "b", "c")}
    x = torch.randn(64, 4)
    model = trained(Lambda(forward, **layers), x)
    producer = site_of(model, "a/linear/0")
    assert producer.output.window.low < 0
    assert not site_of(model, "/relu/0").merged
    assert not site_of(model, "b/linear/0").inputs
    assert not site_of(model, "c/linear/0").inputs
    assert_integer_exact(model, x)


def test_a_returned_value_is_not_clamped_away() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.a(x)
        return y, y.relu()

    model = Lambda(forward, a=nn.Linear(4, 4))
    x = torch.randn(64, 4)
    trained(model, x)
    y, z = model(x)
    assert y.min() < -0.1
    assert torch.equal(z, y.clamp(min=0))
    assert_integer_exact(model, x)


@pytest.mark.parametrize(
    "sigmoid", [nn.Sigmoid(), Lambda(lambda self, x: x.sigmoid())], ids=["module", "method"]
)
def test_a_sigmoid_caps_the_range_before_it(sigmoid: nn.Module) -> None:
    x = torch.randn(64, 4) * 100
    model = trained(Chain(nn.Linear(4, 4), sigmoid), x)
    assert site_of(model, "net.0/linear/0").output.step() == 2.0**-4
    other = trained(Chain(nn.Linear(4, 4), nn.Tanh()), x)
    assert site_of(other, "net.0/linear/0").output.step() > 2.0**-4
    narrow = trained(Chain(nn.Linear(4, 4), nn.Sigmoid()), torch.randn(64, 4) * 0.1)
    assert site_of(narrow, "net.0/linear/0").output.step() < 2.0**-4
    assert_integer_exact(model, x)


def test_input_width_and_output_width() -> None:
    """A consumer that wants another width gets it requantized; the producer keeps its own."""
    x = torch.randn(64, 4)
    model = trained(
        Chain(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)),
        x,
        config=QuantConfig(output_bits=16, activation_bits=8),
        overrides={"net.2": {"activation_bits": 4, "output_bits": 8}},
    )
    assert site_of(model, "net.0/linear/0").output.grid.bits == 16
    assert site_of(model, "net.1/linear/0").prepared == {}
    model(x)
    assert site_of(model, "net.1/linear/0").prepared["weights"].bits_x == 8
    assert site_of(model, "net.2/linear/0").prepared["weights"].bits_x == 4
    assert_integer_exact(model, x)


@pytest.mark.parametrize("output_bits", [None, 32])
def test_a_float_or_accumulator_output(output_bits: int | None) -> None:
    x = torch.randn(64, 4)
    model = trained(
        Chain(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6)),
        x,
        overrides={"net.2": {"output_bits": output_bits}},
    )
    assert site_of(model, "net.2/linear/0").output is None
    assert_integer_exact(model, x)
    torch.testing.assert_close(model(x), linger.strip(model)(x), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "bits", [(4, 4, 16), (2, 8, 16), (8, 4, 16), (8, 8, 16), (8, 4, 8)], ids=str
)
def test_a_narrow_input_of_a_wide_output_keeps_its_range(bits: tuple[int, int, int]) -> None:
    """What a coarse accumulator leaves unused of a wide output is not passed on as range."""
    x = torch.randn(64, 8)
    config = QuantConfig(weight_bits=bits[0], activation_bits=bits[1], output_bits=bits[2])
    model = Chain(*(nn.Linear(8, 8) for _ in range(6)))
    for layer in model.net:
        nn.init.eye_(layer.weight)
    trained(model, x, config=config)
    values = x
    for number, layer in enumerate(model.net):
        values = layer(values)
        step = float(values._linger_tag.step)
        assert step <= 2 * x.abs().max() / 2 ** (bits[1] - 1), f"layer {number}"
    assert_integer_exact(model, x)


@pytest.mark.parametrize("movement", [False, True])
def test_an_accumulator_output_read_by_a_layer(movement: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.flatten(1) if movement else y)

    x = torch.randn(64, 4)
    model = Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    trained(model, x, config=QuantConfig(output_bits=32))
    assert_integer_exact(model, x)
    with linger.integer(model):
        found = model(x)
    torch.testing.assert_close(found, linger.strip(model)(x), rtol=0, atol=0.05)


def test_a_layer_left_in_float_between_quantized_ones() -> None:
    x = images()
    model = trained(
        ResNet(),
        x,
        fold="running",
        steps=4,
        lr=0.02,
        overrides={"layers.0.*": None, "layers.1.bn1": None},
    )
    assert "override" in str(site_of(model, "layers.0.conv1/conv2d/0").why_float)
    assert_integer_exact(model, x)


def test_a_folded_layer_left_in_float_trains_as_the_unfolded_one() -> None:
    plain = Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)).double()
    model = copy.deepcopy(plain)
    x = torch.randn(8, 3, 6, 6).double()
    linger.fuse_bn(linger.prepare(model, (x,)))
    linger.quantize(model, overrides={"net.0": None})
    for _ in range(3):
        plain(x)
        model(x)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("frozen", [False, True])
def test_quantizing_again_replaces_the_plan(frozen: bool) -> None:
    """Ranges that stood still were those of the other plan."""
    x = torch.randn(64, 4)
    model = trained(Chain(nn.Linear(4, 5)), x)
    linger.freeze_ranges(model, frozen=frozen)
    train(model, (x,), 1, 0.0)
    linger.quantize(model, QuantConfig(weight_bits=4, output_bits=4))
    train(model, (x,), 2, 0.0)
    model.eval()
    weights = site_of(model, "net.0/linear/0").weights
    assert weights.bits == 4
    reach = model.net[0].weight.detach().abs().max()
    assert reach / 8 <= weights.step_in_use("weight") < reach / 3.5
    assert model(x).unique().numel() <= 16
    assert_integer_exact(model, x)


INPLACE: dict[str, Callable[[], nn.Module]] = {
    "SiLU": lambda: nn.SiLU(inplace=True),
    "Hardswish": lambda: nn.Hardswish(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(0.1, inplace=True),
    "ELU": lambda: nn.ELU(inplace=True),
    "mul_": lambda: Lambda(lambda self, x: x.mul_(torch.rand(1))),
    "sigmoid_": lambda: Lambda(lambda self, x: x.sigmoid_()),
}


@pytest.mark.parametrize("layer", ["conv", "folded", "bn", "add"])
@pytest.mark.parametrize("activation", INPLACE)
def test_a_float_activation_in_place_behind_a_quantized_value(activation: str, layer: str) -> None:
    """What trains without quantization trains with it: nothing needs the overwritten value."""
    if layer == "add":
        first: list[nn.Module] = [
            Lambda(lambda self, x: self.a(x) + self.a(x), a=nn.Conv2d(3, 4, 1))
        ]
    elif layer == "conv":
        first = [nn.Conv2d(3, 4, 1)]
    else:
        first = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)]
    model = Chain(*first, INPLACE[activation](), nn.Conv2d(4, 2, 1))
    x = torch.randn(4, 3, 5, 5)
    fold = "running" if layer == "folded" else None
    torch.manual_seed(1)
    trained(model, x, fold=fold, steps=2, lr=0.01)
    if activation != "mul_":
        assert_integer_exact(model, x)


def test_everything_trains() -> None:
    """Quantized training lowers a loss, with every stage on."""
    x, labels = images(32), torch.randint(0, 5, (32,))
    model = linger.prepare(ResNet(), (x,))
    linger.quantize(linger.normalize(linger.fuse_bn(model)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert_integer_exact(model.eval(), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_batch_in_training_is_named_and_skipped(value: float) -> None:
    x = torch.randn(8, 4)
    model = trained(Chain(nn.Linear(4, 5)), x).train()
    estimator = site_of(model, "net.0/linear/0").inputs["0"].estimator
    before = estimator.range.clone()
    with pytest.warns(linger.QuantizationWarning, match=r"`net\.0/linear/0.*NaN or infinity"):
        model(torch.full((2, 4), value))
    assert torch.equal(estimator.range, before)
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())


@pytest.mark.parametrize(
    "config", [*NARROW[:2], QuantConfig(granularity="channel")], ids=["8", "4", "channel"]
)
def test_constant_and_zero_models(config: QuantConfig) -> None:
    """Zero weights, zero inputs and zero outputs have scales too."""
    x = torch.zeros(4, 3, 6, 6)
    model = Chain(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    nn.init.zeros_(model.net[0].weight)
    nn.init.zeros_(model.net[2].bias)
    trained(model, x, config=config)
    assert_integer_exact(model, x)
    assert_integer_exact(model, torch.randn(4, 3, 6, 6))


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
def test_narrow_weights_and_strict_maxima(platform: str) -> None:
    x = torch.full((4, 3), 1.0)
    for narrow in (True, False):
        model = Chain(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
        with torch.no_grad():
            model.net[0].weight.fill_(-1.0)
        config = QuantConfig(
            platform=platform, narrow_weights=narrow, strict_maximum=True, weight_bits=4
        )
        trained(model, x, config=config)
        site = site_of(model, "net.0/linear/0")
        assert site.weights.grid.qmin == (-7 if narrow else -8)
        with torch.no_grad():
            model(x)
        # The ends of both ranges are kept: -1 for the weight, 1 for the input.
        strict = platform == "venusa"
        assert site.prepared["weights"].steps[0] == pytest.approx(1 / 4 if strict else 1 / 7)
        assert site.inputs["0"].step() == pytest.approx(2**-6 if strict else 1 / 127)
        if strict:
            assert_integer_exact(model, x)
