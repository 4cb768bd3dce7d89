"""Softmax, log-softmax and log-sum-exp against references in Python's own numbers."""

import decimal
import functools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.integer import code_limits, payload_dtype
from lightning_linger.export import export_onnx
from lightning_linger.ops import luna
from lightning_linger.ops.softmax import (
    FRACTION,
    exponentials,
    integer_log_softmax,
    integer_logsumexp,
    integer_softmax,
    integer_softmin,
    log_of_sums,
    logarithms,
)
from tests.models import Lambda, train

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "thinker"
TABLE, ENGINES = "onnxruntime", ("venus", "arcs", "mars", "venusa")
few = settings(max_examples=60, deadline=None)


# --- references -------------------------------------------------------------------------------


@functools.cache
def exponential(distance: int, step: float) -> int:
    """2^30 * exp(-distance * step), rounded."""
    with decimal.localcontext(decimal.Context(prec=50)):
        exact = (-distance * decimal.Decimal(step)).exp() * 2**FRACTION
        return int(exact.to_integral_value(decimal.ROUND_HALF_UP))


def round_fraction(x: Fraction, rounding: str) -> int:
    low = math.floor(x)
    rest = x - low
    if rest == Fraction(1, 2):
        return low + 1 if rounding == "half_up" else low + low % 2
    return low + (rest > Fraction(1, 2))


def clamp(code: int, low: int, high: int) -> int:
    return max(low, min(high, code))


def reference_softmax(row, step_x, step_o, low, high, rounding):
    top = max(row)
    terms = [exponential(top - x, step_x) for x in row]
    unit = sum(terms) * Fraction(step_o)
    return [clamp(round_fraction(Fraction(e) / unit, rounding), low, high) for e in terms]


def reference_log_of_sum(total: int) -> float:
    """Straight lines between 1025 points of the logarithm, in Python's floats."""
    octave = total.bit_length() - 1 - FRACTION
    position = (total / 2 ** (FRACTION + octave) - 1.0) * 1024.0
    index = math.floor(position)

    def point(j: int) -> float:
        with decimal.localcontext(decimal.Context(prec=50)):
            return int(((1 + decimal.Decimal(j) / 1024).ln() * 2**40).to_integral_value()) / 2**40

    line = point(index) + (position - index) * (point(index + 1) - point(index))
    return line + octave * 0.6931471805599453


def reference_log_softmax(row, step_x, step_o, low, high, rounding):
    top = max(row)
    logarithm = reference_log_of_sum(sum(exponential(top - x, step_x) for x in row))
    real = [-((top - x) * step_x + logarithm) / step_o for x in row]
    return [clamp(round_fraction(Fraction(r), rounding), low, high) for r in real]


def reference_engine(row, q_x, curves):
    """The engine's softmax of one row, in Q15, by Python integers."""

    def rs(x, shift):
        return (x + (1 << (shift - 1))) >> shift if shift > 0 else x << -shift

    def sat(x):
        return clamp(x, -(2**31), 2**31 - 1)

    wide = [sat(rs(x, q_x - 25)) for x in row]
    top = max(wide)
    if curves == "venusa" and top == -(2**31):
        top += 1
    terms = []
    for x in wide:
        below = x - top if curves == "venusa" else sat(x - top)
        power = rs(below * 774541002, 31)
        exponent, rest = (power >> 23) + 1, (power & 0x7FFFFF) - 0x800000
        value = 57364
        for j, constant in enumerate((446161, 2008107, 5813551, 8388575), 1):
            if curves != "venusa":
                value = rs(value * rest, 23) + constant
                continue
            total = ((value * rest) << 7) + (constant << 30)
            shift = 30 if j < 4 else 30 - exponent
            value = 0 if shift > 63 else rs(total, shift)
        if curves == "venusa":
            terms.append(sat(value))
        else:
            terms.append(sat(value << exponent if exponent >= 0 else value >> -exponent))
    total = min(sum(terms), 2**31 - 1)
    if curves == "venus":
        return [sat(rs(newton(total) * e, 31)) for e in terms]
    quotient, rest = 0, 0x800000
    for _ in range(30):
        quotient, rest = (
            ((quotient + 1) * 2, (rest - total) * 2) if rest >= total else (quotient * 2, rest * 2)
        )
    return [rs(quotient * e, 38) for e in terms]


def newton(total: int) -> int:
    """2^46 / total in two Newton steps."""
    shift = 31 - total.bit_length() - 8
    x = total << shift if shift >= 0 else total >> -shift
    shift += 1
    inverse = 0xBB5000 - x
    for _ in range(2):
        error = 2 * (0x400000 - ((x * inverse + (1 << 22)) >> 23))
        inverse += (inverse * error + (1 << 22)) >> 23
    scaled = inverse << shift if shift >= 0 else inverse >> -shift
    return clamp(scaled, -(2**31), 2**31 - 1)


# --- drawn rows -------------------------------------------------------------------------------


@st.composite
def rows(draw, widest=16):
    """Rows of codes with extremes: ``(codes, step_x, bits_x, step_o, bits_o)``."""
    bits_x, bits_o = draw(st.integers(2, widest)), draw(st.integers(2, widest))
    low, high = code_limits(bits_x)
    code = st.one_of(st.sampled_from([low, 0, high]), st.integers(low, high))
    length = draw(st.integers(1, 12))
    row = draw(
        st.one_of(
            st.lists(code, min_size=length, max_size=length), code.map(lambda c: [c] * length)
        )
    )
    step_x = 2.0 ** draw(st.integers(-bits_x - 3, 5 - bits_x))
    return row, step_x, bits_x, 2.0 ** (1 - bits_o), bits_o


def as_codes(row, bits):
    return torch.tensor([row], dtype=payload_dtype(bits))


def run(function, row, step_x, bits_x, step_o, bits_o, platform=TABLE, rounding="half_up"):
    limits = code_limits(bits_o)
    x = as_codes(row, bits_x)
    y = function(x, 1, step_x, bits_x, step_o, bits_o, *limits, rounding, platform)
    assert y.dtype == payload_dtype(bits_o)
    return y[0].tolist()


# --- exact steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2.0**-3, 2.0**-9, 0.7, 1.0, 40.0])
def test_exponentials_are_exactly_rounded(step):
    table = exponentials(step, 8)
    assert table.tolist() == [exponential(d, step) for d in range(len(table))]
    assert len(table) == 256 or (table[-1] == 0 and table[-2] > 0)


def test_a_wide_table_ends_where_exponentials_vanish():
    table = exponentials(2.0**-6, 16)
    assert table[-1] == 0
    assert table[-2] == 1
    assert len(exponentials(2.0**-13, 16)) == 2**16
    assert all(table[d] == exponential(d, 2.0**-6) for d in (0, 1, 100, 700, len(table) - 1))


def test_logarithms_are_within_their_bound():
    sums = torch.cat([2.0**30 * torch.arange(1, 200, dtype=torch.float64), torch.tensor([2.0**52])])
    sums = torch.cat([sums, torch.randint(2**30, 2**45, (20000,)).double()])
    error = log_of_sums(sums) - torch.log(sums / 2.0**30)
    assert error.abs().max() < 1.3e-7
    assert log_of_sums(torch.tensor([2.0**30], dtype=torch.float64)).item() == 0.0
    assert logarithms()[0] == 0.0


# --- kernels ----------------------------------------------------------------------------------


@few
@given(rows(), st.sampled_from(["half_up", "half_even"]))
def test_softmax_is_exact_division_of_whole_numbers(drawn, rounding):
    row, step_x, _, step_o, bits_o = drawn
    expected = reference_softmax(row, step_x, step_o, *code_limits(bits_o), rounding)
    assert run(integer_softmax, *drawn, rounding=rounding) == expected


@few
@given(rows(), st.floats(0.001, 0.4), st.floats(0.001, 0.02))
def test_softmax_with_free_scales(drawn, step_x, step_o):
    """One rounding of the divisor is all that tells it from exact division."""
    row, _, bits_x, _, bits_o = drawn
    step_x, step_o = float(np.float32(step_x)), float(np.float32(step_o))
    terms = [exponential(max(row) - x, step_x) for x in row]
    divisor = sum(terms) * step_o
    low, high = code_limits(bits_o)
    expected = [clamp(round_fraction(Fraction(e / divisor), "half_even"), low, high) for e in terms]
    found = run(integer_softmax, row, step_x, bits_x, step_o, bits_o, rounding="half_even")
    assert found == expected


@few
@given(rows(), st.sampled_from(["half_up", "half_even"]))
def test_log_softmax_without_an_engine_kernel(drawn, rounding):
    row, step_x, bits_x, step_o, bits_o = drawn
    expected = reference_log_softmax(row, step_x, step_o * 8, *code_limits(bits_o), rounding)
    drawn = (row, step_x, bits_x, step_o * 8, bits_o)
    for platform in (TABLE, "arcs", "venusa"):
        found = run(integer_log_softmax, *drawn, platform=platform, rounding=rounding)
        assert found == expected


@few
@given(rows())
def test_logsumexp(drawn):
    row, step_x, bits_x, step_o, bits_o = drawn
    top = max(row)
    logarithm = reference_log_of_sum(sum(exponential(top - x, step_x) for x in row))
    real = (top * step_x + logarithm) / (step_o * 16)
    expected = clamp(round_fraction(Fraction(real), "half_up"), *code_limits(bits_o))
    x = as_codes(row, bits_x)
    for platform in (TABLE, "venusa"):
        arguments = (step_x, bits_x, step_o * 16, bits_o, *code_limits(bits_o), "half_up", platform)
        assert integer_logsumexp(x, [1], True, *arguments).tolist() == [[expected]]
        assert integer_logsumexp(x, [0, 1], False, *arguments).tolist() == expected


@few
@given(rows(widest=8), st.sampled_from(ENGINES))
def test_softmax_of_an_engine(drawn, platform):
    row, step_x, _, step_o, bits_o = drawn
    curves = "arcs" if platform == "mars" else platform
    q_x, q_o = -int(math.log2(step_x)), -int(math.log2(step_o))
    found = reference_engine(row, q_x, curves)
    expected = [clamp((p + (1 << (14 - q_o))) >> (15 - q_o), *code_limits(bits_o)) for p in found]
    assert run(integer_softmax, *drawn, platform=platform) == expected


@pytest.mark.parametrize("bits", [(8, 16), (16, 8), (16, 16)])
@pytest.mark.parametrize("platform", ENGINES)
def test_wider_codes_do_not_use_the_engine_kernel(platform, bits):
    drawn = ([-90, 3, 70, 127, 127], 2.0**-5, bits[0], 2.0 ** (1 - bits[1]), bits[1])
    assert run(integer_softmax, *drawn, platform=platform) == run(integer_softmax, *drawn)


def test_venus_has_a_log_softmax_of_its_own():
    row = [-128, -100, 0, 64, 127]
    drawn = (row, 2.0**-4, 8, 2.0**-3, 8)
    wide = torch.tensor([row]) << 21
    expected = luna.align(luna.log_softmax(wide), 25, 3, 32).clamp(-128, 127)[0].tolist()
    assert run(integer_log_softmax, *drawn, platform="venus") == expected
    assert expected[0] == -128  # the logarithm of a probability of 0 in Q15
    assert run(integer_log_softmax, *drawn) != expected


@pytest.mark.parametrize("platform", [TABLE, *ENGINES])
@few
@given(rows(widest=8))
def test_softmin_is_softmax_of_the_negative(platform, drawn):
    row, step_x, bits_x, step_o, bits_o = drawn
    turned = ([-1 - x for x in row], step_x, bits_x, step_o, bits_o)
    assert run(integer_softmin, *drawn, platform=platform) == run(
        integer_softmax, *turned, platform=platform
    )


@pytest.mark.parametrize("platform", [TABLE, *ENGINES])
def test_any_dimension(platform):
    x = torch.randint(-128, 128, (3, 4, 5), dtype=torch.int8)
    arguments = (2.0**-4, 8, 2.0**-7, 8, -128, 127, "half_up", platform)
    for function in (integer_softmax, integer_softmin, integer_log_softmax):
        for dim in range(3):
            moved = function(x.movedim(dim, -1).contiguous(), 2, *arguments)
            found = function(x, dim, *arguments)
            assert torch.equal(found, moved.movedim(-1, dim))
            assert found.is_contiguous()


@pytest.mark.parametrize("platform", [TABLE, *ENGINES])
def test_a_fully_masked_row_is_uniform(platform):
    x = torch.full((1, 16), -128, dtype=torch.int8)
    y = integer_softmax(x, 1, 2.0**-4, 8, 2.0**-7, 8, -128, 127, "half_up", platform)
    assert y.unique().tolist() == [8]  # 128 / 16


@pytest.mark.parametrize("platform", [TABLE, *ENGINES])
@pytest.mark.parametrize(("bits_x", "bits_o", "length"), [(8, 8, 2048), (8, 8, 3), (16, 16, 500)])
def test_error_bound(platform, bits_x, bits_o, length):
    """Half a step, and what the kernel itself is off; the largest code stands for 1."""
    x = torch.randint(*code_limits(bits_x), (20, length))
    step_x, step_o = 2.0 ** (4 - bits_x), 2.0 ** (1 - bits_o)
    exact = torch.softmax(x.double() * step_x, 1)
    limits = code_limits(bits_o)
    codes = integer_softmax(
        x.to(payload_dtype(bits_x)), 1, step_x, bits_x, step_o, bits_o, *limits, "half_up", platform
    )
    own = (length + 1) * 2.0**-31 if platform == TABLE or bits_x > 8 else 1.7e-5
    reachable = exact.clamp(max=limits[1] * step_o)
    assert (codes * step_o - reachable).abs().max() <= step_o / 2 + own


def test_a_result_is_clamped_to_its_window():
    x = torch.tensor([[127, -128, -128]], dtype=torch.int8)
    for platform in (TABLE, "arcs"):
        y = integer_softmax(x, 1, 2.0**-4, 8, 2.0**-7, 8, 3, 100, "half_up", platform)
        assert y.tolist() == [[100, 3, 3]]


def test_engine_vectors():
    """Vectors measured on the engine, without a graph around them."""
    names = sorted(path.stem for path in GOLDEN.glob("softmax_*.npz"))
    assert len(names) == 9
    for name in names:
        with np.load(GOLDEN / f"{name}.npz") as file:
            found, expected = (torch.from_numpy(file[key]) for key in ("in0", "out0"))
            node = json.loads(str(file["attrs_json"]))["attrs"]["SoftmaxInt/SoftmaxInt_y3"]
        scale_x, scale_o = 1 / node["scale_x"], 1 / node["scale_o"]
        codes = integer_softmax(
            found, -1, scale_x, 8, scale_o, 8, -128, 127, "half_up", node["platform"].lower()
        )
        assert torch.equal(codes, expected), name


# --- ops --------------------------------------------------------------------------------------


def quantized(function, x, platform="venusa", **fields):
    model = Lambda(lambda self, x: function(self.fc(x)), fc=nn.Linear(x.shape[-1], x.shape[-1]))
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform=platform, **fields))
    train(model, (x,), 1, 0.0)
    return model


def site_of(model, kind):
    return next(site for site in instrumentation_of(model).sites if site.op.kind == kind)


def test_every_spelling_is_one_op():
    x = torch.randn(2, 6)
    for function in (
        nn.Softmax(-1),
        torch.softmax,
        torch.Tensor.softmax,
        nn.functional.softmax,
        lambda y, dim=None: y.softmax(1, torch.float32),
        lambda y, dim=None: torch.softmax(y, dim=-1, dtype=torch.float32),
    ):
        call = function if isinstance(function, nn.Module) else lambda y, f=function: f(y, -1)
        assert site_of(quantized(call, x), "softmax").quantized


def test_probabilities_have_a_known_range():
    model = quantized(lambda y: y.softmax(-1) * 1.0, torch.randn(2, 6))
    assert site_of(model, "softmax").output.estimator.fixed
    assert float(site_of(model, "softmax").output.step()) == 2.0**-7
    model = quantized(lambda y: y.log_softmax(-1) * 1.0, torch.randn(2, 6))
    assert not site_of(model, "log_softmax").output.estimator.fixed


def test_dtype_is_that_of_the_call():
    x = torch.randn(2, 6)
    model = quantized(lambda y: y.softmax(-1, dtype=torch.float64), x).eval()
    fake = model(x)
    assert fake.dtype == torch.float64
    with linger.integer(model), torch.no_grad():
        found = model(x)
    assert found.dtype == torch.float64
    assert torch.equal(found, fake)


def test_a_single_number_stays_float():
    model = Lambda(lambda self, x: self.fc(x).sum().softmax(0), fc=nn.Linear(3, 3))
    x = torch.randn(2, 3)
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform="venusa"))
    assert site_of(model, "softmax").why_float == "a softmax of a single number is always 1"


@pytest.mark.parametrize(
    ("function", "shape", "reason"),
    [
        (lambda y: y.repeat(1, 342).softmax(-1), (2, 6), "the engine takes up to 2048"),
        (lambda y: (y * 300).softmax(-1), (2, 6), "32-bit numbers in Q25"),
    ],
)
def test_what_the_engine_cannot_run_is_refused(function, shape, reason, tmp_path):
    x = torch.randn(shape)
    model = quantized(function, x).eval()
    with pytest.raises(UnsupportedError, match=reason):
        export_onnx(model, (x,), tmp_path / "model.onnx", "linger")


def test_no_gradient_where_the_largest_code_saturates():
    x = torch.tensor([[30.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.0, -0.5]])
    model = quantized(lambda y: y.softmax(-1), x)
    model.fc.weight.data.copy_(torch.eye(4))
    model.fc.bias.data.zero_()
    train(model, (x,), 2, 0.0)
    model.eval()
    x = x.requires_grad_()
    y = model(x)
    y[:, 0].sum().backward()
    assert y[0, 0] == 127 / 128
    assert not x.grad[0].any()
    assert x.grad[1].all()
