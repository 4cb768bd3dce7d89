"""Tables over codes: exactly rounded entries, and interpolation within one code."""

import math
import random
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.core.integer import code_limits
from lightning_linger.core.rounding import ROUNDINGS
from lightning_linger.ops.curves import CURVES, CurveFunction
from lightning_linger.ops.table import (
    CELL_BITS,
    KNOT_BITS,
    Table,
    Tabulation,
    integer_interpolate,
    integer_lookup,
    knot_fraction,
    tabulate,
)

NUMBERS = {"threshold": (0.25, -0.5), "pow": (1.5, False), "square": (3, False)}
# Steps of 16-bit operands: a range of +-1, +-8, +-128 and a free one.
STEPS = (2.0**-15, 2.0**-12, 2.0**-8, 0.00123)


def function_of(kind: str) -> CurveFunction:
    defaults = tuple(value for _, value in CURVES[kind].numbers)
    return CurveFunction(kind, NUMBERS.get(kind, defaults))


def all_codes(bits: int) -> Tensor:
    low, high = code_limits(bits)
    return torch.arange(low, high + 1, dtype=torch.int8 if bits <= 8 else torch.int16)


def result_step(reals: Tensor, bits: int) -> float:
    """The power-of-two step that covers what a function reaches, a pole left out."""
    top = float(reals[reals.isfinite()].abs().quantile(0.99)) if reals.numel() < 2**16 else None
    top = float(np.quantile(reals[reals.isfinite()].abs().numpy(), 0.99)) if top is None else top
    return 2.0 ** math.ceil(math.log2(max(top, 2.0**-20) / 2 ** (bits - 1)))


def run(table: Table, codes: Tensor) -> Tensor:
    values, offsets, shifts = table.tensors()
    a = table.asked
    grids = ("f", a.step_x, a.step_o, a.bits_x, a.bits_o, "")
    if table.interpolated:
        return integer_interpolate(codes, values, offsets, shifts, *grids)
    return integer_lookup(codes, values, *grids)


def rounded(x: Fraction, rounding: str) -> int:
    down = math.floor(x)
    rest = x - down
    if rounding == "floor" or (rounding != "ceil" and rest < Fraction(1, 2)):
        return down
    if rest > Fraction(1, 2) or (rounding == "ceil" and rest):
        return down + 1
    if rounding == "ceil":
        return down
    ties = {"half_up": 1, "half_even": down % 2, "half_away": int(down >= 0)}
    return down + ties[rounding]


# --- entries ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_entries_are_exactly_rounded(data):
    bits_x, bits_o = data.draw(st.integers(2, 8)), data.draw(st.integers(2, 16))
    rounding = data.draw(st.sampled_from(sorted(ROUNDINGS)))
    slope, offset = data.draw(st.integers(-9, 9)), data.draw(st.integers(-5, 5))
    step_x, step_o = (2.0 ** data.draw(st.integers(-9, 4)) for _ in "xo")
    low, high = code_limits(bits_o)
    low = data.draw(st.sampled_from([low, 0, low + 1]))
    asked = Tabulation(step_x, bits_x, step_o, bits_o, low, high, rounding)
    # A power-of-two grid holds all of it exactly: the reference is rational arithmetic.
    table = tabulate(lambda x: x * slope / 8 + offset / 4, asked)
    codes = all_codes(bits_x)
    expected = []
    for code in codes.tolist():
        real = code * Fraction(step_x) * slope / 8 + Fraction(offset, 4)
        expected.append(max(low, min(high, rounded(real / Fraction(step_o), rounding))))
    assert run(table, codes).tolist() == expected


@pytest.mark.parametrize("kind", sorted(CURVES))
@pytest.mark.parametrize("rounding", ["half_up", "half_even"])
def test_entries_of_every_function(kind, rounding):
    function = function_of(kind)
    for step_x in (2.0**-7, 2.0**-4, 0.5, 0.0123):
        reals = function(all_codes(8).double() * step_x)
        for bits_o in (8, 16):
            step_o = result_step(reals, bits_o)
            asked = Tabulation(step_x, 8, step_o, bits_o, *code_limits(bits_o), rounding)
            expected = ROUNDINGS[rounding](reals / step_o).clamp(*code_limits(bits_o))
            found = run(tabulate(function, asked), all_codes(8))
            assert found.dtype == (torch.int8 if bits_o <= 8 else torch.int16)
            assert torch.equal(found.double(), expected)


# --- interpolation ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(CURVES))
def test_interpolation_is_within_one_code_for_every_code(kind):
    function, codes = function_of(kind), all_codes(16)
    for step_x in STEPS:
        reals = function(codes.double() * step_x)
        for bits_o in (16, 8):
            step_o, limits = result_step(reals, bits_o), code_limits(bits_o)
            table = tabulate(function, Tabulation(step_x, 16, step_o, bits_o, *limits, "half_up"))
            wanted = (reals / step_o).clamp(*limits)
            found = run(table, codes).double()
            assert (found - wanted).abs().max() <= 0.75
            assert (found - torch.floor(wanted + 0.5).clamp(*limits)).abs().max() <= 1
            assert int(table.values.min()) >= 0
            assert int(table.values.max()) < 2**KNOT_BITS
            if kind not in ("sin", "cos"):  # which oscillate over a wide range
                assert table.values.size <= 1800


@settings(max_examples=40, deadline=None)
@given(st.integers(9, 16), st.integers(2, 16), st.integers(0, 2**32), st.booleans())
def test_interpolation_equals_a_model_in_whole_numbers(bits_x, bits_o, seed, narrow):
    rng = random.Random(seed)
    steep = rng.choice([0.1, 1.0, 30.0])
    step_x = rng.uniform(0.1, 8) / 2 ** (bits_x - 1)
    low, high = code_limits(bits_o)
    low = 0 if narrow else low
    asked = Tabulation(step_x, bits_x, 2.0 ** (1 - bits_o), bits_o, low, high, "half_even")
    table = tabulate(lambda x: torch.tanh(x * steep), asked)
    assert table.interpolated
    depth, fraction = bits_x - CELL_BITS, knot_fraction(bits_o)
    codes = [rng.randint(*code_limits(bits_x)) for _ in range(60)] + list(code_limits(bits_x))
    expected = []
    for code in codes:
        stored = code + 2 ** (bits_x - 1)
        cell, within = divmod(stored, 2**depth)
        length = 2 ** int(table.shifts[cell])
        segment, part = divmod(within, length)
        first = int(table.offsets[cell]) + segment
        left, right = int(table.values[first]), int(table.values[first + 1])
        line = Fraction(left * (length - part) + right * part, length * 2**fraction)
        code_o = math.floor(line + Fraction(1, 2)) - 2 ** (bits_o - 1)
        assert low <= code_o <= high
        expected.append(code_o)
    assert run(table, torch.tensor(codes, dtype=torch.int16)).tolist() == expected


def test_a_straight_line_is_exact():
    asked = Tabulation(2.0**-12, 16, 2.0**-12, 16, *code_limits(16), "half_up")
    codes = all_codes(16)
    assert torch.equal(run(tabulate(lambda x: x, asked), codes), codes)
    flipped = run(tabulate(lambda x: -x, asked), codes)
    assert torch.equal(flipped.int(), (-codes.int()).clamp(max=2**15 - 1))


def test_a_jump_is_exact():
    asked = Tabulation(2.0**-12, 16, 2.0**-12, 16, *code_limits(16), "half_up")
    found = run(tabulate(lambda x: torch.where(x < 0, -3.0, 3.0).double(), asked), all_codes(16))
    expected = torch.where(all_codes(16) < 0, -3 * 2**12, 3 * 2**12)
    assert torch.equal(found.int(), expected.int())


def test_shapes_are_kept():
    for bits in (8, 16):
        asked = Tabulation(0.1, bits, 0.01, bits, *code_limits(bits), "half_up")
        table = tabulate(torch.sigmoid, asked)
        for shape in ((), (0, 3), (2, 1, 3)):
            assert run(table, torch.zeros(shape, dtype=all_codes(bits).dtype)).shape == shape


# --- wrong input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits_x": 17}, "codes of 2 to 16 bits. Found: 17"),
        ({"bits_o": 1}, "codes of 2 to 16 bits. Found: 1"),
        ({"step_x": 0.0}, "a positive number. Found: 0.0"),
        ({"step_o": math.inf}, "a positive number. Found: inf"),
    ],
)
def test_impossible_grids_are_refused(change, message):
    given_fields = {"step_x": 1.0, "bits_x": 8, "step_o": 1.0, "bits_o": 8}
    with pytest.raises(ConfigError, match=message):
        Tabulation(**{**given_fields, **change}, low=-128, high=127, rounding="half_up")


def test_a_function_without_a_value_is_refused():
    asked = Tabulation(0.5, 8, 1.0, 8, -128, 127, "half_up")
    with pytest.raises(ConfigError, match=r"Found none at -64\.0"):
        tabulate(torch.sqrt, asked)


def test_curves_continue_outside_their_domain():
    x = torch.tensor([-2.0, 0.0, 4.0], dtype=torch.float64)
    inf = math.inf
    expected = {
        CurveFunction("log"): [-inf, -inf, math.log(4.0)],
        CurveFunction("log1p"): [-inf, 0.0, math.log1p(4.0)],
        CurveFunction("sqrt"): [0.0, 0.0, 2.0],
        CurveFunction("rsqrt"): [inf, inf, 0.5],
        CurveFunction("reciprocal"): [-0.5, inf, 0.25],
        CurveFunction("pow", (0.5, False)): [0.0, 0.0, 2.0],
        CurveFunction("pow", (-1.5, False)): [inf, inf, 0.125],
        CurveFunction("pow", (-2, False)): [0.25, inf, 0.0625],
        CurveFunction("pow", (3, False)): [-8.0, 0.0, 64.0],
        CurveFunction("pow", (2.0, True)): [0.25, 1.0, 16.0],
    }
    for function, values in expected.items():
        assert function(x).tolist() == values, function


@dataclass(frozen=True)
class Halved:
    """A function that is not one of the library's."""

    name: str = "half"

    def __call__(self, x: Tensor) -> Tensor:
        return x / 2


def test_a_capture_asks_for_a_table_made_before(monkeypatch):
    from lightning_linger.ops import table as module

    class FakeSite:
        key = "net/half/0"

        def __init__(self):
            self.prepared = {}

    site, asked = FakeSite(), Tabulation(0.5, 8, 0.25, 8, -128, 127, "half_up")
    monkeypatch.setattr(module, "capturing", lambda: True)
    with pytest.raises(UnsupportedError, match=r"`net/half/0`.*Run one forward in evaluation"):
        module.table_of(site, "", Halved(), asked, torch.device("cpu"))
    monkeypatch.setattr(module, "capturing", lambda: False)
    made = module.table_of(site, "", Halved(), asked, torch.device("cpu"))
    monkeypatch.setattr(module, "capturing", lambda: True)
    assert module.table_of(site, "", Halved(), asked, torch.device("cpu")) is made
    assert torch.equal(made(all_codes(8), ""), all_codes(8))
