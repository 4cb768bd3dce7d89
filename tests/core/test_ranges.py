"""Range estimators."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from lightning_linger import ConfigError, QuantizationWarning
from lightning_linger.core.ranges import RANGE_NAMES, RangeEstimator


def _observed(kind: str | float, *batches: list[float]) -> RangeEstimator:
    estimator = RangeEstimator(kind, "net.conv")
    for batch in batches:
        estimator.observe(torch.tensor(batch))
    return estimator


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ema_absmax", [-2.0, 2.0]),
        ("absmax", [-2.0, 2.0]),
        ("ema_minmax", [-2.0, 1.0]),
        ("minmax", [-2.0, 1.0]),
    ],
)
def test_the_first_batch_is_taken_whole(kind: str, expected: list[float]) -> None:
    assert _observed(kind, [0.5, -2.0, 1.0]).range.tolist() == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ema_absmax", [-2.2, 2.2]),  # 2 + 0.1 * (4 - 2)
        ("absmax", [-4.0, 4.0]),
        ("ema_minmax", [-1.7, 1.3]),  # towards [1, 4]
        ("minmax", [-2.0, 4.0]),
    ],
)
def test_later_batches_move_the_range(kind: str, expected: list[float]) -> None:
    estimator = _observed(kind, [-2.0, 1.0], [1.0, 4.0])
    assert estimator.range.tolist() == pytest.approx(expected)
    assert estimator.batches == 2


def test_extremes_never_shrink_and_averages_do() -> None:
    assert _observed("absmax", [4.0], [1.0]).range.tolist() == [-4.0, 4.0]
    assert _observed("minmax", [-3.0, 4.0], [1.0, 1.0]).range.tolist() == [-3.0, 4.0]
    assert _observed("ema_absmax", [4.0], [1.0]).range.tolist() == pytest.approx([-3.7, 3.7])


def test_a_fixed_range_is_known_and_stays() -> None:
    estimator = _observed(2.5, [100.0], [math.nan])
    assert estimator.known
    assert estimator.range.tolist() == [-2.5, 2.5]
    assert estimator.absmax().item() == 2.5


@pytest.mark.parametrize("kind", RANGE_NAMES)
def test_nothing_is_known_before_the_first_batch(kind: str) -> None:
    estimator = RangeEstimator(kind, "net.conv")
    assert not estimator.known
    estimator.observe(torch.zeros(0, 3))
    assert not estimator.known
    assert estimator.batches == 0
    estimator.observe(torch.zeros(2))
    assert estimator.known


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", RANGE_NAMES)
def test_a_poisoned_batch_is_left_out_and_named(kind: str, poison: float) -> None:
    estimator = _observed(kind, [-1.0, 2.0])
    before = estimator.range.clone()
    with pytest.warns(QuantizationWarning, match=r"`net\.conv`.*NaN or infinity"):
        estimator.observe(torch.tensor([0.5, poison, 100.0]))
    assert torch.equal(estimator.range, before)
    assert estimator.batches == 1


def test_a_poisoned_first_batch_leaves_the_range_unknown() -> None:
    estimator = RangeEstimator("ema_absmax", "net.conv")
    with pytest.warns(QuantizationWarning):
        estimator.observe(torch.tensor([math.nan]))
    assert not estimator.known
    estimator.observe(torch.tensor([3.0]))
    assert estimator.range.tolist() == [-3.0, 3.0]


def test_clean_batches_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _observed("ema_absmax", [1.0], [2.0], [0.0])


def test_what_the_follower_drops_is_not_observed() -> None:
    estimator = RangeEstimator("ema_absmax", "x")
    estimator.observe(torch.tensor([-50.0, 3.0]), low=0.0)
    assert estimator.absmax() == 3.0
    estimator = RangeEstimator("minmax", "x")
    estimator.observe(torch.tensor([-50.0, 30.0]), low=0.0, high=6.0)
    assert estimator.range.tolist() == [0.0, 6.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_observed_in_float32(dtype: torch.dtype) -> None:
    estimator = RangeEstimator("ema_absmax", "x")
    batch = torch.tensor([-1.5, 0.5], dtype=dtype)
    estimator.observe(batch)
    assert estimator.range.dtype == torch.float32
    assert estimator.range.tolist() == [-1.5, 1.5]


def test_observing_needs_no_graph_and_leaves_the_batch_alone() -> None:
    batch = torch.tensor([1.0, -2.0], requires_grad=True)
    estimator = RangeEstimator("ema_absmax", "x")
    estimator.observe(batch, low=0.0)
    assert not estimator.range.requires_grad
    assert batch.tolist() == [1.0, -2.0]


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4), (1, 1, 1, 1, 2)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    estimator = RangeEstimator("absmax", "x")
    estimator.observe(torch.full(shape, -2.0))
    assert estimator.absmax() == 2.0


@pytest.mark.parametrize("kind", ["histogram", "", 0, 0.0, -1.0, math.nan, math.inf, "EMA_ABSMAX"])
def test_impossible_kinds(kind: object) -> None:
    with pytest.raises(ConfigError, match=r"`net\.fc`"):
        RangeEstimator(kind, "net.fc")


def test_a_loaded_range_is_known() -> None:
    source = _observed("ema_absmax", [3.0])
    target = RangeEstimator("ema_absmax", "x")
    target.load_state_dict(source.state_dict())
    assert target.known
    absmax: Tensor = target.absmax()
    assert absmax.item() == 3.0
