"""Matrix products: the kernel against Python integers, einsum, weights, and what is refused."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.integer import code_limits, payload_dtype
from lightning_linger.ops.contraction import contraction
from lightning_linger.ops.matmul import integer_matmul, largest_sum
from tests.models import Lambda, assert_integer_exact, bits_of, site_of, train

SHAPES = [
    ((3,), (3,)),
    ((3,), (3, 2)),
    ((2, 3), (3,)),
    ((2, 3), (3, 4)),
    ((2, 1, 3), (3, 4)),
    ((2, 2, 3), (2, 3, 1)),
    ((2, 1, 2, 3), (3, 3, 2)),
    ((1, 1), (1, 1)),
]


def drawn_codes(data: st.DataObject, bits: int, shape: tuple[int, ...]) -> Tensor:
    low, high = code_limits(bits)
    one = st.one_of(st.sampled_from([low, high, 0, -1, 1]), st.integers(low, high))
    values = data.draw(st.lists(one, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=payload_dtype(bits)).view(shape)


def products(x: Tensor, y: Tensor) -> tuple[list[int], tuple[int, ...]]:
    """The sums of products in Python integers, by numpy's rules for shapes."""
    a, b = x.numpy().astype(object), y.numpy().astype(object)
    found = np.asarray(np.matmul(a, b), dtype=object)
    return [int(n) for n in found.reshape(-1)], found.shape


def half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def clamped(code: int, low: int, high: int) -> int:
    return max(low, min(high, code))


# --- kernel -----------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    data=st.data(),
    shapes=st.sampled_from(SHAPES),
    bits=st.tuples(*[st.sampled_from([2, 4, 8, 11, 16])] * 3),
    exponents=st.tuples(*[st.integers(-9, 3)] * 2),
    shift=st.integers(0, 12),
)
def test_kernel_shifts_like_integers(data, shapes, bits, exponents, shift):
    bits_x, bits_y, bits_o = bits
    x, y = drawn_codes(data, bits_x, shapes[0]), drawn_codes(data, bits_y, shapes[1])
    scale_x, scale_y = (2.0**e for e in exponents)
    low, high = code_limits(bits_o)
    low = data.draw(st.sampled_from([low, 0]))
    scale_o = scale_x * scale_y * 2.0**shift
    found = integer_matmul(
        x, y, scale_x, scale_y, scale_o, bits_x, bits_y, bits_o, low, high, "half_up", "venusa"
    )
    sums, shape = products(x, y)
    expected = [clamped(half_up(Fraction(n, 1 << shift)), low, high) for n in sums]
    assert found.dtype == payload_dtype(bits_o)
    assert found.shape == shape
    assert found.flatten().tolist() == expected


@settings(max_examples=60)
@given(
    data=st.data(),
    shapes=st.sampled_from(SHAPES),
    bits=st.sampled_from([4, 8, 16]),
    scales=st.tuples(*[st.floats(2.0**-10, 2.0, width=32)] * 3),
)
def test_kernel_multiplies_like_onnxruntime(data, shapes, bits, scales):
    x, y = (drawn_codes(data, bits, shape) for shape in shapes)
    low, high = code_limits(bits)
    found = integer_matmul(x, y, *scales, bits, bits, bits, low, high, "half_even", "onnxruntime")
    factor = np.float32(scales[1]) * np.float32(scales[0]) / np.float32(scales[2])
    expected = [clamped(int(np.rint(np.float32(n) * factor)), low, high) for n in products(x, y)[0]]
    assert found.flatten().tolist() == expected


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("features", [1, 1023, 1024, 5000])
def test_kernel_is_exact_for_long_sums(bits, features):
    """Odd sums beyond 2^24, which float32 does not hold."""
    low, high = code_limits(bits)
    x = torch.full((2, features), low, dtype=payload_dtype(bits))
    y = torch.full((features, 2), low, dtype=payload_dtype(bits))
    x[1, 0], y[0, 1] = high, low + 1
    found = integer_matmul(
        x, y, 1.0, 1.0, 1.0, bits, bits, 32, *code_limits(32), "half_up", "venusa"
    )
    top = 2**31 - 1
    assert found.flatten().tolist() == [min(n, top) for n in products(x, y)[0]]
    assert max(products(x, y)[0]) <= largest_sum(features, bits, bits)


def test_kernel_gives_real_values():
    x, y = torch.tensor([[3, -5]], dtype=torch.int8), torch.tensor([[7], [2]], dtype=torch.int8)
    found = integer_matmul(x, y, 0.5, 0.25, 0.0, 8, 8, 0, 0, 0, "half_up", "venusa")
    assert found.dtype == torch.float32
    assert found.tolist() == [[11 * 0.125]]


# --- einsum -----------------------------------------------------------------------------------

EQUATIONS = [
    ("ij,jk->ik", (2, 3), (3, 4)),
    ("ij,kj", (2, 3), (4, 3)),
    ("ij,ij->i", (2, 3), (2, 3)),
    ("i,j->ji", (2,), (3,)),
    ("i,i->", (3,), (3,)),
    ("bqhd,bkhd->bhqk", (2, 3, 2, 4), (2, 5, 2, 4)),
    ("bhqk, bkhd -> bqhd", (2, 2, 3, 5), (2, 5, 2, 4)),
    ("btd,dhk->bhtk", (2, 3, 4), (4, 2, 3)),
    ("...ij,...jk->...ik", (2, 5, 2, 3), (2, 5, 3, 4)),
    ("...i,ij->...j", (2, 5, 3), (3, 4)),
    ("xij,...jk", (2, 2, 3), (5, 3, 4)),
    ("abc,cab->ba", (2, 3, 4), (4, 2, 3)),
]


@pytest.mark.parametrize(("equation", "x", "y"), EQUATIONS)
def test_einsum_equals_torch(equation, x, y):
    """On whole numbers small enough that no rounding happens anywhere."""
    a, b = torch.randint(-4, 5, x).float(), torch.randint(-4, 5, y).float()
    model = Lambda(lambda self, a, b: torch.einsum(equation, self.one(a), b), one=identity())
    linger.prepare(model, (a, b))
    # Steps of 1 everywhere.
    fields = {"activation_bits": 16, "output_bits": 16, "weight_bits": 16, "range": 2.0**15}
    linger.quantize(model, QuantConfig(**fields))
    model.eval()
    found = model(a, b)
    assert site_of(model, "/einsum/0").quantized
    assert found.shape == torch.einsum(equation, a, b).shape
    assert torch.equal(found, torch.einsum(equation, a, b))
    assert_integer_exact(model, a, b)


def identity() -> nn.Module:
    """A layer that gives its input; the weight beside the 1 makes the 1 a code."""
    layer = nn.Conv1d(1, 2, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([1.0, 1.5]).view(2, 1, 1))
    function = lambda self, x: self.layer(x.reshape(1, 1, -1))[:, 0].reshape(x.shape)  # noqa: E731
    return Lambda(function, layer=layer)


@pytest.mark.parametrize(
    ("equation", "x", "y", "reason"),
    [
        ("ij,jk,kl->il", (2, 3), (3, 4), "other than two operands"),
        ("ij->ji", (2, 3), (3, 4), "other than two operands"),
        ("ii,ij->j", (2, 2), (2, 3), "index twice"),
        ("ij,jk->k", (2, 3), (3, 4), "of one operand alone"),
        ("ij,jk->ik", (2, 1), (3, 4), "sizes of 1"),
    ],
)
def test_einsum_that_is_no_product(equation, x, y, reason):
    found = contraction(equation, x, y)
    assert isinstance(found, str)
    assert reason in found


BATCHED = ("bqhd,bkhd->bhqk", "bhqk, bkhd -> bqhd", "ij,ij->i", "abc,cab->ba")
# the equation, both shapes, whether the weight stands first
WEIGHTED = [
    *((e, x, y, first) for e, x, y in EQUATIONS if e not in BATCHED for first in (False, True)),
    *(("", x, y, False) for x, y in SHAPES if len(y) <= 2),
    *(("", x, y, True) for x, y in SHAPES if len(x) <= 2),
    ("", (4, 3), (2, 3, 5), True),
    ("", (3,), (2, 3, 5), True),
]
WEIGHTED = [row for row in WEIGHTED if row[0] != "...ij,...jk->...ik"]


@pytest.mark.parametrize(("equation", "x", "y", "first"), WEIGHTED)
def test_a_weight_on_either_side_equals_torch(equation, x, y, first):
    """On whole numbers again; the weight is a parameter."""
    run, key = torch.matmul, "/matmul/0"
    if equation:
        run, key = (lambda a, b: torch.einsum(equation, a, b)), "/einsum/0"
    a, b = torch.randint(-4, 5, x).float(), torch.randint(-4, 5, y).float()
    if first:
        own, given, function = a, b, (lambda self, v: run(self.own, self.one(v)))
    else:
        own, given, function = b, a, (lambda self, v: run(self.one(v), self.own))
    own[(0,) * own.dim()] = 3.0  # some weight that is not zero
    expected = run(a, b)
    model = Lambda(function, one=identity(), own=nn.Parameter(own))
    linger.prepare(model, (given,))
    fields = {"activation_bits": 16, "output_bits": 16, "weight_bits": 16, "range": 2.0**15}
    linger.quantize(model, QuantConfig(**fields))
    model.eval()
    assert site_of(model, key).weights.grid is not None
    with torch.no_grad():
        found = model(given)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)
    assert_integer_exact(model, given)


# --- operands that are weights ----------------------------------------------------------------


def with_weight(weight: Tensor, function=torch.matmul) -> nn.Module:
    layers = {"linear": nn.Linear(6, 6), "own": nn.Parameter(weight)}
    return Lambda(lambda self, x: function(self.linear(x), self.own), **layers)


def test_a_parameter_lies_on_the_weight_grid():
    model = with_weight(torch.randn(6, 4))
    x = torch.randn(3, 6)
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(weight_bits=4))
    train(model, (x,), 2, 0.0)
    site = site_of(model, "/matmul/0")
    assert site.weights.grid is not None
    assert site.weights.grid.bits == 4
    assert not site.inputs
    model.eval()
    codes = site.prepared
    model(x)
    prepared = codes["projection weight"].codes
    step = prepared.steps[0]
    assert math.log2(step) == round(math.log2(step))
    expected = [
        clamped(half_up(Fraction(float(w)) / Fraction(step)), -8, 7)
        for w in model.own.detach().t().flatten()
    ]
    assert prepared.weight.flatten().tolist() == expected


def test_a_changed_weight_is_not_taken_from_the_cache():
    model = with_weight(torch.randn(6, 4))
    x = torch.randn(3, 6)
    linger.prepare(model, (x,))
    linger.quantize(model)
    train(model, (x,), 1, 0.0)
    model.eval()
    before = model(x)
    with torch.no_grad():
        model.own.mul_(0.5)
    after = model(x)
    assert not torch.equal(before, after)
    assert_integer_exact(model, x)


def test_a_first_layer_that_is_a_product_quantizes_its_input():
    model = Lambda(lambda self, x: x @ self.own, own=nn.Parameter(torch.randn(6, 4)))
    linger.prepare(model, (torch.randn(3, 6),))
    linger.quantize(model)
    assert site_of(model, "/matmul/0").quantized
    assert list(site_of(model, "/matmul/0").inputs) == ["0"]


@pytest.mark.parametrize("function", [torch.matmul, lambda x, w: torch.einsum("ij,jk->ik", x, w)])
def test_range_limits_act_on_the_weight(function):
    model = with_weight(torch.randn(6, 4) * 3.0, function)
    x = torch.randn(3, 6)
    linger.prepare(model, (x,))
    linger.normalize(model, weight=0.5, output=None)
    expected = function(
        torch.nn.functional.linear(x, model.linear.weight.clamp(-0.5, 0.5), model.linear.bias),
        model.own.clamp(-0.5, 0.5),
    )
    torch.testing.assert_close(model(x), expected)
    linger.quantize(model)
    train(model, (x,), 1, 0.0)
    model.eval()
    model(x)
    codes = site_of(model, f"/{kind(function)}/0").prepared["projection weight"].codes
    assert codes.weight.abs().max() * codes.steps[0] <= 0.5


def kind(function) -> str:
    return "matmul" if function is torch.matmul else "einsum"


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_gradient_reaches_weight_and_input(granularity):
    """Straight through: the float function's gradient at the values on the grid."""
    model = with_weight(torch.randn(6, 4))
    x = torch.randn(3, 6)
    linger.prepare(model, (x,))
    config = QuantConfig(output_bits=16, granularity=granularity)
    linger.quantize(model, config, overrides={"linear": {"output_bits": 8}})
    train(model, (x,), 1, 0.0)
    found = {}
    model.linear.register_forward_hook(lambda module, args, y: found.update(x=y))
    y = model(x)
    cotangent = torch.randn_like(y)
    seen = found["x"]
    seen.retain_grad()
    y.backward(cotangent)
    torch.testing.assert_close(model.own.grad, seen.detach().t() @ cotangent)
    site = site_of(model, "/matmul/0")
    model.eval()
    model(x)
    codes = site.prepared["projection weight"].codes
    steps = torch.tensor(codes.steps).view(-1, 1)
    weight = (codes.weight * steps).t()
    torch.testing.assert_close(seen.grad, cotangent @ weight.t())


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "key", "reason"),
    [
        (lambda a, b: torch.baddbmm(a, a, b), "/baddbmm/0", "adds and multiplies"),
        (lambda a, b: torch.addmm(a[0], a[0], b[0]), "/addmm/0", "more than a bias"),
        (lambda a, b: torch.einsum("bij,bjk,bkl->bil", a, b, a), "/einsum/0", "two operands"),
        (lambda a, b: torch.bmm(a, b, out=torch.empty(2, 6, 6)), "/bmm/0", "`out=`"),
    ],
)
def test_what_is_refused_says_why(function, key, reason):
    layers = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}
    model = Lambda(lambda self, x: function(self.a(x), self.b(x)), **layers)
    x = torch.randn(2, 6, 6)
    with torch.no_grad():
        linger.prepare(model, (x,))
        linger.quantize(model)
        site = site_of(model, key)
        assert not site.quantized
        assert reason in site.why_float
        train(model, (x,), 1, 0.0)
        model.eval()
        assert_integer_exact(model, x)


def test_a_product_of_two_parameters_stays_float():
    layers = {"a": nn.Parameter(torch.randn(4, 6)), "b": nn.Parameter(torch.randn(6, 6))}
    function = lambda self, x: torch.nn.functional.linear(self.linear(x), self.a @ self.b)  # noqa: E731
    model = Lambda(function, linear=nn.Linear(6, 6), **layers)
    x = torch.randn(3, 6)
    linger.prepare(model, (x,))
    linger.quantize(model)
    assert "both factors" in site_of(model, "/matmul/0").why_float
    train(model, (x,), 1, 0.0)
    model.eval()
    assert_integer_exact(model, x)
    assert bits_of(model(x), float(site_of(model, "/linear/0").output.step())).any()


def test_what_is_advised_in_the_place_of_bilinear_is_the_same_and_runs_on_integers():
    pairs = nn.Bilinear(3, 5, 4, bias=False)
    by_left = nn.Linear(3, 4 * 5, bias=False)
    with torch.no_grad():
        by_left.weight.copy_(pairs.weight.transpose(1, 2).reshape(4 * 5, 3))
    model = Lambda(
        lambda self, x, y: (self.by_left(x).unflatten(-1, (4, -1)) * y.unsqueeze(-2)).sum(-1),
        by_left=by_left,
    )
    inputs = (torch.randn(7, 3), torch.randn(7, 5))
    assert torch.allclose(model(*inputs), pairs(*inputs), atol=1e-6)
    linger.prepare(model, inputs)
    linger.quantize(model)
    train(model, inputs, 2, 0.0)
    assert all(row.system == "fake" for row in linger.summary(model))
    assert_integer_exact(model.eval(), *inputs)


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime", "tflite"])
def test_the_product_of_two_vectors_is_a_number(platform: str) -> None:
    torch.manual_seed(0)
    model, x = Lambda(lambda m, x: torch.dot(*m.fc(x)), fc=nn.Linear(6, 5)), torch.randn(2, 6)
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform=platform))
    train(model, (x,), 2, 0.0)
    assert model(x).shape == ()
    model.eval()
    assert model(x).shape == ()
    assert_integer_exact(model, x)
