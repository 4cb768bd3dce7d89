"""Every range estimator by name: vectors, properties, degenerate tensors, state, weights."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig, QuantizationWarning
from lightning_linger.core.fake_quantize import fake_quantize
from lightning_linger.core.grid import Grid
from lightning_linger.core.ranges import ACCUMULATIONS, RANGE_NAMES, RangeEstimator, RangeRule
from lightning_linger.core.ranges.histogram import BINS, Histogram
from tests.models import Chain, assert_integer_exact, site_of

PERCENT = "99%"
STATISTICS = (*RANGE_NAMES, PERCENT)
RULES = [
    ("" if prefix == "all" else f"{prefix}_") + name
    for prefix in ACCUMULATIONS
    for name in STATISTICS
]


def half_range(name: str, values: Tensor | list[float], grid: Grid | None = None) -> float:
    """What one tensor asks for, seen whole."""
    statistic = RangeRule.parse(name).statistic
    rows = torch.as_tensor(values, dtype=torch.float32).reshape(1, -1)
    return float(statistic.measure(rows, None, grid or Grid()))


def rounded(values: list[float], half: float, grid: Grid) -> list[float]:
    step = grid.step_value(half)
    return fake_quantize(torch.tensor(values), step, grid.qmin, grid.qmax, grid.rounding).tolist()


# --- vectors of NICS-fix ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "values", "bits", "step", "expected"),
    [
        ("last_absmax", [0.2513, -0.52, 0.0], 2, 0.5, [0.5, -0.5, 0.0]),
        ("last_absmax", [0.2513, -0.5, 0.0], 2, 0.25, [0.25, -0.5, 0.0]),
        ("last_three_sigma", [0.2513, -0.52, 0.0], 4, 0.25, [0.25, -0.5, 0.0]),
    ],
    ids=["row02-max", "row02-max-power-of-two", "row03-three-sigma"],
)
def test_vectors(
    rule: str, values: list[float], bits: int, step: float, expected: list[float]
) -> None:
    grid = Grid(bits, rounding="half_even")
    half = half_range(rule, values, grid)
    assert grid.step_value(half) == step
    assert rounded(values, half, grid) == expected


def test_row04_the_top_tenth_saturates() -> None:
    values = torch.cat([torch.full((90,), 0.2), torch.linspace(0.6, 4, 10)])
    half = half_range("last_top_tenth", values)
    assert half == values[90]
    assert Grid(8).step_value(half) == 2.0**-7


@pytest.mark.parametrize("count", range(1, 12))
def test_row04_fewer_than_ten_values(count: int) -> None:
    assert half_range("last_top_tenth", torch.arange(1.0, count + 1)) == count


def test_row05_the_sweep_takes_the_first_of_three_candidates_with_the_least_error() -> None:
    values = [0.1] * 100 + [1.01]
    grid = Grid(4, rounding="half_even")
    half = half_range("last_l1", values, grid)
    assert half == 1.0
    assert set(np.round(rounded(values, half, grid), 6)) == {0.125, 0.875}
    # A tie: all candidates hold zero exactly, the covering one comes first.
    assert half_range("last_l1", [0.0, 0.0], grid) == 0.0
    # Half a step too much, or clipped: both by a quarter.
    assert half_range("last_l1", [-0.75], Grid(2, rounding="half_even")) == 1.0


@pytest.mark.parametrize(
    ("small", "count", "half"),
    [
        # Absolute errors with 2, 1 and 1/2: 4.63, 3.74, 0.72. Squared ones: 0.23, 0.23, 0.33.
        (0.06, 60, 0.5),
        # An eighth would be better still.
        (0.04, 2000, 0.5),
        (0.1, 100, 1.0),
        (0.1, 1, 2.0),
    ],
)
def test_row05_three_candidates_and_absolute_errors(small: float, count: int, half: float) -> None:
    values = [small] * count + [1.01]
    assert half_range("last_l1", values, Grid(4, rounding="half_even")) == half


@pytest.mark.parametrize("exponent", range(-30, 31))
def test_row06_a_power_of_two_is_its_own_range(exponent: int) -> None:
    values = [2.0**exponent]
    assert half_range("last_absmax", values) == values[0]
    # One value that saturates by less than it rounds: no smaller candidate is better.
    assert half_range("last_l1", [-values[0]], Grid(8)) == values[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", ["power_of_two", "free"])
def test_row07_zeros_have_a_finite_step(rule: str, scale: str) -> None:
    grid = Grid(8, scale)
    estimator = RangeEstimator(rule, "x", grid)
    for _ in range(2):
        estimator.observe(torch.zeros(20))
    step = grid.step_value(float(estimator.absmax()))
    assert 0 < step < math.inf
    assert fake_quantize(torch.zeros(3), step, grid.qmin, grid.qmax).tolist() == [0.0, 0.0, 0.0]


def test_row35_the_mean_of_batches_is_the_mean() -> None:
    estimator = RangeEstimator("mean_absmax", "x")
    for value in (1.0, 2.0, 6.0):
        estimator.observe(torch.tensor([value]))
    assert estimator.range.tolist() == pytest.approx([-3.0, 3.0])
    estimator = RangeEstimator("mean_minmax", "x")
    for low, high in ((-4.0, 1.0), (-2.0, 3.0)):
        estimator.observe(torch.tensor([low, high]))
    assert estimator.range.tolist() == pytest.approx([-3.0, 2.0])


# --- what each statistic means ----------------------------------------------------------------


def test_row03_three_sigma_by_numpy() -> None:
    values = torch.randn(500) + 0.3
    array = values.numpy().astype(np.float64)
    expected = 3 * array.std(ddof=1) + abs(array.mean())
    assert half_range("three_sigma", values) == pytest.approx(expected, rel=1e-5)
    assert half_range("three_sigma", [-2.5]) == 2.5


def test_top_10() -> None:
    values = torch.randperm(100).float()
    assert half_range("top_10", -values) == 90.0
    assert half_range("top_10", list(range(11))) == 10.0
    assert half_range("top_10", list(range(12))) == 2.0


@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=50),
    percent=st.sampled_from([0.5, 10, 50, 90, 99, 99.9, 100]),
)
def test_percentile_is_a_magnitude_of_its_rank(values: list[float], percent: float) -> None:
    ordered = sorted(abs(value) for value in values)
    expected = ordered[max(1, round(len(values) * percent / 100)) - 1]
    assert half_range(f"{percent}%", values) == expected


@pytest.mark.parametrize("name", ["mse", "l1", "w_like"])
@pytest.mark.parametrize("scale", ["power_of_two", "free"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sweeps_are_no_worse_than_their_candidates(name: str, scale: str, bits: int) -> None:
    grid = Grid(bits, scale, "half_even")
    values = torch.cat([torch.randn(300), torch.tensor([9.0, -11.0])])
    largest = float(values.abs().max())
    candidates = {
        "mse": [largest / 2**k for k in range(max(bits, 4))]
        if scale == "power_of_two"
        else [largest * k / 64 for k in range(2, 65)],
        "l1": [16.0, 8.0, 4.0],
        "w_like": [2.0 ** (e + bits - 1) for e in range(-10, 10)],
    }[name]

    def error(half: float) -> float:
        step = grid.step_value(np.float32(half))
        y = fake_quantize(values, step, grid.qmin, grid.qmax, grid.rounding)
        return float((y - values).double().abs().pow(1 if name == "l1" else 2).sum())

    found = half_range(name, values, grid)
    assert error(found) == pytest.approx(min(map(error, candidates)), rel=1e-6)
    assert any(found == pytest.approx(candidate) for candidate in candidates)


def test_entropy_leaves_a_far_outlier_out_and_keeps_a_uniform_range() -> None:
    gaussian = torch.cat([torch.randn(50_000), torch.tensor([30.0])])
    assert 2.5 < half_range("kl", gaussian) < 8.0
    uniform = torch.rand(50_000) * 2 - 1
    assert half_range("kl", uniform) > 0.9
    # With more codes than bins there is nothing to gain.
    assert half_range("kl", gaussian, Grid(16)) == pytest.approx(30.0)


def test_entropy_does_not_clip_more_for_the_zeros_behind_a_relu() -> None:
    values = torch.randn(50_000)
    sparse = torch.cat([values.relu(), values.new_zeros(200_000)])
    assert half_range("kl", sparse) == half_range("kl", values[values > 0])


def test_entropy_does_not_settle_for_the_few_values_next_to_zero() -> None:
    lone = torch.cat([torch.tensor([7.5 / 2048] * 5), torch.linspace(0.1, 1.0, 5_000)])
    assert half_range("kl", lone, Grid(4)) > 0.9


@pytest.mark.parametrize("name", STATISTICS)
@settings(max_examples=20)
@given(exponent=st.integers(-8, 8), seed=st.integers(0, 100))
def test_a_scaled_tensor_has_a_scaled_range(name: str, exponent: int, seed: int) -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(seed))
    if name == "w_like":
        return  # searches absolute steps
    scaled = half_range(name, values * 2.0**exponent)
    assert scaled == pytest.approx(half_range(name, values) * 2.0**exponent, rel=1e-5)


@pytest.mark.parametrize("name", STATISTICS)
@settings(max_examples=30)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12))
def test_any_tensor_has_a_finite_range_and_leaves_zero_alone(
    name: str, values: list[float]
) -> None:
    half = half_range(name, values)
    assert 0 <= half < math.inf
    if name not in ("three_sigma", "l1", "w_like", "lsq_start"):
        assert half <= max(map(abs, values)) * (1 + 1e-6)
    assert 0.0 in rounded([0.0], half, Grid())


@pytest.mark.parametrize("name", STATISTICS)
def test_degenerate_tensors(name: str) -> None:
    for values in ([3.0], [0.25] * 30, [1e-40, -1e-42], [1e-38] * 13):
        half = half_range(name, values)
        assert math.isfinite(half)
        assert half >= 0
        assert 0 < Grid().step_value(half) < math.inf


@pytest.mark.parametrize("name", STATISTICS)
def test_rows_are_measured_apart(name: str) -> None:
    rows = torch.randn(5, 60) * torch.tensor([[0.1], [1.0], [0.0], [7.0], [2.0]])
    found = RangeRule.parse(name).statistic.measure(rows, None, Grid())
    assert found.shape == (5,)
    assert found.dtype == torch.float32
    expected = [half_range(name, row) for row in rows]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


# --- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_values_and_tensors_move_the_range_alike(rule: str) -> None:
    """A GPU and a capture take the path that reads nothing."""
    read, unread = RangeEstimator(rule, "x"), RangeEstimator(rule, "x")
    for scale in (1.0, 3.0, 0.5):
        batch = torch.randn(70) * scale
        read.observe(batch, high=2.5)
        extremes = torch.stack(torch.aminmax(batch))
        unread._observe_tensors(batch, extremes, -math.inf, 2.5)
    for name, buffer in read.named_buffers():
        torch.testing.assert_close(unread.get_buffer(name), buffer)


@pytest.mark.parametrize("rule", RULES)
def test_a_poisoned_batch_changes_nothing(rule: str) -> None:
    estimator = RangeEstimator(rule, "net.conv")
    estimator.observe(torch.randn(30))
    before = {k: v.clone() for k, v in estimator.named_buffers()}
    poisoned = torch.tensor([0.5, math.nan, 100.0] * 5)
    with pytest.warns(QuantizationWarning, match=r"`net\.conv`"):
        estimator.observe(poisoned)
    estimator._observe_tensors(poisoned, torch.tensor([math.nan, math.nan]), -math.inf, math.inf)
    for name, buffer in estimator.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("rule", RULES)
def test_state_is_all_there_is(rule: str) -> None:
    one = RangeEstimator(rule, "x")
    one.observe(torch.randn(50))
    two = RangeEstimator(rule, "x")
    two.load_state_dict(one.state_dict())
    batch = torch.randn(50) * 3
    one.observe(batch)
    two.observe(batch)
    assert torch.equal(one.range, two.range)
    assert ("counts" in one.state_dict()) == RangeRule.parse(rule).pools


def test_last_follows_and_all_does_not_shrink() -> None:
    wide, narrow = torch.randn(100) * 5, torch.randn(100)
    for name in STATISTICS:
        last = RangeEstimator(f"last_{name}", "x")
        last.observe(wide)
        last.observe(narrow)
        assert float(last.absmax()) == half_range(name, narrow)
    for name in ("absmax", "three_sigma", "top_10"):
        widest = RangeEstimator(name, "x")
        widest.observe(wide)
        widest.observe(narrow)
        assert float(widest.absmax()) == half_range(name, wide)


@given(sizes=st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=6))
def test_a_histogram_grows_without_losing_a_count(sizes: list[float]) -> None:
    batches = [torch.linspace(-size, size, 41) for size in sizes]
    grown = Histogram.of(batches[0])
    for batch in batches[1:]:
        grown = grown.with_values(batch)
    assert int(grown.counts.sum()) == 41 * len(sizes)
    top = float(grown.top)
    assert top >= max(sizes)
    if top > 0:
        everything = torch.cat(batches).abs()
        at_once = (everything / grown.top * BINS).long().clamp(max=BINS - 1)
        expected = torch.bincount(at_once, minlength=BINS)
        # A value next to an edge may have been counted beside it while the range was smaller.
        assert int((grown.counts.cumsum(0) - expected.cumsum(0)).abs().max()) <= 41


@pytest.mark.parametrize("doublings", range(1, 9))
def test_a_histogram_holds_what_is_just_above_a_doubling(doublings: int) -> None:
    """A logarithm in float32 takes such a ratio for the power of two itself."""
    above = torch.nextafter(torch.tensor(2.0**doublings), torch.tensor(math.inf))
    grown = Histogram.of(torch.ones(1)).with_values(above)
    assert float(grown.top) == 2.0 ** (doublings + 1)
    assert int(grown.counts[: BINS // 2].sum()) == 1


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.9])
def test_pooled_percentiles_cover_all_batches(percent: float) -> None:
    estimator = RangeEstimator(f"{percent}%", "x")
    batches = [torch.randn(2000) * scale for scale in (1.0, 2.0, 0.3)]
    for batch in batches:
        estimator.observe(batch)
    exact = half_range(f"{percent}%", torch.cat(batches))
    width = float(estimator.top) / BINS
    assert exact - width <= float(estimator.absmax()) <= exact + 2 * width


@pytest.mark.parametrize("name", ["mse", "l1", "w_like", "kl"])
def test_pooled_sweeps_see_all_batches(name: str) -> None:
    estimator = RangeEstimator(name, "x")
    batches = [torch.randn(3000), torch.randn(3000) * 4]
    for batch in batches:
        estimator.observe(batch)
    exact = half_range(name, torch.cat(batches))
    step = estimator.grid.step_value
    assert step(float(estimator.absmax())) == step(exact)


# --- in a model -------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
@pytest.mark.parametrize("name", STATISTICS)
def test_weights_and_activations_of_a_model(name: str, platform: str) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 4, 2, groups=2))
    x = torch.randn(4, 3, 9)
    linger.prepare(model, (x,))
    config = QuantConfig(platform=platform, range=f"ema_{name}", weight_range=name, weight_bits=4)
    linger.quantize(model, config)
    model(x).sum().backward()
    site = site_of(model, "net.0/conv1d/0")
    rows = model.net[0].weight.detach().flatten(1)
    rows = rows if platform == "onnxruntime" else rows.reshape(1, -1)
    grid = site.weights.grid
    expected = grid.step(RangeRule.parse(name).statistic.measure(rows, None, grid))
    model.eval()
    with torch.no_grad():
        model(x)
    assert torch.equal(torch.tensor(site.prepared["weights"].steps), expected)
    if platform == "venusa":
        assert_integer_exact(model, x)


def test_a_fixed_weight_range_clips_values_and_gradients() -> None:
    model = Chain(nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model.net[0].weight.copy_(torch.tensor([[0.3, 4.0, -4.0]]))
    x = torch.ones(2, 3)
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(weight_range=1.0, output_bits=None))
    y = model(x)
    y.sum().backward()
    assert torch.equal(model.net[0].weight.grad != 0, torch.tensor([[True, False, False]]))
    weight = torch.tensor([round(0.3 * 128) / 128, 127 / 128, -1.0])
    assert torch.allclose(y, (weight * 1.0).sum().expand(2, 1), atol=1e-2)
    model.eval()
    assert_integer_exact(model, x)


def test_embeddings_and_attention_follow_too() -> None:
    table = nn.Embedding(30, 4)
    linger.prepare(table, (torch.arange(6),))
    linger.quantize(table, QuantConfig(weight_range="50%"))
    table(torch.arange(6))
    half = half_range("50%", table.weight.detach())
    step = site_of(table, "/embedding/0").weights.grid.step_value(half)
    table.eval()
    with torch.no_grad():
        assert float(table(torch.arange(30)).abs().max()) <= 128 * step

    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    linger.prepare(layer, (x, x, x))
    linger.quantize(layer, QuantConfig(weight_range="mse", weight_bits=3))
    layer(x, x, x)
    layer.eval()
    wide = copy.deepcopy(layer)
    assert_integer_exact(layer, x, x, x)
    assert torch.equal(wide(x, x, x)[0], layer(x, x, x)[0])


@pytest.mark.parametrize("spec", ["ema", "mean_", "log", "101%", "0%", "%", "ema_8.0", "-3%"])
def test_names_that_mean_nothing(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"`range` must be.*'99.9%'"):
        QuantConfig(range=spec)
    with pytest.raises(ConfigError, match="`weight_range` must be"):
        QuantConfig(weight_range=spec)


def test_a_weight_has_no_batches() -> None:
    with pytest.raises(ConfigError, match="`weight_range` sees one tensor"):
        QuantConfig(weight_range="ema_absmax")
