"""``where`` and ``masked_fill``: kernels against Python integers, and what a mask promises."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.integer import code_limits, payload_dtype
from lightning_linger.ops.select import (
    integer_masked_fill,
    integer_where,
    kept_range,
    widened,
)
from tests.models import Lambda, assert_integer_exact, bits_of, site_of, train


def half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def half_even(value: Fraction) -> int:
    return round(value)


ROUNDINGS = {"half_up": half_up, "half_even": half_even}
masks = st.lists(st.booleans(), min_size=6, max_size=6)


def codes_of(bits: int) -> st.SearchStrategy[list[int]]:
    low, high = code_limits(bits)
    one = st.one_of(st.sampled_from([low, high, 0]), st.integers(low, high))
    return st.lists(one, min_size=6, max_size=6)


def tensor(codes: list[int], bits: int) -> Tensor:
    return torch.tensor(codes, dtype=payload_dtype(bits)).view(2, 3)


# --- kernels ----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    data=st.data(),
    bits=st.sampled_from([2, 5, 8, 16]),
    shifts=st.tuples(*[st.integers(0, 9)] * 2),
    rounding=st.sampled_from(sorted(ROUNDINGS)),
    mask=masks,
)
def test_where_like_integers(data, bits, shifts, rounding, mask):
    shifts = [shift - min(shifts) for shift in shifts]  # the coarser one is that of the result
    x, y = data.draw(codes_of(bits)), data.draw(codes_of(bits))
    scales = [0.25 * 2.0**-shift for shift in shifts]
    chosen = torch.tensor(mask).view(2, 3)
    found = integer_where(
        chosen, tensor(x, bits), tensor(y, bits), *scales, 0.25, bits, rounding, "venusa"
    )
    low, high = code_limits(bits)
    expected = []
    for taken, *pair in zip(mask, x, y, strict=True):
        code, shift = (pair[0], shifts[0]) if taken else (pair[1], shifts[1])
        rounded = ROUNDINGS[rounding](Fraction(code, 1 << shift))
        expected.append(max(low, min(high, rounded)))
    assert found.dtype == payload_dtype(bits)
    assert found.flatten().tolist() == expected


@settings(max_examples=40)
@given(data=st.data(), bits=st.sampled_from([2, 8, 16]), shift=st.integers(0, 7), mask=masks)
def test_masked_fill_like_integers(data, bits, shift, mask):
    low, high = code_limits(bits)
    x, code = data.draw(codes_of(bits)), data.draw(st.integers(low, high))
    found = integer_masked_fill(
        tensor(x, bits),
        torch.tensor(mask).view(2, 3),
        code,
        1.0,
        2.0**shift,
        bits,
        "half_up",
        "venusa",
    )
    kept = [max(low, min(high, half_up(Fraction(n, 1 << shift)))) for n in x]
    expected = [code if hidden else n for hidden, n in zip(mask, kept, strict=True)]
    assert found.dtype == payload_dtype(bits)
    assert found.flatten().tolist() == expected


def test_masks_broadcast():
    x = torch.arange(6, dtype=torch.int8).view(1, 2, 3)
    mask = torch.tensor([[[True]], [[False]]])
    found = integer_masked_fill(x, mask, -7, 1.0, 1.0, 8, "half_up", "venusa")
    assert found.shape == (2, 2, 3)
    assert found[0].unique().tolist() == [-7]
    assert torch.equal(found[1], x[0])


@given(step=st.floats(1e-4, 10.0), needed=st.floats(1e-4, 1e4))
def test_widened_is_the_smallest_doubling(step, needed):
    found = widened(step, needed)
    assert found >= needed
    assert math.frexp(found)[0] == math.frexp(step)[0]
    assert found == step or found / 2.0 < needed
    tensors = widened(torch.tensor(step), torch.tensor(needed))
    assert tensors >= torch.tensor(needed) * (1 - 1e-6)


def test_kept_range_leaves_hidden_values_out():
    x, hidden = torch.tensor([1.0, -3.0, 90.0]), torch.tensor([False, False, True])
    assert kept_range(x, hidden, 8).tolist() == [-11.0, 1.0]
    assert kept_range(x, torch.ones(3, dtype=torch.bool), 8).tolist() == [0.0, 0.0]


# --- ops --------------------------------------------------------------------------------------


def quantized(function, *others, bits: int = 8, platform: str = "venusa") -> tuple:
    """A function of a linear layer's result, quantized; its results stay near 0."""
    torch.manual_seed(3)
    layer = nn.Linear(6, 6)
    model = Lambda(lambda self, x, *rest: function(self.linear(x), *rest), linear=layer)
    inputs = (torch.randn(4, 6), *others)
    linger.prepare(model, inputs)
    linger.quantize(
        model,
        QuantConfig(platform=platform, weight_bits=bits, activation_bits=bits, output_bits=bits),
    )
    train(model, inputs, 2, 0.0)
    model.eval()
    return model, inputs


MASK = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1], [0] * 6]).bool()


@pytest.mark.parametrize("platform", ["venusa", "arcs", "venus", "onnxruntime"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("value", [-math.inf, -1e9, torch.finfo(torch.float32).min])
def test_a_softmax_gives_masked_places_nothing(platform, bits, value):
    model, inputs = quantized(
        lambda y, m: y.masked_fill(m, value).softmax(-1), MASK, bits=bits, platform=platform
    )
    found = model(*inputs)
    assert found[MASK].eq(0.0).all()
    assert found[~MASK].gt(0.0).any()
    # What is hidden does not weigh on the rest either: one kept place gets all there is.
    step = float(site_of(model, "/softmax/0").output.step())
    assert round(float(found[1, 5]) / step) == code_limits(bits)[1]
    assert_integer_exact(model, *inputs)


def test_kept_values_lose_no_more_than_rounding():
    model, inputs = quantized(lambda y, m: y.masked_fill(m, -math.inf), MASK)
    y, found = model.linear(inputs[0]), model(*inputs)
    step = float(site_of(model, "/masked_fill/0").part("reach").step())
    assert (y - found)[~MASK].abs().max() <= step / 2
    assert found[MASK].unique().tolist() == [-128 * step]
    assert found[~MASK].min() > -128 * step + 8


@pytest.mark.parametrize(("value", "code"), [(math.inf, 127), (1e9, 127), (-math.inf, -128)])
def test_infinity_is_an_end_code(value, code):
    model, inputs = quantized(lambda y, m: y.masked_fill(m, value), MASK)
    found = model(*inputs)
    extreme = found[MASK].unique()
    assert len(extreme) == 1
    step = abs(float(extreme)) / abs(code)
    assert bits_of(found, step).abs().max() == abs(code)


@pytest.mark.parametrize("value", [0.0, 1.25, -300.0, 77.7])
def test_a_number_fits_the_grid(value):
    model, inputs = quantized(lambda y, m: torch.where(m, value, y), MASK)
    found = model(*inputs)
    (filled,) = found[MASK].unique().tolist()
    assert abs(filled - value) <= abs(value) / 127
    assert_integer_exact(model, *inputs)


@pytest.mark.parametrize("value", [-1e9, 2.5])
def test_a_number_in_a_tensor_is_a_number(value):
    by_tensor, inputs = quantized(lambda y, m: torch.where(m, torch.tensor(value), y), MASK)
    by_number, _ = quantized(lambda y, m: torch.where(m, value, y), MASK)
    assert torch.equal(by_tensor(*inputs), by_number(*inputs))


def test_a_method_takes_its_arguments_in_another_order():
    method, inputs = quantized(lambda y, m: y.where(m, -y), MASK)
    function, _ = quantized(lambda y, m: torch.where(m, y, -y), MASK)
    assert torch.equal(method(*inputs), function(*inputs))


def test_gradients_go_where_values_come_from():
    model, (x, mask) = quantized(lambda y, m: torch.where(m, y, y * 0.5), MASK)
    model.train()
    y = model.linear(x)
    z = torch.where(mask, y, y * 0.5)
    (expected,) = torch.autograd.grad(z.sum(), model.linear.bias)
    model(x, mask).sum().backward()
    torch.testing.assert_close(model.linear.bias.grad, expected, rtol=0.05, atol=0.05)


def test_a_masked_place_has_no_gradient():
    model, (x, mask) = quantized(lambda y, m: y.masked_fill(m, -math.inf), MASK)
    model.train()
    model.linear.register_forward_hook(lambda module, args, y: kept.append(y))
    kept: list[Tensor] = []
    y = model(x, mask)
    kept[0].retain_grad()
    y.backward(torch.ones_like(y))
    assert torch.equal(kept[0].grad != 0, ~mask)


def test_a_mask_and_no_values_is_not_for_us():
    layer = nn.Linear(6, 6)
    model = Lambda(
        lambda self, x: (self.linear(x), torch.where(self.linear(x) > 0)[0]), linear=layer
    )
    x = torch.randn(4, 6)
    linger.prepare(model, (x,))
    linger.quantize(model)
    train(model, (x,), 1, 0.0)
    model.eval()
    assert model(x)[1].dtype == torch.int64
