"""Grids with a zero point: their parameters, their quantizers, and what stays exact."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_linger.core.errors import ConfigError
from lightning_linger.core.grid import Grid
from lightning_linger.core.quantizer import Quantizer, Window
from lightning_linger.core.ranges import LearnedRange, RangeEstimator
from lightning_linger.core.tags import tag_of

AFFINE = Grid(8, "free", "half_away", symmetry="affine")
VALUES = st.floats(-1e6, 1e6, width=32)
BITS = st.integers(2, 8)


def parameters(low: float, high: float, grid: Grid = AFFINE) -> tuple[float, int]:
    step = grid.step_value_of_range(low, high)
    return step, grid.zero_point_value_of_range(low, step)


@pytest.mark.parametrize(
    ("low", "high", "step", "zero_point"),
    [
        pytest.param(-1.0, 3.0, 0.0156862754, -64, id="row68-both-sides"),
        pytest.param(0.0, 6.0, 0.0235294122, -128, id="row68-relu6"),
        pytest.param(-2.5, 0.7, 0.0125490194, 71, id="row68-mostly-negative"),
        pytest.param(0.5, 1.0, 0.0039215689, -128, id="row68-zero-is-included"),
    ],
)
def test_parameters(low: float, high: float, step: float, zero_point: int) -> None:
    found, place = parameters(float(np.float32(low)), float(np.float32(high)))
    assert np.float32(found) == np.float32(step)
    assert place == zero_point


def test_row68_a_zero_point_between_two_codes_goes_away_from_zero() -> None:
    assert AFFINE.zero_point_value_of_range(-1.5, 1.0) == -127
    assert AFFINE.zero_point_of_range(torch.tensor(-1.5), torch.tensor(1.0)).item() == -127


def test_row68_an_empty_range_has_a_usable_step() -> None:
    step, zero_point = parameters(0.0, 0.0)
    assert (step, zero_point) == (1.0, -128)


@given(bits=BITS, low=VALUES, high=VALUES, kind=st.sampled_from(["free", "power_of_two"]))
@example(bits=8, low=-1.0, high=1.0, kind="free")
@example(bits=8, low=1e-42, high=-1e-40, kind="free")
def test_row14_tensors_and_numbers_give_the_same_parameters(
    bits: int, low: float, high: float, kind: str
) -> None:
    grid = Grid(bits, kind, "half_away", symmetry="affine")
    step, zero_point = parameters(low, high, grid)
    as_tensor = grid.step_of_range(torch.tensor(low), torch.tensor(high))
    assert as_tensor.item() == step
    assert grid.zero_point_of_range(torch.tensor(low), as_tensor).item() == zero_point


@given(bits=BITS, low=VALUES, high=VALUES, kind=st.sampled_from(["free", "power_of_two"]))
def test_row14_zero_is_a_code_and_the_range_is_covered(
    bits: int, low: float, high: float, kind: str
) -> None:
    low, high = sorted((low, high))
    assume(high - low > 1e-30)
    grid = Grid(bits, kind, "half_away", symmetry="affine")
    step, zero_point = parameters(low, high, grid)
    assert grid.qmin <= zero_point <= grid.qmax
    # At most half a step is lost at an end, because the zero point is a whole number.
    slack = 0.5001 * step
    assert (grid.qmin - zero_point) * step <= min(low, 0.0) + slack
    assert (grid.qmax - zero_point) * step >= max(high, 0.0) - slack


@given(bits=BITS, ends=st.lists(VALUES, min_size=4, max_size=4))
def test_a_wider_range_never_has_a_finer_step(bits: int, ends: list[float]) -> None:
    a, b, c, d = sorted(ends)
    grid = Grid(bits, "free", "half_away", symmetry="affine")
    assume(max(c, 0.0) - min(b, 0.0) > 1e-30)
    assert grid.step_value_of_range(b, c) <= grid.step_value_of_range(a, d)


def quantizer(
    window: Window | None = None, kind: str | float | tuple[float, float] = "ema_absmax"
) -> Quantizer:
    return Quantizer("layer", AFFINE, kind, window)


def stored(x: Tensor) -> Tensor:
    tag = tag_of(x)
    assert tag is not None
    assert tag.zero_point is not None
    codes = x.double() / tag.step
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    return codes.round().long() + tag.zero_point


@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
@example(values=[0.0])
@example(values=[5.0])
@example(values=[-5.0] * 3)
@example(values=[1e-44, -1e-42])
@example(values=[1e-44, 1.0])
def test_row14_a_quantizer_keeps_zero_and_stays_within_the_codes(values: list[float]) -> None:
    x = torch.tensor([*values, 0.0])
    found = quantizer()
    y = found(x, learn=True)
    codes = stored(y)
    assert codes.min() >= -128
    assert codes.max() <= 127
    assert y[-1] == 0.0
    step = float(found.step())
    if max(map(abs, values)) > 1e-30:
        assert (y - x).abs().max() <= step * 1.001
    else:
        assert not y.any()
    assert torch.isfinite(y).all()


def test_codes_of_one_sided_values_use_the_whole_width() -> None:
    y = quantizer()(torch.linspace(0.0, 5.0, 1000), learn=True)
    assert sorted(set(stored(y).tolist())) == list(range(-128, 128))
    y = quantizer()(torch.linspace(-5.0, -1.0, 2000), learn=True)
    assert int(stored(y).min()) == -128


def test_a_window_clamps_at_rounded_edges() -> None:
    found = quantizer(Window(low=-10.5 / 128, high=10.5 / 128), kind=(-1.0, 127 / 128))
    # Halves go away from zero.
    assert found.code_bounds(1 / 128) == (-11, 11)
    found.window = Window(low=-2.0, high=2.0)
    assert found.code_bounds(1 / 128) == (-128, 127)
    assert found.code_bounds(torch.tensor(1 / 128)) == (-128, 127)


def test_the_gradient_stops_where_values_saturate() -> None:
    x = torch.linspace(-2.0, 4.0, 31)
    found = quantizer()
    found(torch.tensor([-1.0, 3.0]), learn=True)
    leaf = x.clone().requires_grad_()
    found(leaf).sum().backward()
    assert torch.equal(leaf.grad, ((x > -1.0) & (x < 3.0)).float())


def test_the_parameters_follow_a_model_to_its_state() -> None:
    found = quantizer()
    found(torch.tensor([-0.3, 1.7]), learn=True)
    other = quantizer()
    other.load_state_dict(found.state_dict())
    x = torch.randn(50)
    assert torch.equal(found.eval()(x), other.eval()(x))
    assert found.zero_point(float(found.step())) == other.zero_point(float(other.step())) != 0


def test_a_fixed_range_has_two_ends() -> None:
    found = quantizer(kind=(-16.0 + 1 / 16, 0.0))
    assert found.known
    step = float(found.step())
    assert (step, found.zero_point(step)) == (1 / 16, 127)


def test_unreadable_ranges_give_the_same_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU and a graph capture compute with tensors."""
    x = torch.randn(1000) + 0.5
    values, tensors = quantizer(Window(high=1.5)), quantizer(Window(high=1.5))
    expected = values(x, learn=True)
    for module in ("quantizer", "ranges.estimator", "gradients"):
        monkeypatch.setattr(f"lightning_linger.core.{module}.can_read", lambda tensor: False)
    found = tensors(x, learn=True)
    assert torch.equal(found, expected)
    tag, other = tag_of(found), tag_of(expected)
    assert tag is not None
    assert other is not None
    assert isinstance(tag.zero_point, Tensor)
    assert int(tag.zero_point) == other.zero_point


# --- estimators ---------------------------------------------------------------------------------

KINDS = ("ema_absmax", "absmax", "last_absmax", "minmax", "mse", "99.9%", "kl", "mean_three_sigma")


@pytest.mark.parametrize("kind", KINDS)
def test_row14_a_range_has_two_ends(kind: str) -> None:
    torch.manual_seed(0)
    found = RangeEstimator(kind, "layer", AFFINE)
    for _ in range(3):
        found.observe(torch.rand(4000) * 3.0 - 0.5)
    low, high = found.range.tolist()
    assert -0.51 < low < -0.4
    assert 2.0 < high < 3.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-42])
def test_a_constant_has_a_range_that_makes_a_step(kind: str, value: float) -> None:
    found = RangeEstimator(kind, "layer", AFFINE)
    for _ in range(2):
        found.observe(torch.full((64,), value))
    low, high = found.range.tolist()
    step, zero_point = parameters(low, high)
    assert math.isfinite(step)
    assert step > 0
    assert -128 <= zero_point <= 127


def test_row78_a_range_is_a_moving_average_of_both_ends() -> None:
    found = RangeEstimator("ema_absmax", "layer", AFFINE)
    found.observe(torch.tensor([-1.0, 2.0]))
    found.observe(torch.tensor([-3.0, 7.0]))
    assert found.range.tolist() == pytest.approx([-1.2, 2.5])


def test_other_grids_keep_symmetric_ranges() -> None:
    found = RangeEstimator("ema_absmax", "layer", Grid(8))
    found.observe(torch.tensor([-1.0, 2.0]))
    assert found.range.tolist() == [-2.0, 2.0]
    assert "ends" not in dict(RangeEstimator("mse", "layer", Grid(8)).named_buffers())


# --- learned ends -------------------------------------------------------------------------------


def learning(window: Window | None = None) -> Quantizer:
    """LSQ+ behind its first batch, whose range is -1 to 2."""
    found = Quantizer("layer", AFFINE, "lsq", window)
    found.estimator.range.copy_(torch.tensor([-1.0, 2.0]))
    assert found.learned is not None
    found.learned.follow_range(*found.estimator.range.unbind())
    found.learned.start()
    found.estimator._known = True
    return found


def test_a_learned_range_starts_from_the_estimator() -> None:
    found = learning()
    assert isinstance(found.learned, LearnedRange)
    assert found.step() == float(np.float32(3.0) / np.float32(255))
    assert found.learned.offset.item() == -1.0
    assert found.zero_point(found.step()) == -43


@pytest.mark.parametrize("window", [Window(), Window(low=0.0), Window(high=1.0)])
def test_gradients_of_step_and_offset(window: Window) -> None:
    """LSQ+, equations 4 and 5, behind the window: codes count from the first one of the grid."""
    torch.manual_seed(0)
    found = learning(window)
    x = (torch.randn(500) * 2).requires_grad_()
    cotangent = torch.randn(500)
    y = found(x)
    (y * cotangent).sum().backward()
    step, n, p = float(found.step()), -85, 170
    low, high = (int(code) for code in found.code_bounds(step))
    assert (low, high) == (max(n, 0) if window.low == 0 else n, 85 if window.high == 1 else p)
    scale = 1 / math.sqrt(500 * 255)
    expected_step = expected_offset = 0.0
    expected = []
    for value, g in zip(x.tolist(), cotangent.tolist(), strict=True):
        v = min(max(value, window.low), window.high) / step
        clipped = not n - 0.5 <= v < p + 0.5
        expected.append(0.0 if clipped or not window.low < value < window.high else g)
        if clipped:
            expected_offset += g
            expected_step += g * 255 if v > 0 else 0.0
        else:
            expected_step += g * (math.copysign(math.floor(abs(v) + 0.5), v) - v)
    learned = found.learned
    assert isinstance(learned, LearnedRange)
    of_value = expected_step * scale * AFFINE.qmax  # the parameter is `qmax` steps
    assert learned.value.grad.item() == pytest.approx(of_value, rel=1e-3, abs=1e-2)
    assert learned.offset.grad.item() == pytest.approx(expected_offset * scale, rel=1e-3, abs=1e-6)
    assert torch.equal(x.grad, torch.tensor(expected))


def test_an_offset_above_zero_leaves_zero_a_code() -> None:
    found = learning()
    with torch.no_grad():
        found.get_parameter("learned.offset").fill_(0.5)
    assert found.zero_point(found.step()) == -128
    assert found(torch.tensor([0.0, 0.2]))[0] == 0.0


@pytest.mark.parametrize("kind", ["tqt", "pact"])
def test_other_learned_ranges_have_no_offset(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"`layer`: range='{kind}'.*Use range='lsq'"):
        Quantizer("layer", AFFINE, kind)


def test_a_module_shows_its_grid() -> None:
    assert "affine" in repr(nn.ModuleList([quantizer()]))
