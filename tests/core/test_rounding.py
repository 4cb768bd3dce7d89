"""Rounding rules against Python's own exact arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_linger.core.rounding import ROUNDINGS

HALF = Fraction(1, 2)


def _half_away(x: Fraction) -> int:
    return math.floor(x + HALF) if x >= 0 else -math.floor(-x + HALF)


EXACT = {
    "half_up": lambda x: math.floor(x + HALF),
    "half_even": round,  # Python rounds fractions half to even
    "half_away": _half_away,
    "floor": math.floor,
    "ceil": math.ceil,
}

# Sums with one half are exact: the fractions an accumulator shifted right can have.
FRACTIONS = st.builds(
    lambda whole, numerator, shift: Fraction(whole) + Fraction(numerator, 2**shift),
    st.integers(-(2**14), 2**14),
    st.integers(0, 2**7),
    st.integers(0, 8),
)


@pytest.mark.parametrize("rule", sorted(EXACT))
@given(x=FRACTIONS)
def test_rule_equals_exact_arithmetic(rule: str, x: Fraction) -> None:
    for dtype in (torch.float32, torch.float64):
        value = torch.tensor(float(x), dtype=dtype)
        assert Fraction(value.item()) == x
        assert ROUNDINGS[rule](value).item() == EXACT[rule](x)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("half_up", [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]),
        ("half_even", [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]),
        ("half_away", [-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]),
        ("floor", [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]),
        ("ceil", [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]),
    ],
)
def test_ties(rule: str, expected: list[float]) -> None:
    ties = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert ROUNDINGS[rule](ties).tolist() == expected


def test_every_rule_is_tested() -> None:
    assert set(EXACT) == set(ROUNDINGS)


@pytest.mark.parametrize("rule", sorted(EXACT))
def test_input_is_left_alone(rule: str) -> None:
    x = torch.tensor([-1.5, 0.25, 2.5])
    ROUNDINGS[rule](x)
    assert x.tolist() == [-1.5, 0.25, 2.5]
