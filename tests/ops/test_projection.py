"""Weights inside an op: codes, cache, limits; and layers with 32-bit results."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.integer import code_limits
from lightning_linger.core.tags import Tag, with_tag
from lightning_linger.ops.kernel import Target
from lightning_linger.ops.projection import Projection
from tests.models import Lambda, assert_integer_exact, site_of, train


def attention(**fields) -> tuple:
    """A site with weights, from a prepared layer, in evaluation."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(6, 2, batch_first=True)
    model.in_proj_bias.data.normal_()
    x = torch.randn(2, 3, 6)
    linger.prepare(model, (x, x, x))
    linger.quantize(model, QuantConfig(**fields))
    for _ in range(2):
        model(x, x, x)
    model.eval()
    return model, site_of(model, "/multi_head_attention_forward/0"), x


def nearest(value: Fraction, rounding: str) -> int:
    return round(value) if rounding == "half_even" else math.floor(value + Fraction(1, 2))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("platform", "bits"), [("venusa", 8), ("venusa", 4), ("onnxruntime", 8)])
def test_codes_like_integers(platform, bits, granularity):
    model, site, _ = attention(platform=platform, weight_bits=bits, granularity=granularity)
    own = Projection("own", model.in_proj_weight[:6], model.in_proj_bias[:6])
    scale_x = 2.0**-5
    codes = own.codes(site, scale_x, 8)
    assert len(codes.steps) == (6 if granularity == "channel" else 1)
    rounding = site.rounding
    grid = site.weights.grid
    for row in range(6):
        step = Fraction(codes.steps[row % len(codes.steps)])
        for column in range(6):
            weight = Fraction(float(model.in_proj_weight.detach()[row, column]))
            # A free step divides in float32: next to a tie either neighbour is right.
            if platform == "venusa":
                code = max(grid.qmin, min(grid.qmax, nearest(weight / step, rounding)))
                assert int(codes.weight[row, column]) == code
            assert abs(int(codes.weight[row, column]) - weight / step) <= Fraction(501, 1000) or (
                int(codes.weight[row, column]) == grid.qmax
            )
        bias = Fraction(float(model.in_proj_bias.detach()[row])) / (step * Fraction(scale_x))
        assert abs(int(codes.bias[row]) - bias) <= Fraction(501, 1000)
    rows = codes.weight.long().abs().sum(1) * 128 + codes.bias.long().abs()
    assert codes.bound == int(rows.max())


def test_a_factor_is_part_of_the_weight():
    model, site, _ = attention()
    weight, bias = model.in_proj_weight[:6], model.in_proj_bias[:6]
    by_factor = Projection("a", weight, bias, 0.25).codes(site, 0.5, 8)
    by_hand = Projection("b", weight * 0.25, bias * 0.25).codes(site, 0.5, 8)
    assert torch.equal(by_factor.weight, by_hand.weight)
    assert torch.equal(by_factor.bias, by_hand.bias)
    assert by_factor.steps == by_hand.steps


def test_codes_are_derived_once_in_evaluation():
    model, site, x = attention()
    model(x, x, x)
    first = site.prepared["projection key"].codes
    model(x, x, x)
    assert site.prepared["projection key"].codes is first
    with torch.no_grad():
        model.in_proj_weight.mul_(0.5)
    model(x, x, x)
    assert site.prepared["projection key"].codes is not first
    model.train()
    model(x, x, x)
    assert "projection key" not in site.prepared


def test_limits_act_before_rounding():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(6, 2, batch_first=True)
    model.in_proj_weight.data.mul_(9.0)
    model.in_proj_bias.data.normal_().mul_(9.0)
    x = torch.randn(2, 3, 6)
    linger.prepare(model, (x, x, x))
    linger.normalize(model, weight=0.5, bias=0.25, output=1.0)
    limited = nn.MultiheadAttention(6, 2, batch_first=True)
    limited.load_state_dict(
        {
            k: v.clamp(-0.25, 0.25) if "bias" in k else v.clamp(-0.5, 0.5)
            for k, v in model.state_dict().items()
            if not k.startswith("_linger")
        }
    )
    torch.testing.assert_close(model(x, x, x)[0], limited(x, x, x)[0].clamp(-1.0, 1.0))
    linger.quantize(model)
    model(x, x, x)
    model.eval()
    assert_integer_exact(model, x, x, x)
    site = site_of(model, "/multi_head_attention_forward/0")
    codes = site.prepared["projection value"].codes
    assert float(codes.weight.abs().max()) * codes.steps[0] <= 0.5
    assert float(codes.bias.abs().max()) * codes.product <= 0.25


def test_a_bias_that_needs_it_makes_the_weight_coarser():
    _, site, _ = attention(bias_bits=8)
    own = Projection("own", torch.full((2, 3), 0.5), torch.tensor([100.0, 0.0]))
    codes = own.codes(site, 0.25, 8)
    assert int(codes.bias.abs().max()) <= 127
    assert codes.steps[0] * 0.25 * 127 >= 100.0


@pytest.mark.parametrize("features", [3, 900, 2000])
def test_run_equals_integer_arithmetic(features):
    """Long sums of equal signs leave float32 behind."""
    model, site, _ = attention(platform="venusa")
    weight = torch.full((2, features), -1.5)
    weight[1, 0] = 1.25
    own = Projection(f"own {features}", weight, torch.tensor([0.5, -3.0]))
    x = torch.full((1, features), -128, dtype=torch.int8)
    output = site.part("value")
    with linger.integer(model), torch.no_grad():
        found = own.run(site, with_tag(x, Tag(2.0**-6, 8, "x")), output)
    codes = own.codes(site, 2.0**-6, 8)
    step = float(output.step())
    for row in range(2):
        acc = sum(-128 * int(w) for w in codes.weight[row]) + int(codes.bias[row])
        exact = Fraction(acc) * Fraction(codes.product) / Fraction(step)
        assert int(found[0, row]) == max(-128, min(127, math.floor(exact + Fraction(1, 2))))


@pytest.mark.parametrize("is_layer", [True, False])
@pytest.mark.parametrize("features", [1000, 3000])
def test_a_wide_accumulator_is_exact(features, is_layer):
    """Odd sums above 2^24, and from 2^23 on, where a half on top has no room in float32."""
    weight = torch.ones(1, features)
    weight[0, 0] = 127 / 128
    if is_layer:
        model, key, name = nn.Linear(features, 1, bias=False), "/linear/0", "weights"
        model.weight.data.copy_(weight)
    else:
        model = Lambda(lambda self, x: x @ self.own, own=nn.Parameter(weight.t().contiguous()))
        key, name = "/matmul/0", "projection weight"
    x = torch.full((2, features), -1.0)
    x[1, 0] = -127 / 128
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(output_bits=32))
    train(model, (x,), 1, 0.0)
    model.eval()
    with torch.no_grad(), linger.integer(model):
        found = model(x)
    site = site_of(model, key)
    prepared = site.prepared[name]
    codes = prepared.codes if is_layer else prepared.codes.weight
    steps = prepared.steps if is_layer else prepared.codes.steps
    step_x = float(site.inputs["0"].step())
    for row, result in zip(x, found, strict=True):
        parts = zip(row, codes[0].tolist(), strict=True)
        acc = sum(round(float(v) / step_x) * w for v, w in parts)
        assert abs(acc) > 2**23
        assert float(result) == float(np.float32(acc * step_x * steps[0]))
    assert_integer_exact(model, x)


@pytest.mark.parametrize("features", [100, 900, 1100])
def test_float32_is_used_while_it_is_exact(features):
    _, site, _ = attention()
    own = Projection(f"own {features}", torch.full((1, features), 1.0))
    codes = own.codes(site, 0.5, 8)
    assert codes.bound == features * 127 * 128
    assert codes.exact_in_float32(site) == (codes.bound < 2**24)
    wide = Target(codes.product, 32, *code_limits(32))
    assert codes.exact_in_float32(site, wide) == (codes.bound < 2**23)
    coarse = Target(codes.product * 2.0**10, 8, *code_limits(8))
    assert codes.exact_in_float32(site, coarse) == (codes.bound + 2**17 < 2**24)
