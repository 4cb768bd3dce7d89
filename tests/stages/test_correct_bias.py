"""Bias correction: the means of the quantized model become those of the float model."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import Chain, Lambda, ResNet, assert_integer_exact, float_state, images

COARSE = linger.QuantConfig(weight_bits=3, activation_bits=8, output_bits=None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def ready(
    model: nn.Module,
    x: Tensor,
    fold: bool = True,
    config: linger.QuantConfig = COARSE,
    **selection: Any,
) -> nn.Module:
    linger.prepare(model.eval(), (x,))
    if fold:
        linger.fuse_bn(model)
    linger.quantize(model, config, **selection)
    return linger.calibrate(model, [x])


def biased(*layers: nn.Module) -> nn.Module:
    """Weights that nearest rounding moves to one side; inputs with a mean of their own."""
    model = Chain(*layers)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.uniform_(0.05, 0.1)
                module.weight.flatten()[0] = 1.0
    return model


@torch.no_grad()
def mean_error(model: nn.Module, x: Tensor, wanted: Tensor) -> float:
    dims = [d for d in range(wanted.dim()) if d != 1]
    return float((model(x) - wanted).mean(dims).square().mean().sqrt())


CORRECTABLE = {
    "a linear layer": (lambda: [nn.Linear(6, 5)], (64, 6), False, "net.0.bias"),
    "a convolution": (lambda: [nn.Conv2d(3, 5, 3)], (8, 3, 6, 6), False, "net.0.bias"),
    "a transposed one": (
        lambda: [nn.ConvTranspose2d(4, 6, 3, groups=2)],
        (8, 4, 6, 6),
        False,
        "net.0.bias",
    ),
    "folded, without bias": (
        lambda: [nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)],
        (8, 3, 6, 6),
        True,
        "net.1.bias",
    ),
    "folded, with bias": (
        lambda: [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)],
        (8, 3, 6, 6),
        True,
        "net.1.bias",
    ),
    "folded, without beta": (
        lambda: [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)],
        (8, 3, 6, 6),
        True,
        "net.0.bias",
    ),
    "before a batch norm": (
        lambda: [nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)],
        (8, 3, 6, 6),
        False,
        "net.1.bias",
    ),
}


@pytest.mark.parametrize(("layers", "shape", "fold", "bias"), CORRECTABLE.values(), ids=CORRECTABLE)
def test_the_mean_error_goes(
    layers: Callable[[], list[nn.Module]], shape: tuple[int, ...], fold: bool, bias: str
) -> None:
    model = biased(*layers())
    x = torch.rand(shape)
    model.train()(x * 1.5)  # statistics that are not those of the data
    wanted = model.eval()(x).detach()
    ready(model, x, fold, overrides={"type:batch_norm": None} if not fold else None)
    state = copy.deepcopy(float_state(model))
    before = mean_error(model, x, wanted)
    (row,) = linger.correct_bias(model, [x])
    assert row.bias == bias
    assert row.error > 0.01
    assert mean_error(model, x, wanted) < 0.02 * before
    changed = {k for k, v in float_state(model).items() if not torch.equal(v, state[k])}
    assert changed == {bias}
    assert_integer_exact(model, x)


def test_layers_are_corrected_one_behind_the_other() -> None:
    """The correction of a later layer counts on that of the earlier ones."""
    model = biased(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))
    x = torch.rand(16, 2, 8, 8)
    wanted = model(x).detach()
    ready(model, x)
    before = mean_error(model, x, wanted)
    rows = linger.correct_bias(model, [x[:8], x[8:]])
    assert [row.why_not for row in rows] == [""] * 3
    assert mean_error(model, x, wanted) < 0.02 * before
    assert_integer_exact(model, x)


def test_only_biases_move() -> None:
    x = images(16)
    model = ready(ResNet(dropout=0.5), x)
    modes = {name: m.training for name, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    linger.correct_bias(model, [x])
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert {k for k in changed if not k.endswith("bias")} == {"_linger._extra_state"}
    assert torch.equal(torch.random.get_rng_state(), random)
    assert {name: m.training for name, m in model.named_modules()} == modes
    instrumentation = instrumentation_of(model)
    assert instrumentation.tap is None
    assert instrumentation.switches.system == "fake"
    assert not instrumentation.stack


def _shared(self: Any, x: Tensor) -> Tensor:
    return self.a(torch.relu(self.a(x)))


def test_what_is_left_alone_says_why() -> None:
    x = torch.rand(4, 5)
    plain = ready(Chain(nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Linear(5, 5)), x)
    rows = linger.correct_bias(plain, [x])
    assert "has no bias, and no batch norm" in rows[0].why_not
    assert math.isnan(rows[0].error)
    assert rows[1].bias == "net.2.bias"
    assert "net.2.bias" in str(rows)
    shared = ready(Lambda(_shared, a=nn.Linear(5, 5)), x)
    assert all("read by 2 calls" in row.why_not for row in linger.correct_bias(shared, [x]))
    left = ready(Chain(nn.Linear(5, 5), nn.Linear(5, 5)), x, overrides={"net.0": None})
    assert "stays float: override" in linger.correct_bias(left, [x])[0].why_not
    lstm = ready(Lambda(lambda self, x: self.r(x)[0], r=nn.LSTM(5, 3)), torch.rand(2, 4, 5))
    (row,) = linger.correct_bias(lstm, [torch.rand(2, 4, 5)])
    assert "no convolution or linear layer" in row.why_not


def test_layers_that_the_data_does_not_reach() -> None:
    def forward(self: Any, x: Tensor, both: bool = True) -> Tensor:
        return self.b(self.a(x)) if both else self.a(x)

    x = torch.rand(4, 5)
    model = ready(Lambda(forward, a=nn.Linear(5, 5), b=nn.Linear(5, 5)), x)
    rows = linger.correct_bias(model, [{"x": x, "both": False}])
    assert [row.why_not for row in rows] == ["", "the calibration data does not reach it"]


def test_modules_choose_layers() -> None:
    x = torch.rand(4, 5)
    model = ready(Chain(nn.Linear(5, 5), nn.Linear(5, 5)), x)
    (row,) = linger.correct_bias(model, [x], modules=["net.1"])
    assert row.site == "net.1/linear/0"
    with pytest.raises(linger.ConfigError, match="matches no module"):
        linger.correct_bias(ready(Chain(nn.Linear(5, 5)), x), [x], modules=["nets"])


def test_a_second_correction_has_no_reference() -> None:
    x = torch.rand(4, 5)
    model = ready(Chain(nn.Linear(5, 5)), x)
    linger.correct_bias(model, [x])
    for again in (linger.correct_bias, linger.adaround):
        with pytest.raises(linger.ConfigError, match=r"`correct_bias` has changed.*start over"):
            again(model, [x])
    twin = Chain(nn.Linear(5, 5))
    ready(twin, x).load_state_dict(model.state_dict())
    with pytest.raises(linger.ConfigError, match="has changed"):
        linger.correct_bias(twin, [x])


def test_what_is_needed_first() -> None:
    x = torch.rand(4, 5)
    with pytest.raises(linger.NotReadyError, match="not prepared"):
        linger.correct_bias(Chain(nn.Linear(5, 5)), [x])
    model = linger.prepare(Chain(nn.Linear(5, 5)), (x,))
    with pytest.raises(linger.NotReadyError, match=r"not quantized yet.*linger.calibrate"):
        linger.correct_bias(model, [x])
    linger.quantize(model)
    with pytest.raises(linger.NotReadyError, match="has seen no range"):
        linger.correct_bias(model, [x])
    linger.calibrate(model, [x])
    with pytest.raises(linger.ConfigError, match="no batch"):
        linger.correct_bias(model, [])
    with pytest.raises(linger.NonFiniteError):
        linger.correct_bias(model, [x * math.nan])
