"""Vectors of length one, in whole numbers and one rounding."""

import math
import re
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.integer import code_limits, payload_dtype
from lightning_linger.ops.tflite import l2_normalization
from lightning_linger.ops.unit_length import integer_normalize
from tests.models import Chain, Lambda, assert_integer_exact, site_of


def run(
    x: Tensor,
    dim: int = -1,
    eps: float = 1e-12,
    bits: int = 8,
    rounding: str = "half_even",
    platform: str = "onnxruntime",
) -> Tensor:
    limits = code_limits(bits)
    step_o = 2.0 ** (1 - bits)
    dim = dim % x.dim()
    codes = x.to(payload_dtype(bits))
    return integer_normalize(codes, dim, eps, 0.25, bits, step_o, bits, *limits, rounding, platform)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-128, 127), min_size=1, max_size=9),
    st.sampled_from(["half_up", "half_even"]),
)
def test_the_result_is_the_nearest_code(row: list[int], rounding: str) -> None:
    """Squared, the comparison with the midpoints next to a code needs no root."""
    squares = sum(x * x for x in row)
    found = run(torch.tensor([row]), rounding=rounding)[0].tolist()
    for x, code in zip(row, found, strict=True):
        if squares == 0:
            assert code == 0
            continue
        size, sign = abs(code), 1 if x >= 0 else -1
        assert code * sign >= 0
        scaled = Fraction(128 * 128 * x * x, squares)  # of the real result in codes
        assert scaled >= max(Fraction(0), Fraction(2 * size - 1, 2)) ** 2
        if code < 127:
            assert scaled <= Fraction(2 * size + 1, 2) ** 2


def test_a_short_vector_is_divided_by_eps() -> None:
    x = torch.tensor([[3, 4], [30, 40], [0, 0]])  # norms 1.25, 12.5 and 0 at a step of 1/4
    expected = F.normalize(x * 0.25, dim=1, eps=5.0) * 128
    assert torch.equal(run(x, eps=5.0).float(), expected.round())
    assert run(x, eps=5.0)[0].tolist() == [19, 26]
    assert run(x)[0].tolist() == [77, 102]


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("platform", ["onnxruntime", "venusa", "tflite"])
def test_any_dimension(dim: int, platform: str) -> None:
    torch.manual_seed(0)
    x = torch.randint(-128, 128, (3, 4, 5))
    if platform == "tflite":
        centred = x.to(torch.int16)
        arguments = (1e-12, 0.25, 9, 2.0**-7, 9, -128, 127, "half_away", platform)
        found = integer_normalize(centred, dim, *arguments)
        expected = l2_normalization(x.movedim(dim, -1), 0).movedim(-1, dim)
    else:
        found = run(x, dim, platform=platform)
        expected = run(x.movedim(dim, -1).contiguous(), platform=platform).movedim(-1, dim)
    assert found.is_contiguous()
    assert torch.equal(found.long(), expected.long())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1], [127]),
        ([-1, 0, 0], [-128, 0, 0]),
        ([1, 1], [91, 91]),
        ([0, 0], [0, 0]),
        ([-128] * 4, [-64] * 4),
        ([127] + [0] * 9, [127] + [0] * 9),
        ([255] * 16384, [1] * 16384),
    ],
    ids=["one", "minus-one", "two", "zeros", "lowest", "alone", "many"],
)
def test_ends_of_the_fixed_point_kernel(row: list[int], expected: list[int]) -> None:
    assert l2_normalization(torch.tensor([row]), 0)[0].tolist() == expected


def test_row73_the_engines_kernel_is_not_the_nearest_code() -> None:
    """Next to a half, 68.50002 here, the two differ."""
    row = torch.tensor([[203, 140, -176, -196, -117]], dtype=torch.int16)
    arguments = (1, 1e-12, 0.25, 9, 2.0**-7, 9, -128, 127, "half_away")
    assert integer_normalize(row, *arguments, "tflite")[0].tolist() == [68, 47, -59, -66, -39]
    assert integer_normalize(row, *arguments, "venusa")[0].tolist() == [69, 47, -59, -66, -39]


def test_the_fixed_point_kernel_is_near_the_real_function() -> None:
    torch.manual_seed(0)
    for scale in (1, 3, 30, 128):
        x = torch.randint(-scale, scale + 1, (500, 7))
        real = F.normalize(x.double()) * 128
        assert (l2_normalization(x, 0) - real.clamp(-128, 127)).abs().max() <= 0.501


def test_sixteen_bits_are_near_the_real_function() -> None:
    torch.manual_seed(0)
    x = torch.randint(-(2**15), 2**15, (20, 300))
    real = F.normalize(x.double())
    assert (run(x, bits=16).double() / 2**15 - real).abs().max() <= 0.5001 / 2**15


class Embedding(nn.Module):
    """A head for comparing by angle."""

    def __init__(self, **arguments: object) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.fc(x), **self.arguments)


@pytest.mark.parametrize("platform", ["tflite", "venusa", "onnxruntime"])
def test_it_is_quantized_and_learns(platform: str) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(32, 6), F.normalize(torch.randn(32, 8))
    model = Embedding()
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform=platform))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert_integer_exact(model.eval(), x)
    with torch.no_grad():
        y = model(x)
    assert (y.norm(dim=1) - 1).abs().max() < 0.03
    assert linger.summary(model)[-1].system == "fake"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"p": 1.0}, "the norm of p=1.0 has no integer form; use p=2"),
        ({"p": math.inf}, "the norm of p=inf"),
        ({"dim": (0, 1)}, r"the norm over the dimensions \(0, 1\).*flatten"),
        ({"eps": 0.0}, "eps must be positive"),
    ],
)
def test_what_stays_float_says_why(arguments: dict[str, object], why: str) -> None:
    x = torch.randn(4, 6)
    model = linger.prepare(Embedding(**arguments), (x,))
    linger.quantize(model, QuantConfig(platform="tflite"))
    model(x)
    (row,) = [row for row in linger.summary(model) if row.op == "normalize"]
    assert row.system == "float"
    assert re.search(why, row.why_float)
    assert_integer_exact(model.eval(), x)


def test_a_power_iteration_on_a_weight_stays_out_of_it() -> None:
    """Spectral norm calls it on buffers, which are no activations."""
    x = torch.randn(4, 6)
    model = Chain(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)))
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform="tflite"))
    model(x)
    assert not [row for row in linger.summary(model) if row.op == "normalize" and row.bits]
    assert_integer_exact(model.eval(), x)


def test_nothing_is_left_of_a_row_of_zeros() -> None:
    def forward(self: Lambda, x: Tensor) -> Tensor:
        return F.normalize(self.fc(x) * 0.0)

    x = torch.randn(4, 6)
    for platform in ("tflite", "venusa"):
        model = linger.prepare(Lambda(forward, fc=nn.Linear(6, 6)), (x,))
        linger.quantize(model, QuantConfig(platform=platform))
        model(x).sum().backward()
        assert_integer_exact(model.eval(), x)
        assert not model(x).any()
        assert site_of(model, "/normalize/0").quantized
