"""Quotients, joins and sums against whole numbers counted one by one."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig, UnsupportedError
from lightning_linger.core.tags import tag_of
from lightning_linger.ops.cat import integer_cat
from lightning_linger.ops.div import integer_div
from lightning_linger.ops.mul import integer_mul
from lightning_linger.ops.pairs import as_factor
from tests.models import Lambda, assert_integer_exact, site_of, train, trained

IMAGE = (2, 3, 6, 6)


def half_away(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2)) if x >= 0 else -math.floor(-x + Fraction(1, 2))


ROUND: dict[str, Any] = {
    "half_up": lambda x: math.floor(x + Fraction(1, 2)),
    "half_even": round,
    "half_away": half_away,
    "floor": math.floor,
    "ceil": math.ceil,
}


def payload(bits: int) -> torch.dtype:
    return torch.int8 if bits <= 8 else torch.int16


def limits(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def codes_of(bits: int) -> st.SearchStrategy[list[int]]:
    low, high = limits(bits)
    ends = st.sampled_from([low, -1, 0, 1, high])
    return st.lists(st.one_of(ends, st.integers(low, high)), min_size=1, max_size=12)


# --- division ---------------------------------------------------------------------------------


def quotient(x: int, y: int, ratio: Fraction, bits: int, rounding: str) -> int:
    low, high = limits(bits)
    if y == 0:
        return 0 if x == 0 else high if x > 0 else low
    return max(low, min(high, ROUND[rounding](Fraction(x, y) * ratio)))


@settings(max_examples=200)
@given(data=st.data())
def test_div(data: st.DataObject) -> None:
    """Any widths, any powers of two: the quotient is rounded once."""
    bits_x, bits_y, bits_o = (data.draw(st.sampled_from([2, 4, 8, 16])) for _ in range(3))
    exponents = [data.draw(st.integers(-31, 31)) for _ in range(3)]
    rounding = data.draw(st.sampled_from(sorted(ROUND)))
    xs, ys = data.draw(codes_of(bits_x)), data.draw(codes_of(bits_y))
    pairs = list(itertools.product(xs, ys))
    x = torch.tensor([a for a, _ in pairs], dtype=payload(bits_x))
    y = torch.tensor([b for _, b in pairs], dtype=payload(bits_y))
    scales = [2.0**e for e in exponents]
    found = integer_div(x, y, *scales, bits_o, *limits(bits_o), rounding, "venusa")
    ratio = Fraction(2) ** (exponents[0] - exponents[1] - exponents[2])
    assert found.dtype == payload(bits_o)
    assert found.tolist() == [quotient(a, b, ratio, bits_o, rounding) for a, b in pairs]


def test_div_at_every_tie_of_8_bits() -> None:
    x = torch.arange(-128, 128).to(torch.int8).repeat_interleave(256)
    y = torch.arange(-128, 128).to(torch.int8).repeat(256)
    for shift, rounding in itertools.product((-3, 0, 2, 6), ("half_up", "half_even")):
        found = integer_div(x, y, 2.0**shift, 1.0, 1.0, 8, -128, 127, rounding, "venusa")
        a, b = x.numpy().astype(np.int64), y.numpy().astype(np.int64)
        top, bottom = a << max(shift, 0), b << max(-shift, 0)
        top, bottom = np.where(bottom < 0, -top, top), np.abs(bottom)
        safe = np.where(bottom == 0, 1, bottom)
        whole, rest = np.divmod(top, safe)
        up = 2 * rest > safe
        up |= (2 * rest == safe) & ((whole % 2 == 1) | (rounding == "half_up"))
        expected = np.where(b == 0, np.sign(a) * 1000, whole + up)
        assert np.array_equal(found.numpy(), np.clip(expected, -128, 127))


def test_div_broadcasts_and_clamps_to_its_window() -> None:
    x, y = torch.tensor([[100], [-100]], dtype=torch.int8), torch.tensor([1, 2], dtype=torch.int8)
    found = integer_div(x, y, 1.0, 1.0, 1.0, 8, 0, 80, "half_up", "venusa")
    assert found.tolist() == [[80, 50], [0, 0]]


@pytest.mark.parametrize("scales", [(0.013, 0.31, 0.0072), (1e-3, 7e2, 3e-6)], ids=str)
def test_div_with_free_scales(scales: tuple[float, float, float]) -> None:
    """Two float64 operations, which a runtime can repeat."""
    x = torch.arange(-128, 128).to(torch.int8).repeat_interleave(256)
    y = torch.arange(-128, 128).to(torch.int8).repeat(256)
    found = integer_div(x, y, *scales, 8, -128, 127, "half_even", "onnxruntime")
    ratio = scales[0] / (scales[1] * scales[2])
    expected = [
        max(-128, min(127, round(a * ratio / b))) if b else 127 * (a > 0) - 128 * (a < 0)
        for a, b in zip(x.tolist(), y.tolist(), strict=True)
    ]
    assert found.tolist() == expected


def pair(function: Any) -> nn.Module:
    return Lambda(
        lambda self, x: function(self.a(x), self.b(x)),
        a=nn.Conv2d(3, 4, 3, padding=1),
        b=nn.Conv2d(3, 4, 3, padding=1),
    )


def single(function: Any) -> nn.Module:
    return Lambda(lambda self, x: function(self.a(x)), a=nn.Conv2d(3, 4, 3, padding=1))


def test_a_division_by_a_number_is_the_product_with_its_reciprocal() -> None:
    x = torch.randn(IMAGE)
    divided = trained(single(lambda a: a / 3), x)
    model = single(lambda a: a * (1 / 3))
    model.load_state_dict({k: v for k, v in divided.state_dict().items() if "_linger" not in k})
    assert torch.equal(divided(x), trained(model, x)(x))
    assert_integer_exact(divided, x)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_numbers_are_as_near_as_they_say(bits: int) -> None:
    model = trained(single(lambda a: a / 3), torch.randn(IMAGE))
    output = site_of(model, "/div/0").output
    assert output is not None
    output.grid = type(output.grid)(bits)
    top = 2 ** (bits - 1) - 1
    for number in (1 / 3, -0.7, 1.0, 127.0, 1e-3, -250.0, 5e6, 0.0):
        factor = as_factor(number, output)
        assert math.frexp(factor.step)[0] == 0.5
        assert -top - 1 <= factor.code <= top
        assert factor.value == factor.code * factor.step
        assert abs(factor.value - number) <= factor.step / 2
        assert abs(factor.value - number) <= abs(number) / top


def test_what_a_zero_divides_saturates_and_is_not_observed() -> None:
    """Zeros among the divisors do not blow up the range, and let no gradient through."""
    x = torch.randn(IMAGE)
    model = trained(pair(lambda a, b: a / b.relu()), x)
    site = site_of(model, "/div/0")
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        seen["a" if module is model.a else "b"] = out

    for conv in (model.a, model.b):
        conv.register_forward_hook(keep)
    y = model(x)
    zero = seen["b"].relu() == 0
    assert zero.any()
    tag = tag_of(y)
    assert tag is not None
    low, high = -128 * tag.step, 127 * tag.step
    sign = seen["a"].sign()
    assert torch.equal(y[zero], torch.where(sign < 0, low, sign * high)[zero])
    smallest = seen["b"][~zero].min()
    assert site.output.estimator.absmax() <= seen["a"].abs().max() / smallest
    found = torch.autograd.grad(y.sum(), [seen["a"], seen["b"]])
    for gradient in found:
        assert torch.isfinite(gradient).all()
        assert not gradient[zero].any()
    assert_integer_exact(model, x)


def test_division_by_zero_and_other_kinds_of_division_stay_float() -> None:
    x = torch.randn(IMAGE)
    reasons = {
        "by zero": lambda a: (a / 0).nan_to_num(),
        "rounding_mode": lambda a: torch.div(a, 0.3, rounding_mode="floor"),
    }
    for reason, function in reasons.items():
        model = trained(single(function), x)
        assert reason in site_of(model, "/div/0").why_float


def test_only_a_division_by_tensors_is_beyond_the_engine() -> None:
    x = torch.randn(IMAGE)
    config = QuantConfig(platform="arcs", strict_platform=True)
    trained(single(lambda a: a / 5), x, config=config)
    with pytest.raises(UnsupportedError, match="cannot run div"):
        trained(pair(torch.div), x, config=config)


# --- products and sums ------------------------------------------------------------------------


@settings(max_examples=100)
@given(data=st.data())
def test_mul(data: st.DataObject) -> None:
    bits_x, bits_y, bits_o = (data.draw(st.sampled_from([2, 4, 8, 16])) for _ in range(3))
    shift = data.draw(st.integers(0, 30))
    xs, ys = data.draw(codes_of(bits_x)), data.draw(codes_of(bits_y))
    pairs = list(itertools.product(xs, ys))
    x = torch.tensor([a for a, _ in pairs], dtype=payload(bits_x))
    y = torch.tensor([b for _, b in pairs], dtype=payload(bits_y))
    low, high = limits(bits_o)
    found = integer_mul(x, y, 0.5, 0.25, 0.125 * 2.0**shift, bits_o, low, high, "half_up", "arcs")
    expected = [(a * b + (1 << shift >> 1)) >> shift for a, b in pairs]
    assert found.tolist() == [max(low, min(high, code)) for code in expected]


@pytest.mark.parametrize("sign", [1, -1], ids=["add", "sub"])
def test_a_saturated_sum_lets_no_gradient_through_with_free_scales(sign: int) -> None:
    x = torch.randn(IMAGE)
    model = trained(
        pair(lambda a, b: a + b if sign > 0 else a - b),
        x,
        config=QuantConfig(platform="onnxruntime"),
    )
    seen = {}
    model.a.register_forward_hook(lambda module, args, out: seen.update(a=out))
    y = model(x * 30)
    step = tag_of(y).step
    saturated = (y >= 127 * step) | (y <= -128 * step)
    assert saturated.any()
    assert not saturated.all()
    (gradient,) = torch.autograd.grad(y.sum(), seen["a"])
    assert not gradient[saturated].any()
    assert gradient[~saturated].eq(1).all()


@pytest.mark.parametrize("function", [torch.add, torch.sub])
def test_alpha_stays_float(function: Any) -> None:
    x = torch.randn(IMAGE)
    model = trained(pair(lambda a, b: function(a, b, alpha=2)), x)
    assert "alpha" in site_of(model, f"/{function.__name__}/0").why_float
    assert_integer_exact(model, x)
    model = trained(pair(lambda a, b: function(a, b, alpha=1)), x)
    assert site_of(model, f"/{function.__name__}/0").quantized


def test_operands_of_another_width_with_free_scales() -> None:
    """A code of 16 bits on a tie of the 8-bit grid rounds the same way in both systems."""
    model = single(lambda a: a * a)
    x = torch.randn(8, 3, 12, 12)
    config = QuantConfig(platform="onnxruntime", output_bits=16)
    trained(model, x, config=config, overrides={"type:mul": {"output_bits": 8}})
    systems: dict[str, Tensor] = {}
    with torch.no_grad():
        operand = model.a(x)
        site = site_of(model, "/mul/0")
        tag = tag_of(operand)
        ties = torch.arange(-128, 127) * 256 + 128
        fake = linger.core.tags.with_tag((ties * tag.step).float(), tag)
        systems["fake"] = site.operand(0, fake)
        site.switches.system = "integer"
        coded = linger.core.tags.with_tag(ties.to(torch.int16), tag)
        codes = site.operand(0, coded)
        site.switches.system = "fake"
    assert torch.equal(systems["fake"], codes.float() * tag_of(codes).step)


# --- joins ------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(data=st.data())
def test_cat(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 4, 8, 16]))
    parts = data.draw(st.lists(codes_of(bits), min_size=1, max_size=4))
    shifts = [data.draw(st.integers(0, 20)) for _ in parts]
    low, high = limits(bits)
    found = integer_cat(
        [torch.tensor(part, dtype=payload(bits)) for part in parts],
        0,
        [2.0**-shift for shift in shifts],
        1.0,
        bits,
        "half_up",
        "venusa",
    )
    expected = [
        max(low, min(high, (code + (1 << shift >> 1)) >> shift))
        for part, shift in zip(parts, shifts, strict=True)
        for code in part
    ]
    assert found.tolist() == expected


JOINS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "cat": (lambda p: torch.cat(p, dim=-1), (3, 4)),
    "cat-axis": (lambda p: torch.cat(p, axis=0), (3, 4)),
    "stack": (lambda p: torch.stack(p), (3, 4)),
    "stack-last": (lambda p: torch.stack(p, -1), (3, 4)),
    "stack-middle": (lambda p: torch.stack(p, dim=1), (2, 3, 4)),
    "hstack": (torch.hstack, (3, 4)),
    "hstack-line": (torch.hstack, (4,)),
    "vstack": (torch.vstack, (3, 4)),
    "vstack-line": (torch.vstack, (4,)),
    "dstack": (torch.dstack, (3, 4)),
    "dstack-line": (torch.dstack, (4,)),
    "column_stack": (torch.column_stack, (3, 4)),
    "column_stack-line": (torch.column_stack, (4,)),
}


@pytest.mark.parametrize("name", JOINS)
def test_joins_bring_all_to_the_coarsest_step(name: str) -> None:
    function, shape = JOINS[name]
    size = shape[-1]
    model = Lambda(
        lambda self, x: (function([self.a(x), self.b(x) * 4]), self.a(x), self.b(x) * 4),
        a=nn.Linear(size, size),
        b=nn.Linear(size, size),
    )
    x = torch.randn(shape)
    trained(model, x, steps=1)
    joined, *parts = model(x)
    tags = [tag_of(part) for part in parts]
    step = max(tag.step for tag in tags)
    assert tag_of(joined).step == step
    at_step = [torch.floor(p / step + 0.5).clamp(-128, 127) * step for p in parts]
    assert torch.equal(joined, function(at_step))
    assert_integer_exact(model, x)


def test_out_arguments_stay_float() -> None:
    x = torch.randn(IMAGE)
    space = torch.empty(2, 8, 6, 6)
    model = pair(lambda a, b: torch.cat([a.detach(), b.detach()], 1, out=space))
    linger.prepare(model, (x,))
    linger.quantize(model)
    train(model, (x,), 1, 0.0)
    assert "out" in site_of(model.eval(), "/cat/0").why_float
