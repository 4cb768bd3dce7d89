"""The engines' curve kernels against their measured tables and a model in Python integers."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_linger.core.errors import ConfigError
from lightning_linger.ops import luna

MEASURED = Path(__file__).parents[1] / "data" / "golden" / "luna_curves.npz"
GENERATIONS = sorted(luna.CURVES)
int32s = st.integers(-(2**31), 2**31 - 1)
int16s = st.integers(-(2**15), 2**15 - 1)


@pytest.fixture(scope="module")
def measured():
    with np.load(MEASURED) as file:
        return {key: torch.from_numpy(file[key]).long() for key in file.files}


# --- a model in Python integers -----------------------------------------------------------------


def rs(x, n):
    return x if n <= 0 else (x + (1 << (n - 1))) >> n


def sat(x, bits):
    return max(-(1 << (bits - 1)), min((1 << (bits - 1)) - 1, x))


def segment_of(magnitude, bands):
    return next(j for j, band in enumerate(bands) if magnitude <= band)


def sigmoid_model(x, curves):
    table = luna._VENUS_SIGMOID if curves == "venus" else luna._SIGMOID[curves]
    j = segment_of(abs(x), table.bands)
    bias = table.mirrored[j] if x < 0 else table.offsets[j]
    if curves == "venus":
        return ((table.slopes[j] * x) >> table.shifts[j]) + bias
    if curves == "arcs":
        return ((table.slopes[j] * x) >> 27) + bias
    return table.slopes[j] * x + (bias << 30)


def tanh_model(x, curves):
    table = luna._VENUS_TANH if curves == "venus" else luna._TANH[curves]
    magnitude = min(abs(x), 32767) if curves == "venus" else abs(x)
    j = segment_of(magnitude, table.bands)
    slope = -table.slopes[j] if x < 0 else table.slopes[j]
    bias = -table.offsets[j] if x < 0 else table.offsets[j]
    if curves == "venus":
        return ((slope * magnitude) >> table.shifts[j]) + bias
    if curves == "arcs":
        return ((slope * magnitude) >> 27) + bias
    return slope * magnitude + (bias << 30)


def softmax_model(row, curves):
    top = max(row)
    if curves == "venusa" and top == -(2**31):
        top += 1
    values = []
    for x in row:
        below = x - top if curves == "venusa" else sat(x - top, 32)
        power = rs(below * 774541002, 31)
        whole, rest = (power >> 23) + 1, (power & 0x7FFFFF) - 0x800000
        y = 57364
        for j, p in enumerate((446161, 2008107, 5813551, 8388575)):
            if curves == "venusa":
                t = ((y * rest) << 7) + (p << 30)
                shift = 30 - whole if j == 3 else 30
                y = 0 if shift > 63 else rs(t, shift)
            else:
                y = rs(y * rest, 23) + p
        if curves == "venus":
            y = math.trunc(math.ldexp(y, whole))
        elif curves == "arcs":
            y = y << whole if whole >= 0 else y >> -whole
        values.append(sat(y, 32))
    if curves == "venus":
        total = 0
        for y in values:
            total = sat(total + y, 32)
        n = 31 - total.bit_length() - 8
        x = total << n if n >= 0 else total >> -n
        n += 1
        r = 0xBB5000 - x
        for _ in range(2):
            e = 2 * (0x400000 - rs(x * r, 23))
            r += rs(r * e, 23)
        r = sat(r << n, 32) if n >= 0 else r >> -n
        return [sat(rs(r * y, 31), 32) for y in values]
    a, b, c = 0x800000, sat(sum(values), 32), 0
    for _ in range(30):
        if a >= b:
            c, a = (c + 1) * 2, (a - b) * 2
        else:
            c, a = c * 2, a * 2
    return [rs(c * y, 38) for y in values]


# --- against what was measured ------------------------------------------------------------------


@pytest.mark.parametrize("exponent", range(13))
@pytest.mark.parametrize("curves", ["arcs", "venusa"])
def test_8_bit_curves_equal_the_engine_for_every_code(measured, curves, exponent):
    x = luna.align(torch.arange(-128, 128), exponent, 27, 32)
    for name, function in (("sigmoid_arcs", luna.sigmoid), ("tanh_q27", luna.tanh)):
        y = luna.to_fraction(function(x, curves), curves, 7)
        assert torch.equal(y, measured[f"{name}_int8in_q{exponent}"])


def test_venus_curves_equal_the_engine_for_every_16_bit_operand(measured):
    x = torch.arange(-(2**15), 2**15)
    for name, function in (("sigmoid", luna.sigmoid), ("tanh", luna.tanh)):
        y = luna.to_fraction(function(x, "venus"), "venus", 7)
        assert torch.equal(y, measured[f"venus_luna_{name}_int8_q11_int16in"])


def test_32_bit_curves_equal_the_engine_on_a_grid(measured):
    x = torch.arange(-(2**31), 2**31, 2**18)
    for name, function in (("sigmoid", luna.sigmoid), ("tanh", luna.tanh)):
        wide = measured[f"{name}_i32o32_grid"]
        assert torch.equal(luna.to_fraction(function(x, "venusa"), "venusa", 31), wide)
        arcs = luna.to_fraction(function(x, "arcs"), "arcs", 31)
        assert (arcs - wide).abs().max() <= 8
        assert torch.equal(luna.rounding_shift(arcs, 24), luna.rounding_shift(wide, 24))


def test_gelu_and_silu_give_their_check_vectors():
    x = torch.tensor([-2147483647, -123456789, -1, 0, 1, 123456789, 2147483647])
    gelu = [-22920, -22026943, -86064, -86064, -86063, 101429846, 2147460727]
    silu = [-56416, -35096076, -147248, -147248, -147247, 88360713, 2147427231]
    assert luna.gelu(x).tolist() == gelu
    assert luna.silu(x).tolist() == silu


def test_softmax_equals_the_engine(measured):
    names = [key.removesuffix("__in") for key in measured if key.endswith("__in")]
    assert len(names) == 9
    for name in names:
        fraction = int(name.split("_")[1].removeprefix("q"))
        x = luna.align(measured[f"{name}__in"], fraction, 25, 32)
        y = luna.softmax(x, name.rpartition("__")[2].lower())
        codes = luna.align(y, 15, int(measured[f"{name}__fraction"]), 8)
        assert torch.equal(codes, measured[f"{name}__out"])


def test_log_table_is_the_measured_one():
    table = np.concatenate([[-(2**31)], luna._venus_log()]).astype("<i4")
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    assert digest == "e998b0bb42eff379f89f2ec68ddd9e8de5862ec3568b6923e870be51d0dc1b81"


def test_root_table_is_the_rounded_down_inverse_root():
    for i, root in enumerate(luna._inverse_roots()):
        assert root == min(32767, math.isqrt(2**38 // (256 + i)))
        assert root**2 * (256 + i) <= 2**38


# --- against the model --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(int32s, min_size=1, max_size=40), st.sampled_from(["arcs", "venusa"]))
@example([-(2**31), 2**31 - 1, 0, 1, -1], "arcs")
@example([-(2**31), 2**31 - 1, 0, 1, -1], "venusa")
def test_32_bit_curves_equal_the_model(values, curves):
    x = torch.tensor(values)
    edges = torch.tensor([b + d for b in luna._SIGMOID_BANDS[:-1] for d in (-1, 0, 1)])
    x = torch.cat([x, edges, -edges])
    assert luna.sigmoid(x, curves).tolist() == [sigmoid_model(v, curves) for v in x.tolist()]
    assert luna.tanh(x, curves).tolist() == [tanh_model(v, curves) for v in x.tolist()]


def test_venus_curves_equal_the_model_everywhere():
    x = torch.arange(-(2**15), 2**15)
    assert luna.sigmoid(x, "venus").tolist() == [sigmoid_model(v, "venus") for v in x.tolist()]
    assert luna.tanh(x, "venus").tolist() == [tanh_model(v, "venus") for v in x.tolist()]


@settings(max_examples=40, deadline=None)
@given(st.lists(int32s, min_size=1, max_size=40))
@example([-(2**31), 2**31 - 1, 0])
def test_gelu_and_silu_equal_the_model(values):
    for function, table in ((luna.gelu, luna._GELU), (luna.silu, luna._SILU)):
        expected = []
        for x in values:
            j = segment_of(abs(x), table.bands)
            slope = table.mirrored[j] if x < 0 else table.slopes[j]
            expected.append(sat(rs(x * slope + (table.offsets[j] << 30), 27), 32))
        assert function(torch.tensor(values)).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(int32s | st.integers(-(2**28), 2**28), min_size=3, max_size=3),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(GENERATIONS),
)
@example([[-(2**31)] * 3, [2**31 - 1] * 3, [0, 0, 0]], "venusa")
@example([[-(2**31), 2**31 - 1, 0]], "arcs")
@example([[-(2**31), 2**31 - 1, 0]], "venus")
def test_softmax_equals_the_model(rows, curves):
    expected = [softmax_model(row, curves) for row in rows]
    assert luna.softmax(torch.tensor(rows), curves).tolist() == expected


@pytest.mark.parametrize("curves", GENERATIONS)
@pytest.mark.parametrize("count", [1, 2, 300, 2048])
def test_softmax_of_long_and_short_rows(curves, count):
    row = torch.randint(-(2**29), 2**29, (count,), generator=torch.Generator().manual_seed(count))
    for x in (row, torch.zeros_like(row)):
        y = luna.softmax(x, curves)
        assert y.tolist() == softmax_model(x.tolist(), curves)
        assert 0 <= int(y.min()) <= int(y.max()) <= 2**15


def test_log_softmax_is_the_table_of_softmax():
    x = torch.tensor([[0, 0], [2**25, -(2**31)], [5, 5]])
    y = luna.log_softmax(x)
    half = round(math.log(0.5) * 2**25)
    assert torch.equal(y[0], y[2])
    assert abs(int(y[0, 0]) - half) <= 255
    assert y[1].tolist() == [0, -(2**31)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=20))
@example([0, 1, 2, 3, 4, 100, 255, 256, 1024, 2**20, 2**31, 2**53 + 1, 2**61, 2**62 - 1])
def test_reciprocal_sqrt_equals_the_model(values):
    found, shift = luna.reciprocal_sqrt(torch.tensor(values))
    for value, f, s in zip(values, found.tolist(), shift.tolist(), strict=True):
        pair = (value.bit_length() - 1) // 2
        move = 2 * pair - 8
        mantissa = 256 if value == 0 else value >> move if move >= 0 else value << -move
        assert f == min(32767, math.isqrt(2**38 // mantissa))
        assert s == (-1 if value == 0 else pair)
        if value:
            real = f / 2.0**s / 2**15
            assert math.isclose(real, value**-0.5, rel_tol=2**-8)


# --- fixed point --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(int32s, st.integers(-40, 80), st.integers(0, 31), st.sampled_from([8, 16, 32]))
@example(-(2**31), 0, 31, 32)
@example(-1, 80, 0, 8)
def test_align_moves_the_fraction_and_saturates(x, fraction, wanted, bits):
    moved = rs(x, fraction - wanted) if fraction > wanted else x << (wanted - fraction)
    assert luna.align(torch.tensor([x]), fraction, wanted, bits).tolist() == [sat(moved, bits)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(int32s, st.integers(-20, 40)), min_size=1, max_size=10))
def test_rounding_shift_takes_one_shift_per_element(pairs):
    x, shift = (torch.tensor(column) for column in zip(*pairs, strict=True))
    expected = [rs(v, s) if s > 0 else v << -s for v, s in pairs]
    assert luna.rounding_shift(x, shift).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(int32s, st.integers(0, 15), st.sampled_from(GENERATIONS))
def test_results_are_brought_to_fewer_fraction_bits(x, fraction, curves):
    x = sat(x, luna.curves_of(curves).input_bits)
    given_bits = luna.curves_of(curves).output_fraction
    expected = sat(rs(tanh_model(x, curves), given_bits - fraction), fraction + 1)
    found = luna.to_fraction(luna.tanh(torch.tensor([x]), curves), curves, fraction)
    assert found.tolist() == [expected]


def test_wrong_input_is_refused():
    x = torch.zeros(2, dtype=torch.int64)
    for function in (luna.sigmoid, luna.tanh, luna.softmax):
        with pytest.raises(ConfigError, match="no engine kernels are called 'jupiter'"):
            function(x, "jupiter")
    with pytest.raises(ConfigError, match="give 15 fraction bits"):
        luna.to_fraction(x, "venus", 31)


def test_shape_is_kept_without_elements():
    for function in (luna.sigmoid, luna.tanh):
        assert function(torch.zeros((0, 3), dtype=torch.int64), "arcs").shape == (0, 3)
