"""Explicit quantization points: nothing in float, one rounding on a grid of their own."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig
from lightning_linger.nn import FakeQuantize
from tests.models import assert_integer_exact, site_of


class Net(nn.Module):
    def __init__(self, **fields: object) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.point = FakeQuantize(**fields)
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.point(self.first(x)))


def quantized(model: nn.Module, config: QuantConfig | None = None) -> Tensor:
    x = torch.randn(16, 6)
    linger.prepare(model, (x,))
    linger.quantize(model, config)
    for _ in range(3):
        model(x).sum().backward()
    return x


def passed(model: nn.Module, x: Tensor) -> Tensor:
    """What leaves the point in an evaluation."""
    seen: list[Tensor] = []
    handle = model.point.register_forward_hook(lambda m, args, y: seen.append(y))
    model.eval()
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def test_a_float_model_passes_unchanged() -> None:
    point = FakeQuantize(output_bits=2)
    x = torch.randn(5, requires_grad=True)
    assert torch.equal(point(x), x)
    point(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(5))
    model = Net(output_bits=2)
    x = torch.randn(3, 6)
    before = model(x)
    linger.prepare(model, (x,))
    assert torch.equal(model(x), before)
    assert FakeQuantize().state_dict() == {}


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_grid_of_its_own(bits: int, platform: str) -> None:
    model = Net(output_bits=bits)
    x = quantized(model, QuantConfig(platform=platform))
    values = passed(model, x)
    step = float(site_of(model, "point/quantization_point/0").output.step())
    codes = torch.round(values / step)
    assert torch.allclose(values, codes * step, atol=1e-6)
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    assert len(codes.unique()) > 2
    assert_integer_exact(model, x)


def test_a_plain_value_is_rounded_once_at_the_point() -> None:
    model = nn.Sequential(FakeQuantize(range=1.0, output_bits=4), nn.Linear(6, 2))
    quantized(model)
    site = site_of(model, "0/quantization_point/0")
    assert list(site.inputs) == []
    x = torch.tensor([[0.3, -0.3, 5.0, -5.0, 0.06, 0.0]])
    model.eval()
    with torch.no_grad():
        assert model[0](x).tolist() == [[0.25, -0.25, 0.875, -1.0, 0.0, 0.0]]
    assert_integer_exact(model, x)


def test_row18_a_point_for_gradients_alone() -> None:
    model = Net(gradient_bits=4)
    x = quantized(model)
    for _ in range(2):
        model.zero_grad()
        y = model.first(x)
        y.retain_grad()
        model.second(model.point(y)).square().sum().backward()
    node = site_of(model, "point/quantization_point/0").output.gradient
    assert node.estimator.known
    # Only the point has a gradient quantizer: the model's own setting has none.
    assert site_of(model, "first/linear/0").output.gradient is None
    step = node.grid.step_value(float(node.estimator.absmax()))
    codes = y.grad / step
    assert torch.equal(codes, torch.round(codes))
    assert len(codes.unique()) > 2


def test_settings_of_the_model_of_the_point_and_of_overrides() -> None:
    model = Net()
    quantized(model, QuantConfig(output_bits=5))
    assert site_of(model, "point/quantization_point/0").output.grid.bits == 5
    model = Net(config=QuantConfig(range="absmax"), output_bits=6)
    quantized(model, QuantConfig(output_bits=5, range="minmax"))
    output = site_of(model, "point/quantization_point/0").output
    assert (output.grid.bits, output.estimator.kind) == (6, "absmax")
    model = Net(output_bits=6)
    x = torch.randn(4, 6)
    linger.prepare(model, (x,))
    linger.quantize(model, overrides={"point": None})
    model(x)
    assert site_of(model, "point/quantization_point/0").config is None


def test_every_call_is_a_place_of_its_own() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.point(self.second(self.point(self.first(x))))

    model = Twice(output_bits=4)
    x = quantized(model)
    one = site_of(model, "point/quantization_point/0").output
    two = site_of(model, "point@1/quantization_point/0").output
    assert not torch.equal(one.estimator.range, two.estimator.range)
    model.eval()
    assert_integer_exact(model, x)


def test_copies_and_checkpoints() -> None:
    model = Net(output_bits=4, range="lsq")
    x = quantized(model)
    twin = copy.deepcopy(model)
    fresh = Net(output_bits=4, range="lsq")
    linger.prepare(fresh, (x,))
    linger.quantize(fresh)
    fresh.load_state_dict(model.state_dict())
    for other in (twin, fresh):
        assert torch.equal(passed(other, x), passed(model, x))


@pytest.mark.parametrize("fields", [{"output_bits": 1}, {"bits": 4}, {"range": "log"}])
def test_wrong_fields(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        FakeQuantize(**fields)
