"""Sums and variances against references in Python's own numbers."""

import itertools
import math
from fractions import Fraction

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
from lightning_linger.ops.reduction import integer_cumsum, integer_sum, integer_var
from tests.models import Lambda, train

few = settings(max_examples=80, deadline=None)


def round_fraction(x: Fraction, rounding: str) -> int:
    low = math.floor(x)
    rest = x - low
    if rest == Fraction(1, 2):
        return low + 1 if rounding == "half_up" else low + low % 2
    return low + (rest > Fraction(1, 2))


def clamp(code: int, low: int, high: int) -> int:
    return max(low, min(high, code))


@st.composite
def reductions(draw):
    """Codes, dimensions, keepdim, steps, widths, rounding."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    dims = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    bits_x, bits_o = draw(st.integers(2, 16)), draw(st.integers(2, 16))
    low, high = code_limits(bits_x)
    extreme = draw(st.sampled_from([None, low, 0, high]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randint(low, high + 1, shape, generator=generator)
    if extreme is not None:
        x[torch.rand(shape, generator=generator) < 0.7] = extreme
    step_x = 2.0 ** draw(st.integers(-10, 3))
    step_o = step_x * 2.0 ** draw(st.integers(-2, 6))
    rounding = draw(st.sampled_from(["half_up", "half_even"]))
    x = x.to(payload_dtype(bits_x))
    return x, sorted(dims), draw(st.booleans()), (step_x, step_o), (bits_x, bits_o), rounding


def groups(x, dims):
    """The values that are reduced together, by the place of their result."""
    found = {}
    for place in itertools.product(*map(range, x.shape)):
        kept = tuple(0 if d in dims else i for d, i in enumerate(place))
        found.setdefault(kept, []).append(int(x[place]))
    return found


def assert_reduces(found, x, dims, keepdim, one_group):
    shape = [1 if d in dims else size for d, size in enumerate(x.shape)]
    wanted = torch.empty(shape, dtype=torch.int64)
    for place, values in groups(x, dims).items():
        wanted[place] = one_group(values)
    if not keepdim:
        wanted = wanted.squeeze(dims)
    assert found.shape == wanted.shape
    assert found.tolist() == wanted.tolist()


@few
@given(reductions())
def test_sum(drawn):
    x, dims, keepdim, (step_x, step_o), (_, bits_o), rounding = drawn
    limits = code_limits(bits_o)
    y = integer_sum(x, dims, keepdim, step_x, step_o, bits_o, *limits, rounding, "venusa")
    ratio = Fraction(step_x) / Fraction(step_o)
    assert y.dtype == payload_dtype(bits_o)
    assert_reduces(
        y, x, dims, keepdim, lambda v: clamp(round_fraction(sum(v) * ratio, rounding), *limits)
    )


@few
@given(reductions())
def test_cumsum(drawn):
    x, (dim, *_), _, (step_x, step_o), (_, bits_o), rounding = drawn
    limits = code_limits(bits_o)
    y = integer_cumsum(x, dim, step_x, step_o, bits_o, *limits, rounding, "onnxruntime")
    ratio = Fraction(step_x) / Fraction(step_o)
    for place in itertools.product(*map(range, x.shape)):
        before = (int(x[(*place[:dim], i, *place[dim + 1 :])]) for i in range(place[dim] + 1))
        assert int(y[place]) == clamp(round_fraction(sum(before) * ratio, rounding), *limits)


@few
@given(reductions(), st.integers(0, 1))
def test_var(drawn, correction):
    x, dims, keepdim, (step_x, step_o), (_, bits_o), rounding = drawn
    if math.prod(x.shape[d] for d in dims) <= correction:
        return
    limits, step_o = code_limits(bits_o), step_o * step_x

    def one(values):
        mean = Fraction(sum(values), len(values))
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - correction)
        real = variance * Fraction(step_x) ** 2 / Fraction(step_o)
        return clamp(round_fraction(real, rounding), *limits)

    arguments = (step_x, step_o, bits_o, *limits, rounding, "venusa")
    y = integer_var(x, dims, keepdim, correction, False, *arguments)
    assert y.dtype == payload_dtype(bits_o)
    assert_reduces(y, x, dims, keepdim, one)


@few
@given(reductions(), st.integers(0, 1))
def test_std(drawn, correction):
    x, dims, keepdim, (step_x, step_o), (_, bits_o), rounding = drawn
    count = math.prod(x.shape[d] for d in dims)
    if count <= correction:
        return
    limits = code_limits(bits_o)

    def one(values):
        spread = count * sum(v * v for v in values) - sum(values) ** 2
        # Python's own float64: one quotient, one root.
        real = math.sqrt(spread / (count * (count - correction))) * (step_x / step_o)
        return clamp(round_fraction(Fraction(real), rounding), *limits)

    arguments = (step_x, step_o, bits_o, *limits, rounding, "venusa")
    y = integer_var(x, dims, keepdim, correction, True, *arguments)
    assert_reduces(y, x, dims, keepdim, one)


def test_large_sums_are_exact():
    # One below a tie at -8191.5: float32 would lose that one, and int32 the rest.
    parts = [[-(2**15)] * 2**18, [2**15 - 1] * 16, [15]]
    x = torch.tensor([value for part in parts for value in part], dtype=torch.int16)[None]
    limits = code_limits(16)
    for function, end in ((integer_sum, ()), (integer_cumsum, (-1,))):
        arguments = ([1], False) if function is integer_sum else (1,)
        y = function(x, *arguments, 1.0, 2.0**20, 16, *limits, "half_up", "venusa")
        assert int(y[(0, *end)]) == -8192
        y = function(x + 0, *arguments, 1.0, 2.0**19, 16, *limits, "half_up", "venusa")
        assert int(y[(0, *end)]) == -16383
    ones = torch.arange(2**18, dtype=torch.int16).reshape(1, -1) % 2
    y = integer_var(ones, [1], False, 0, False, 1.0, 2.0**-15, 16, *limits, "half_up", "venusa")
    assert y.tolist() == [2**13]


# --- ops --------------------------------------------------------------------------------------


def quantized(function, x, platform="venusa", **fields):
    model = Lambda(lambda self, x: function(self.fc(x)), fc=nn.Linear(x.shape[-1], x.shape[-1]))
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform=platform, **fields))
    train(model, (x,), 1, 0.0)
    return model.eval()


def site_of(model, kind):
    return next(site for site in instrumentation_of(model).sites if site.op.kind == kind)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("sum", lambda y: y.sum(-1)),
        ("sum", lambda y: torch.sum(y, dim=(1, 2), keepdim=True)),
        ("sum", lambda y: torch.sum(y, axis=1)),
        ("var", lambda y: y.var(1)),
        ("var", lambda y: torch.var(y, 1, False)),
        ("var", lambda y: torch.var(y, (1, 2), True, True)),
        ("var", lambda y: torch.var(y, dim=-1, correction=0, keepdim=True)),
        ("std", lambda y: torch.std(y, [1], unbiased=False)),
        ("cumsum", lambda y: y.cumsum(1)),
        ("cumsum", lambda y: torch.cumsum(y, dim=-1)),
    ],
)
def test_spellings_have_the_shape_and_the_value_of_torch(kind, function):
    x = torch.randn(2, 3, 4)
    model = quantized(function, x, activation_bits=16, output_bits=16)
    assert site_of(model, kind).quantized
    with torch.no_grad():
        found = model(x)
        with linger.integer(model):
            assert torch.equal(model(x), found)
        expected = function(model.fc(x))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 0.05


@pytest.mark.parametrize(
    ("kind", "function", "reason"),
    [
        ("sum", lambda y: y.sum(), "over the batch"),
        ("sum", lambda y: y.sum(1, dtype=torch.float64), "`dtype=`"),
        ("var", lambda y: y.var(0), "over the batch"),
        ("var", lambda y: torch.var(y, False), "over the batch"),
        ("std", lambda y: y[:, :1].std(1), "no more values"),
        ("cumsum", lambda y: y.cumsum(1, dtype=torch.float64), "`dtype=`"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_what_stays_float(kind, function, reason):
    model = quantized(lambda y: function(y) * 1.0, torch.randn(2, 3))
    assert reason in site_of(model, kind).why_float


def test_squares_that_64_bits_do_not_hold_are_an_error():
    model = Lambda(lambda self, x: self.bn(x).var(2), bn=nn.BatchNorm1d(1))
    x = torch.randn(1, 1, 2**16)
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform="venusa", activation_bits=16, output_bits=16))
    with pytest.raises(UnsupportedError, match="exceed 64 bits"):
        model(x)


def test_a_sum_is_never_finer_than_its_operand_where_the_engine_shifts():
    x = torch.zeros(2, 3)
    x[:, 0], x[:, 1] = 100.0, -100.0
    model = quantized(lambda y: y.sum(1), x)
    model.fc.weight.data.copy_(torch.eye(3))
    model.fc.bias.data.zero_()
    model.train()
    train(model, (x,), 60, 0.0)
    model.eval()
    with torch.no_grad():
        model(x)
    operand, result = (site_of(model, kind).output.latest_step for kind in ("linear", "sum"))
    assert result >= operand


def test_a_variance_may_be_finer_than_the_values():
    x = torch.randn(20, 6) * 0.01
    model = quantized(lambda y: y.var(1), x)
    with torch.no_grad():
        model(x)
    operand, result = (site_of(model, kind).output.latest_step for kind in ("linear", "var"))
    assert operand**2 <= result < operand
