"""Numbers of NICS-fix through the preset: what a model computes; rows 2 to 5, 9 and 11 to 14."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.nics_fix import (
    FIX_AUTO,
    FIX_FIXED,
    RANGE_3SIGMA,
    RANGE_MAX,
    RANGE_MAX_TENPERCENT,
    RANGE_SWEEP,
    get_fix_configs,
    set_fix_method,
)
from lightning_linger.nn import FakeQuantize
from tests.models import Chain, assert_integer_exact


def point(x: Tensor, **fields: Any) -> Chain:
    """Return a model that does nothing but round, and has seen ``x``."""
    model = Chain(FakeQuantize())
    linger.prepare(model, (x,))
    linger.quantize(model, linger.preset("nics_fix", **{"rounding": "half_even", **fields}))
    model(x)
    return model


def scale_of(model: nn.Module, item: str = "activation") -> Any:
    return get_fix_configs(model, data_only=True)["net.0"][item]["scale"]


TENTH = [0.2] * 90 + torch.linspace(0.6, 4, 10).tolist()
SWEPT = [0.1] * 100 + [1.01]

VECTORS: dict[str, tuple[int, list[float], int, float, list[float]]] = {
    "row02-max": (RANGE_MAX, [0.2513, -0.52, 0.0], 2, 1.0, [0.5, -0.5, 0.0]),
    "row02-power-of-two": (RANGE_MAX, [0.2513, -0.5, 0.0], 2, 0.5, [0.25, -0.5, 0.0]),
    "row03": (RANGE_3SIGMA, [0.2513, -0.52, 0.0], 4, 2.0, [0.25, -0.5, 0.0]),
    # The top code is one step below NICS-fix's: 1 - 2^-7, and 1 - 2^-3.
    "row04": (
        *(RANGE_MAX_TENPERCENT, TENTH, 8, 1.0),
        [26 / 128] * 90 + [77 / 128, 125 / 128] + [127 / 128] * 8,
    ),
    "row05": (RANGE_SWEEP, SWEPT, 4, 1.0, [0.125] * 100 + [0.875]),
}


@pytest.mark.parametrize("name", VECTORS)
def test_scale_and_values(name: str) -> None:
    method, values, bits, scale, expected = VECTORS[name]
    x = torch.tensor(values)
    model = point(x, bitwidth=bits, range_method=method)
    assert scale_of(model) == scale
    assert model(x).tolist() == expected
    # It is kept, and used again, where the model is fixed, saved and loaded.
    set_fix_method(model, FIX_FIXED)
    model(x * 9)
    assert scale_of(model) == scale
    other = point(x * 5, bitwidth=bits, range_method=method)
    other.load_state_dict(model.state_dict())
    assert other.eval()(x).tolist() == expected
    assert_integer_exact(other, x)


@pytest.mark.parametrize("method", [RANGE_MAX, RANGE_3SIGMA, RANGE_MAX_TENPERCENT, RANGE_SWEEP])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_row04_few_values_have_a_range_by_every_method(method: int, count: int) -> None:
    model = point(torch.full((count,), -0.75), range_method=method)
    assert scale_of(model) == 1.0
    assert model(torch.full((count,), -0.75)).tolist() == [-0.75] * count


# --- rounding and gradients -----------------------------------------------------------------------


def test_row09_ties_of_values_weights_and_gradients_go_to_even() -> None:
    ties = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]])
    even = [0.0, 2.0, 2.0, -0.0, -2.0]
    fixed = dict.fromkeys(("range", "weight_range", "gradient_range"), 128.0)
    for rule, expected in (("half_even", even), (None, [1.0, 2.0, 3.0, 0.0, -1.0])):
        model = Chain(nn.Linear(5, 1, bias=False))
        linger.prepare(model, (ties,))
        linger.quantize(model, linger.preset("nics_fix", rounding=rule, gradient_bits=8, **fixed))
        weight = model.net[0].weight
        with torch.no_grad():
            weight.copy_(ties)
            assert [model(row[None]).item() for row in torch.eye(5)] == expected
            weight.copy_(torch.ones(1, 5))
            assert [model(ties * row).item() for row in torch.eye(5)] == expected
        # A weight's gradient is the input, times that of the result.
        model(torch.ones(1, 5)).backward(torch.tensor([[2.5]]))
        assert weight.grad is not None
        assert weight.grad.tolist() == [[expected[2]] * 5]
        assert_integer_exact(model.eval(), ties)


def test_row11_a_fixed_scale_masks_what_is_outside() -> None:
    x = torch.tensor([0.3, 2.0, -2.0])
    model = point(torch.ones(3), bitwidth=4)
    set_fix_method(model, FIX_FIXED)
    assert scale_of(model) == 1.0
    leaf = x.clone().requires_grad_()
    model(leaf).backward(torch.full_like(x, 5.0))
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [5.0, 0.0, 0.0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["linear", "batch_norm", "layer_norm", "prelu", "embedding"])
def test_row11_a_fixed_weight_has_a_gradient_inside_and_at_the_ends(kind: str, bits: int) -> None:
    make: dict[str, Any] = {
        "linear": lambda: nn.Linear(4, 1, bias=False),
        "batch_norm": lambda: nn.BatchNorm1d(4),
        "layer_norm": lambda: nn.LayerNorm(4),
        "prelu": lambda: nn.PReLU(4),
        "embedding": lambda: nn.Embedding(1, 4),
    }
    x = torch.tensor([[-0.5, -0.25, -1.0, -0.75], [-1.0, -0.5, -0.25, -0.25]])
    x = {
        "embedding": torch.tensor([[0]]),
        "batch_norm": x.sign() * x.new_tensor([[1.0], [-1.0]]),
    }.get(kind, x)
    layer = make[kind]()
    linger.prepare(layer, (x,))
    linger.quantize(layer, linger.preset("nics_fix", bitwidth=bits, output_bits=None, range=4.0))
    weight = layer.weight

    def trained(values: list[float]) -> list[bool]:
        with torch.no_grad():
            weight.copy_(torch.tensor(values).view_as(weight))
        layer.zero_grad()
        y = layer(x)
        y.backward(torch.arange(1.0, y.numel() + 1).view_as(y))
        assert weight.grad is not None
        return (weight.grad.flatten() != 0).tolist()

    assert trained([0.25, 0.5, -1.0, 0.125]) == [True] * 4
    set_fix_method(layer, FIX_FIXED)
    top = 1.0 - 2.0 ** (1 - bits)
    assert trained([0.25, 3.0, -1.0, -3.0]) == [True, False, True, False]
    assert trained([0.25, top, -1.0, 0.5]) == [True] * 4
    set_fix_method(layer, FIX_AUTO)
    assert trained([0.25, 3.0, -1.0, -3.0]) == [True] * 4


# --- kinds of scales ------------------------------------------------------------------------------


@pytest.mark.parametrize(("strict", "scale", "value"), [(False, 1.0, 127 / 128), (True, 2.0, 1.0)])
def test_row12_the_end_of_a_range_saturates_unless_it_is_strict(
    strict: bool, scale: float, value: float
) -> None:
    assert linger.QuantConfig().strict_maximum is False
    fields = {"strict_maximum": strict, "output_bits": None}
    model = Chain(nn.Linear(1, 1, bias=False))
    one = torch.ones(1, 1)
    linger.prepare(model, (one,))
    linger.quantize(model, linger.preset("nics_fix", **fields))
    with torch.no_grad():
        model.net[0].weight.fill_(1.0)
        assert model(one).item() == value * value
    assert scale_of(model, "weight") == scale_of(model, "input0") == scale


def test_row13_a_scale_of_any_value_is_the_largest_magnitude() -> None:
    x = torch.tensor([0.2513, -0.52, 0.0])
    model = point(x, bitwidth=4, float_scale=True)
    # Seven codes reach it; the eighth lies below.
    assert scale_of(model) == pytest.approx(0.52 * 8 / 7, rel=1e-6)
    assert model(x).tolist() == pytest.approx([3 * 0.52 / 7, -0.52, 0.0], rel=1e-6)


def test_row14_two_ends_and_an_exact_zero() -> None:
    x = torch.tensor([0.2513, -0.52, 0.0, 0.97, -1.0, 0.4999])
    model = point(x, bitwidth=4, platform="tflite", rounding=None)
    assert scale_of(model) == pytest.approx([-1.0, 0.97], rel=1e-6)
    y = model(x)
    step = 1.97 / 15
    codes = y / step
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert y[2] == 0.0
    assert (y - x).abs().max() <= step * (0.5 + 1e-4)
    assert math.isclose(float(y.max() - y.min()), 15 * step, rel_tol=1e-5)
    site = instrumentation_of(model).sites[0]
    assert site.output.zero_point(float(site.output.step())) == 0


def test_auto_follows_and_fixed_stays() -> None:
    model = point(torch.ones(4))
    for method, scale in ((FIX_AUTO, 8.0), (FIX_FIXED, 8.0), (FIX_AUTO, 2.0)):
        set_fix_method(model, method)
        model(torch.full((4,), 8.0 if scale == 8.0 else 2.0))
        assert scale_of(model) == scale
        model.eval()(torch.full((4,), 100.0))
        assert scale_of(model) == scale
        model.train()
