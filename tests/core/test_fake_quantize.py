"""Fake quantization: the forward against integers, the gradient against its rule."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_linger.core.fake_quantize import (
    fake_quantize,
    straight_through,
    straight_through_within,
)

BITS = st.sampled_from([2, 3, 4, 8, 12, 16])


def _limits(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


@given(
    bits=BITS,
    exponent=st.integers(-12, 6),
    numerators=st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=20),
    rounding=st.sampled_from(["half_up", "half_even", "half_away", "floor", "ceil"]),
)
def test_forward_equals_integers(
    bits: int, exponent: int, numerators: list[int], rounding: str
) -> None:
    step = 2.0**exponent
    low, high = _limits(bits)
    x = torch.tensor([n / 64 * step for n in numerators])
    exact = {
        "half_up": lambda v: math.floor(v + Fraction(1, 2)),
        "half_even": round,
        "half_away": lambda v: int(math.copysign(math.floor(abs(v) + Fraction(1, 2)), v)),
        "floor": math.floor,
        "ceil": math.ceil,
    }[rounding]
    expected = [step * max(low, min(high, exact(Fraction(n, 64)))) for n in numerators]
    assert fake_quantize(x, step, low, high, rounding).tolist() == expected
    assert fake_quantize(x, torch.tensor(step), low, high, rounding).tolist() == expected
    tracked = x.clone().requires_grad_()
    assert fake_quantize(tracked, step, low, high, rounding).tolist() == expected


def test_a_step_per_channel() -> None:
    x = torch.tensor([[0.3, 5.0], [0.3, 5.0]])
    step = torch.tensor([[0.25], [1.0]])
    assert fake_quantize(x, step, -8, 7).tolist() == [[0.25, 1.75], [0.0, 5.0]]


def test_free_steps_divide() -> None:
    step = 0.3
    x = torch.linspace(-5, 5, 1001)
    expected = torch.floor(x / step + 0.5).clamp(-8, 7) * step
    assert torch.equal(fake_quantize(x, step, -8, 7), expected)


@pytest.mark.parametrize("step", [0.125, torch.tensor(0.125)], ids=["float", "tensor"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_input_is_left_alone(step: object, requires_grad: bool) -> None:
    x = torch.randn(50).requires_grad_(requires_grad)
    before = x.detach().clone()
    y = fake_quantize(x, step, -8, 7)
    assert torch.equal(x.detach(), before)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("step", [0.125, torch.tensor(0.125)], ids=["float", "tensor"])
def test_row11_gradient_of_a_fine_grid(step: object) -> None:
    """From 128 codes on the mask is taken from the output: its two end codes count as clipped."""
    codes = torch.tensor([-200.0, -128.0, -127.6, -127.0, 0.0, 126.0, 126.6, 127.0, 200.0])
    x = (codes * 0.125).requires_grad_()
    fake_quantize(x, step, -128, 127).backward(torch.full_like(x, 3.0))
    assert x.grad.tolist() == [0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("step", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_row11_gradient_of_a_coarse_grid(step: object) -> None:
    """Below 128 codes the mask is taken from the input, half a step beyond the end codes."""
    codes = torch.tensor([-9.0, -8.6, -8.4, -8.0, 0.0, 7.0, 7.4, 7.6, 9.0])
    x = (codes * 0.5).requires_grad_()
    fake_quantize(x, step, -8, 7).backward(torch.full_like(x, 3.0))
    assert x.grad.tolist() == [0.0, 0.0, 3.0, 3.0, 3.0, 3.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_gradient_behind_a_relu_edge(bits: int) -> None:
    high = _limits(bits)[1]
    x = torch.tensor([-3.0, 1.0, 2.0, 1e6], requires_grad=True)
    fake_quantize(x, 1.0, 0, high).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_gradient_with_tensor_bounds() -> None:
    x = torch.tensor([-1.0, 0.5, 3.0, 7.0], requires_grad=True)
    y = fake_quantize(x, torch.tensor(0.5), 0, torch.tensor(12.0))
    assert y.tolist() == [0.0, 0.5, 3.0, 6.0]
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_float64() -> None:
    x = torch.tensor([1 / 3, -2 / 3, 1e9], dtype=torch.float64, requires_grad=True)
    y = fake_quantize(x, 2.0**-7, -128, 127)
    assert y.dtype == torch.float64
    assert y.tolist() == [43 / 128, -85 / 128, 127 / 128]
    y.sum().backward()
    assert x.grad.dtype == torch.float64
    assert x.grad.tolist() == [1.0, 1.0, 0.0]


def test_wide_codes_are_exact_in_float64() -> None:
    top = 2**31 - 1
    x = torch.tensor([top - 1.0, top * 2.0, -(2.0**40)], dtype=torch.float64)
    assert fake_quantize(x, 1.0, -(2**31), top).tolist() == [top - 1.0, top, -(2.0**31)]


def test_half_keeps_its_dtype() -> None:
    x = torch.tensor([0.3, -1.2, 9.0], dtype=torch.float16)
    y = fake_quantize(x, 0.125, -8, 7)
    assert y.dtype == torch.float16
    assert y.tolist() == [0.25, -1.0, 0.875]


def test_no_graph_without_gradients() -> None:
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert not fake_quantize(x, 0.1, -8, 7).requires_grad


def test_straight_through_is_exact_forward_and_identity_backward() -> None:
    value = torch.tensor([1.0, 2.0])
    carrier = torch.tensor([0.1, 0.2], requires_grad=True)
    y = straight_through(value, carrier)
    assert torch.equal(y, value)
    y.backward(torch.tensor([5.0, 7.0]))
    assert carrier.grad.tolist() == [5.0, 7.0]


def as_tensor(bound: float) -> Tensor:
    return torch.tensor(bound, dtype=torch.float64)


@pytest.mark.parametrize("as_bound", [float, as_tensor], ids=["numbers", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_within_has_the_gradient_of_its_carrier_edges_included(
    as_bound: Callable[[float], float | Tensor], dtype: torch.dtype
) -> None:
    below, above = (
        torch.nextafter(torch.tensor(x, dtype=dtype), torch.tensor(end, dtype=dtype))
        for x, end in ((-1.5, -9.0), (0.7, 9.0))
    )
    edges = torch.tensor([-1.5, 0.7], dtype=dtype)
    carrier = torch.stack([below, edges[0], torch.zeros((), dtype=dtype), edges[1], above])
    carrier.requires_grad_()
    value = torch.arange(5, dtype=torch.float32)
    bounds = [as_bound(float(edge)) for edge in edges]
    found = straight_through_within(value, carrier, *bounds)
    assert torch.equal(found, value)
    (found * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert carrier.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
    with torch.no_grad():
        assert straight_through_within(value, carrier, *bounds) is value
