"""The grid: its codes, and the step that covers a range."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_linger import ConfigError
from lightning_linger.core.grid import Grid

BITS = st.integers(2, 32)
# Exponents stay within the registers' range for every width.
ABSMAX = st.floats(2.0**-20, 2.0**20, width=32)


@given(bits=BITS, absmax=ABSMAX)
def test_power_of_two_step_is_the_smallest_that_covers(bits: int, absmax: float) -> None:
    step = Grid(bits).step(torch.tensor(absmax)).item()
    if math.log2(absmax) - bits + 1 <= -31:
        return
    mantissa, _ = math.frexp(step)
    assert mantissa == 0.5
    assert absmax <= 2 ** (bits - 1) * step
    assert absmax > 2 ** (bits - 1) * step / 2


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("exponent", [-5, 0, 3])
def test_a_power_of_two_range_keeps_every_bit(bits: int, exponent: int) -> None:
    absmax = torch.tensor(2.0**exponent)
    assert Grid(bits).step(absmax).item() == 2.0 ** (exponent - bits + 1)
    above = torch.nextafter(absmax, torch.tensor(math.inf))
    assert Grid(bits).step(above).item() == 2.0 ** (exponent - bits + 2)


@given(bits=BITS, absmax=ABSMAX)
def test_row13_a_free_step_puts_the_top_code_on_the_range(bits: int, absmax: float) -> None:
    step = Grid(bits, "free").step(torch.tensor(absmax))
    assert step.item() == pytest.approx(absmax / (2 ** (bits - 1) - 1), rel=1e-6)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["power_of_two", "free"])
@given(bits=BITS, a=ABSMAX, b=ABSMAX)
def test_a_wider_range_never_has_a_finer_step(
    kind: str, strict: bool, bits: int, a: float, b: float
) -> None:
    grid = Grid(bits, kind, strict=strict)
    low, high = sorted((a, b))
    assert grid.step(torch.tensor(low)) <= grid.step(torch.tensor(high))


@pytest.mark.parametrize("kind", ["power_of_two", "free"])
def test_row07_a_zero_range_has_a_usable_step(kind: str) -> None:
    step = Grid(8, kind).step(torch.zeros(3))
    assert torch.isfinite(step).all()
    assert (step > 0).all()


def test_step_works_per_channel() -> None:
    absmax = torch.tensor([0.0, 1.0, 3.0, 128.0])
    assert Grid(8).step(absmax).tolist() == [2**-7, 2**-7, 2**-5, 1.0]
    assert absmax.tolist() == [0.0, 1.0, 3.0, 128.0]


def test_extreme_ranges_stay_within_a_register() -> None:
    steps = Grid(8).step(torch.tensor([1e-38, 3e38]))
    assert steps.tolist() == [2.0**-31, 2.0**31]


@given(bits=BITS)
def test_codes(bits: int) -> None:
    assert (Grid(bits).qmin, Grid(bits).qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert Grid(bits, narrow=True).qmin == -Grid(bits).qmax


@pytest.mark.parametrize("bits", [1, 0, -8, 33, 8.0, "8", None, True])
def test_impossible_bits(bits: object) -> None:
    with pytest.raises(ConfigError, match="bits must be an integer from 2 to 32"):
        Grid(bits)


@pytest.mark.parametrize(
    ("field", "found"), [("rounding", "nearest"), ("scale_kind", "log2"), ("rounding", "half up")]
)
def test_unknown_names(field: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        Grid(**{field: found})


@given(bits=st.integers(2, 24), absmax=ABSMAX)
def test_row12_a_strict_step_is_the_smallest_that_keeps_the_end(bits: int, absmax: float) -> None:
    grid = Grid(bits, strict=True, exponents=(-100, 100))
    step = grid.step(torch.tensor(absmax)).item()
    assert step == grid.step_value(absmax)
    assert absmax <= grid.qmax * step
    assert absmax > grid.qmax * step / 2


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_row12_both_conventions_at_a_power_of_two(bits: int) -> None:
    assert Grid(bits).step_value(1.0) == 2.0 ** (1 - bits)
    assert Grid(bits, strict=True).step_value(1.0) == 2.0 ** (2 - bits)
    assert Grid(bits, closed=True, strict=True).step_value(1.0) == 2.0 ** (1 - bits)


def test_row13_a_closed_grid_reaches_both_ends() -> None:
    grid = Grid(4, "free", "half_even", closed=True)
    assert (grid.qmin, grid.qmax) == (-8, 8)
    step = grid.step_value(0.52)
    assert step == pytest.approx(0.065)
    codes = torch.round(torch.tensor([0.2513, -0.52, 0.0]) / step)
    assert codes.tolist() == [4.0, -8.0, 0.0]


@pytest.mark.parametrize("exponent", range(-40, 41))
def test_row06_wider_exponents(exponent: int) -> None:
    grid = Grid(8, closed=True, exponents=(-60, 60))
    assert grid.step_value(2.0**exponent) == 2.0 ** (exponent - 7)
    assert grid.step(torch.tensor(2.0**exponent)).item() == 2.0 ** (exponent - 7)
