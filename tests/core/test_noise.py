"""Stochastic rounding: on the grid, unbiased, reproducible, and in training alone."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.noise import Noise
from lightning_linger.core.rounding import stochastic
from tests.models import Chain, Lambda, assert_integer_exact, site_of

SAMPLES = 100_000


@pytest.mark.parametrize("value", [0.5, 0.1, -0.3, 7.001, -126.75, 1e-6, 32766.0625])
def test_row10_the_mean_is_the_value(value: float) -> None:
    x = torch.full((SAMPLES,), value)
    fraction = float(x[0]) - math.floor(value)
    codes = stochastic(x, Noise(0).uniform("here", x))
    assert set(codes.tolist()) <= {math.floor(value), math.floor(value) + 1}
    sigma = math.sqrt(fraction * (1 - fraction) / SAMPLES)
    assert abs(codes.double().mean().item() - float(x[0])) <= 3 * sigma + 1e-12


@given(codes=st.lists(st.integers(-(2**23), 2**23), min_size=1, max_size=20), seed=st.integers(0))
def test_what_is_on_the_grid_stays(codes: list[int], seed: int) -> None:
    x = torch.tensor(codes, dtype=torch.float32)
    assert torch.equal(stochastic(x, Noise(seed).uniform("here", x)), x)


def test_the_smallest_number_moves_no_code() -> None:
    assert stochastic(torch.tensor([3.0, 3.5, -2.0]), torch.zeros(3)).tolist() == [3.0, 4.0, -2.0]


def test_numbers_depend_on_seed_forward_and_place_and_on_nothing_else() -> None:
    like = torch.empty(50)
    noise = Noise(3)
    first = noise.uniform("a", like)
    before = torch.get_rng_state()
    assert torch.equal(noise.uniform("a", like), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(noise.uniform("b", like), first)
    assert not torch.equal(Noise(4).uniform("a", like), first)
    noise.advance()
    assert not torch.equal(noise.uniform("a", like), first)
    assert ((first >= 0) & (first < 1)).all()


def test_processes_share_the_numbers_of_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, like = Noise(3), torch.empty(50)
    here = noise.uniform("a", like), noise.uniform("a", like, shared=True)
    monkeypatch.setattr("lightning_linger.core.noise.rank", lambda: 1)
    there = noise.uniform("a", like), noise.uniform("a", like, shared=True)
    assert not torch.equal(here[0], there[0])
    assert torch.equal(here[1], there[1])


def test_state_continues_where_it_was_saved() -> None:
    noise = Noise(3)
    for _ in range(5):
        noise.advance()
    restored = Noise(0)
    restored.load_state_dict(noise.state_dict())
    like = torch.empty(9)
    assert torch.equal(restored.uniform("a", like), noise.uniform("a", like))


def prepared(config: QuantConfig, *layers: nn.Module) -> tuple[Chain, Tensor]:
    torch.manual_seed(0)
    model = Chain(*(layers or (nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))))
    x = torch.randn(8, 6)
    linger.prepare(model, (x,))
    linger.quantize(model, config)
    model(x)
    return model, x


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
def test_training_draws_anew_and_evaluation_rounds_as_the_platform(platform: str) -> None:
    model, x = prepared(QuantConfig(platform=platform, rounding="stochastic"))
    twin, _ = prepared(QuantConfig(platform=platform))
    assert not torch.equal(model(x), model(x))
    assert site_of(model, "net.0/linear/0").rounding == site_of(twin, "net.0/linear/0").rounding
    model.eval()
    once = model(x)
    assert torch.equal(once, model(x))
    if platform == "venusa":
        assert_integer_exact(model, x)


def test_training_stays_on_the_grid() -> None:
    model, x = prepared(QuantConfig(rounding="stochastic"))
    y = model(x)
    step = site_of(model, "net.2/linear/0").output.latest_step
    assert torch.equal(y / step, torch.round(y / step))


def test_weights_are_rounded_by_chance_too() -> None:
    model, _ = prepared(QuantConfig(rounding="stochastic", output_bits=None, weight_bits=3))
    one = torch.eye(6) * 0.5
    linear = model.net[0]
    results = torch.stack([linear(one) - linear.bias for _ in range(40)])
    assert (results.std(dim=0) > 0).any()


def test_gradients_are_rounded_by_chance_too() -> None:
    """On a grid of 3 bits, and their mean is the gradient."""
    model, x = prepared(QuantConfig(rounding="stochastic", gradient_bits=3, gradient_range=1.0))
    bias, slopes = model.net[2].bias, torch.tensor([0.3, -0.05, 0.0, 0.25])
    found = []
    for _ in range(500):
        bias.grad = None
        (model(x[:1]) * slopes).sum().backward()
        found.append(bias.grad)
    gradients = torch.stack(found)
    assert torch.equal(gradients * 4, torch.round(gradients * 4))
    assert (gradients.std(dim=0) > 0).tolist() == [True, True, False, False]
    sigma = gradients.std(dim=0) / 500**0.5
    assert ((gradients.mean(dim=0) - slopes).abs() <= 4 * sigma).all()


def test_a_resumed_run_draws_the_same_numbers() -> None:
    model, x = prepared(QuantConfig(rounding="stochastic", seed=5))
    other, _ = prepared(QuantConfig(rounding="stochastic", seed=5))
    model(x)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    first, second = model(x), model(x)
    assert torch.equal(other(x), first)
    assert torch.equal(other(x), second)
    assert not torch.equal(first, second)


def test_seeds_differ_and_runs_repeat() -> None:
    def result(seed: int) -> Tensor:
        model, x = prepared(QuantConfig(rounding="stochastic", seed=seed))
        return model(x)

    assert torch.equal(result(1), result(1))
    assert not torch.equal(result(1), result(2))


def test_a_checkpointed_block_is_repeated_with_the_same_numbers() -> None:
    def build(repeat: bool) -> list[Tensor]:
        torch.manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            x = checkpoint(self.block, x, use_reentrant=False) if repeat else self.block(x)
            return self.head(x)

        model = Lambda(forward, stem=nn.Linear(6, 6), block=nn.Linear(6, 6), head=nn.Linear(6, 3))
        x = torch.randn(4, 6)
        linger.prepare(model, (x,))
        linger.quantize(model, QuantConfig(rounding="stochastic"))
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(build(False), build(True), strict=True):
        assert torch.equal(a, b)


def test_calibration_rounds_as_the_platform() -> None:
    model, x = prepared(QuantConfig(rounding="stochastic"))
    twin, _ = prepared(QuantConfig())
    twin.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "noise" not in k and "extra" not in k},
        strict=False,
    )
    linger.calibrate(model, [x])
    linger.calibrate(twin, [x])
    for ours, theirs in zip(
        instrumentation_of(model).sites, instrumentation_of(twin).sites, strict=True
    ):
        for a, b in zip(ours.quantizers(), theirs.quantizers(), strict=True):
            assert torch.equal(a.estimator.range, b.estimator.range)


def test_without_stochastic_rounding_the_state_is_what_it_was() -> None:
    model, _ = prepared(QuantConfig())
    assert not any("noise" in key for key in model.state_dict())


@pytest.mark.parametrize("fields", [{"seed": -1}, {"seed": 1.5}, {"rounding": "random"}])
def test_wrong_fields(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        QuantConfig(**fields)
