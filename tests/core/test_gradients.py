"""Gradients on a grid: vectors of NICS-fix, the order of rounding and clipping, training."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig, UnsupportedError
from lightning_linger.core.gradients import GradientQuantizer
from lightning_linger.core.switches import Switches
from tests.models import Chain, assert_integer_exact, site_of


def quantizer(bits: int, range: str | float = "last_absmax", **switches: bool) -> GradientQuantizer:
    return GradientQuantizer(
        "x", bits, "power_of_two", "half_even", range, Switches(**switches)
    ).train()


def gradient(node: GradientQuantizer, upstream: list[float]) -> list[float]:
    x = torch.zeros(len(upstream), requires_grad=True)
    node(x).backward(torch.tensor(upstream))
    return x.grad.tolist()


@pytest.mark.parametrize(
    ("bits", "upstream", "expected", "half_range"),
    [
        (4, [0.11, 0.22, 0.33, 0.44, 0.9], [0.125, 0.25, 0.375, 0.5, 0.875], 1.0),
        (2, [0.52, -0.27, 0.0], [0.5, -0.5, 0.0], 1.0),
        (2, [0.5, -0.27, 0.0], [0.5, -0.25, 0.0], 0.5),
    ],
    ids=["row18-activation", "row18-parameter", "row18-power-of-two"],
)
def test_vectors(
    bits: int, upstream: list[float], expected: list[float], half_range: float
) -> None:
    node = quantizer(bits)
    assert gradient(node, upstream) == expected
    step = node.grid.step_value(float(node.estimator.absmax()))
    assert step * 2 ** (bits - 1) == half_range


@given(
    bits=st.integers(2, 16),
    exponent=st.integers(-60, 10),
    values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20),
)
def test_on_a_grid_that_covers_it(bits: int, exponent: int, values: list[float]) -> None:
    upstream = [value * 2.0**exponent for value in values]
    node = quantizer(bits)
    rounded = gradient(node, upstream)
    largest = max(map(abs, torch.tensor(upstream).tolist()))
    if largest < 2.0**-80:
        return
    step = node.grid.step_value(largest)
    assert largest <= step * 2 ** (bits - 1) < 2 * largest
    for value, found in zip(torch.tensor(upstream).tolist(), rounded, strict=True):
        assert math.frexp(step)[0] == 0.5
        assert (found / step).is_integer()
        assert abs(found - value) <= step / 2


def test_the_forward_is_the_identity_and_evaluation_rounds_nothing() -> None:
    node = quantizer(2)
    x = torch.randn(20, requires_grad=True)
    assert torch.equal(node(x), x)
    node.eval()
    assert node(x) is x
    assert node.estimator.batches == 0


def test_fixed_and_still_ranges() -> None:
    assert gradient(quantizer(4, 1.0), [0.3, 3.0, -3.0]) == [0.25, 1.0, -1.0]
    node = quantizer(4)
    gradient(node, [1.0])
    node.switches.observing = False
    assert gradient(node, [0.3, 3.0, -3.0]) == [0.25, 1.0, -1.0]
    assert node.estimator.batches == 1


@pytest.mark.parametrize("upstream", [[0.0, 0.0], [1e-45], [2.0**-99]])
def test_degenerate_gradients(upstream: list[float]) -> None:
    assert all(map(math.isfinite, gradient(quantizer(8), upstream)))
    empty = torch.zeros(0, 3, requires_grad=True)
    quantizer(8)(empty).sum().backward()
    assert empty.grad.shape == (0, 3)


def prepared(config: QuantConfig, *layers: nn.Module) -> tuple[Chain, Tensor]:
    torch.manual_seed(0)
    model = Chain(*layers)
    x = torch.randn(8, 5)
    linger.prepare(model, (x,))
    linger.quantize(model, config)
    return model, x


def test_row19_the_mask_of_clipped_weights_acts_on_the_rounded_gradient() -> None:
    model, _ = prepared(
        QuantConfig(weight_range=1.0, gradient_bits=2, output_bits=None), nn.Linear(5, 1)
    )
    with torch.no_grad():
        model.net[0].weight.copy_(torch.tensor([[0.5, 3.0, -0.25, -3.0, 0.0]]))
    # The clipped weight has by far the largest gradient: it decides the step, then is masked.
    x = torch.tensor([[0.3, 4.0, 0.9, 0.1, 1.2]])
    model(x)
    model.zero_grad()
    model(x).sum().backward()
    assert model.net[0].weight.grad.tolist() == [[0.0, 0.0, 0.0, 0.0, 2.0]]
    model.zero_grad()
    linger.quantize(model, QuantConfig(weight_range=1.0, gradient_bits=4, output_bits=None))
    model(x).sum().backward()
    assert model.net[0].weight.grad.tolist() == [[0.5, 0.0, 1.0, 0.0, 1.0]]


def test_row19_the_layer_before_receives_a_rounded_gradient() -> None:
    seen: list[Tensor] = []
    # Nothing is clipped, and the weight's own gradient passes as it is.
    config = QuantConfig(gradient_bits=3, range=64.0)
    model, _ = prepared(config, nn.Linear(5, 4, bias=False), nn.Linear(4, 3))
    model.net[1].register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_in[0]))
    first = site_of(model, "net.0/linear/0")
    first.gradients["weight"].active = False
    x = torch.eye(5)
    model(x).square().sum().backward()
    node = first.output.gradient
    step = node.grid.step_value(float(seen[-1].abs().max()))
    expected = (seen[-1] / step).add(0.5).floor() * step
    assert not torch.equal(expected, seen[-1])
    assert model.net[0].weight.grad is not None
    assert torch.equal(model.net[0].weight.grad.t(), expected)


def test_row18_weights_biases_and_activations_have_their_own_range() -> None:
    model, x = prepared(QuantConfig(gradient_bits=4), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    model(x)
    model.zero_grad()
    model(x).square().sum().backward()
    nodes = [module for module in model.modules() if isinstance(module, GradientQuantizer)]
    # The input has no gradient: two weights, two biases, two outputs.
    assert sum(node.estimator.known for node in nodes) == 6
    assert len({float(node.estimator.absmax()) for node in nodes if node.estimator.known}) == 6
    for layer, name in ((model.net[0], "net.0"), (model.net[2], "net.2")):
        for role in ("weight", "bias"):
            node = site_of(model, f"{name}/linear/0").gradients[role]
            step = node.grid.step_value(float(node.estimator.absmax()))
            codes = getattr(layer, role).grad / step
            assert torch.equal(codes, torch.round(codes))
            assert codes.abs().max() <= 8


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "conv": (nn.Conv2d(6, 4, 3), (2, 6, 5, 5)),
    "transposed": (nn.ConvTranspose1d(6, 4, 3), (2, 6, 5)),
    "batch-norm": (nn.BatchNorm1d(6), (5, 6)),
    "layer-norm": (nn.LayerNorm(6), (5, 6)),
    "group-norm": (nn.GroupNorm(2, 6), (5, 6, 4)),
    "instance-norm": (nn.InstanceNorm1d(6, affine=True), (5, 6, 4)),
    "rms-norm": (nn.RMSNorm(6), (5, 6)),
    "prelu": (nn.PReLU(6), (5, 6)),
    "embedding": (nn.Embedding(9, 6), ()),
    "lstm": (nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True), (2, 5, 6)),
    "gru": (nn.GRU(6, 4, batch_first=True), (2, 5, 6)),
    "lstm-cell": (nn.LSTMCell(6, 4), (5, 6)),
}


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
@pytest.mark.parametrize("name", LAYERS)
def test_row18_every_layer_rounds_the_gradients_of_its_weights_and_its_result(
    name: str, platform: str
) -> None:
    torch.manual_seed(2)
    layer, shape = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1]
    x = torch.randn(shape) if shape else torch.arange(8).view(2, 4)
    linger.prepare(layer, (x,))
    linger.quantize(layer, QuantConfig(platform=platform, gradient_bits=3))
    for _ in range(2):
        layer.zero_grad()
        y = layer(x)
        (y[0] if isinstance(y, tuple) else y).square().sum().backward()
    nodes = [module for module in layer.modules() if isinstance(module, GradientQuantizer)]
    assert nodes
    has_bias = any("bias" in role for role, _ in layer.named_parameters())
    for node in nodes:
        # The input has no gradient.
        absent = "input" in node.name or (node.name.endswith(":bias") and not has_bias)
        assert node.estimator.known != absent, node.name
    for role, parameter in layer.named_parameters():
        if role not in ("weight", "bias"):
            continue
        (node,) = (found for found in nodes if found.name.endswith(f":{role}"))
        codes = parameter.grad / node.grid.step(node.estimator.absmax())
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
        assert codes.abs().max() <= 4


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_row18_a_folded_layer_rounds_the_gradient_of_its_bias(mode: Any) -> None:
    torch.manual_seed(2)
    model, x = Chain(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), torch.randn(4, 3, 9)
    linger.prepare(model, (x,))
    linger.fuse_bn(model, mode=mode)
    linger.quantize(model, QuantConfig(gradient_bits=3))
    model(x).square().sum().backward()
    node = site_of(model, "net.0/conv1d/0").gradients["bias"]
    codes = model.net[1].bias.grad / node.grid.step(node.estimator.absmax())
    assert torch.equal(codes, codes.round())
    assert 1 < codes.abs().max() <= 4


@pytest.mark.parametrize("bits", [2, 5, 16])
def test_row18_width_and_range_are_those_of_gradients(bits: int) -> None:
    config = QuantConfig(gradient_bits=bits, gradient_range=0.25)
    model, x = prepared(config, nn.Linear(5, 4), nn.Linear(4, 3))
    model(x).square().sum().backward()
    for parameter in model.net.parameters():
        codes = parameter.grad / (0.25 * 2.0 ** (1 - bits))
        assert torch.equal(codes, codes.round())
        assert codes.abs().max() == 2 ** (bits - 1), "the largest saturate"
    site = site_of(model, "net.0/linear/0")
    assert site.weights.grid.bits == site.output.grid.bits == 8


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
@pytest.mark.parametrize("range", ["tqt", "absmax"])
def test_wide_gradients_train_as_float_ones(platform: str, range: str) -> None:
    results = []
    for bits in (None, 16):
        torch.manual_seed(1)
        config = QuantConfig(platform=platform, gradient_bits=bits, range=range)
        model, x = prepared(
            config, nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
        )
        model(x)
        model.zero_grad()
        model(x).square().sum().backward()
        results.append([p.grad for p in model.net.parameters()])
        if platform == "venusa":
            assert_integer_exact(model.eval(), x)
    for exact, rounded in zip(*results, strict=True):
        assert torch.allclose(exact, rounded, atol=2e-3 * float(exact.abs().max()))
    assert not all(torch.equal(exact, rounded) for exact, rounded in zip(*results, strict=True))


def test_sums_and_attention_round_their_gradients() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return y + self.attention(y, y, y)[0]

    for platform in ("venusa", "onnxruntime"):
        model = Net()
        x = torch.randn(2, 3, 4)
        linger.prepare(model, (x,))
        linger.quantize(model, QuantConfig(platform=platform, gradient_bits=6))
        for _ in range(2):
            model(x).square().sum().backward()
        for key in ("/add/0", "attention/multi_head_attention_forward/0", "fc/linear/0"):
            assert site_of(model, key).output.gradient.estimator.known, key


def test_stochastic_gradients_are_unbiased_and_repeat() -> None:
    config = QuantConfig(gradient_bits=2, rounding="stochastic", seed=3)
    model, x = prepared(config, nn.Linear(5, 4))
    model(x)
    state = copy.deepcopy(model.state_dict())

    def weight_gradient() -> Tensor:
        model.zero_grad()
        model(x).sum().backward()
        return model.net[0].weight.grad.clone()

    draws = [weight_gradient() for _ in range(20)]
    assert not all(torch.equal(draws[0], draw) for draw in draws)
    model.load_state_dict(state)
    assert torch.equal(weight_gradient(), draws[0])


def test_a_checkpoint_holds_the_ranges() -> None:
    model, x = prepared(QuantConfig(gradient_bits=4), nn.Linear(5, 4))
    model(x)
    model(x).sum().backward()
    other, _ = prepared(QuantConfig(gradient_bits=4), nn.Linear(5, 4))
    other.load_state_dict(model.state_dict())
    ours = site_of(model, "net.0/linear/0").gradients["weight"].estimator
    theirs = site_of(other, "net.0/linear/0").gradients["weight"].estimator
    assert theirs.known
    assert torch.equal(ours.range, theirs.range)


def test_compiled_training_is_refused() -> None:
    model, x = prepared(QuantConfig(gradient_bits=4), nn.Linear(5, 4))
    model(x)
    with pytest.raises(Exception, match="cannot round gradients") as caught:
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert isinstance(caught.value, UnsupportedError) or "UnsupportedError" in str(caught.value)
    model.eval()
    with torch.no_grad():
        model(x)
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize(
    "fields",
    [{"gradient_bits": 1}, {"gradient_bits": 17}, {"gradient_range": "lsq"}, {"gradient_range": 0}],
)
def test_wrong_fields(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        QuantConfig(**fields)
