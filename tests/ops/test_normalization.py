"""Layer, group, instance and RMS norm against references in Python's own numbers."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.integer import code_limits, payload_dtype
from lightning_linger.export import export_onnx
from lightning_linger.ops.normalization import epsilon_of_engine, integer_layer_norm
from tests.models import Lambda, train

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "thinker"
few = settings(max_examples=60, deadline=None)


# --- references -------------------------------------------------------------------------------


def half_up(x: float) -> int:
    return math.floor(x + 0.5)


def clamp(code: int, low: int, high: int) -> int:
    return max(low, min(high, code))


def rs(x: int, shift: int) -> int:
    return (x + (1 << (shift - 1))) >> shift if shift > 0 else x << -shift


def sums(values, centered):
    count = len(values)
    total = sum(values) if centered else 0
    spread = count * sum(v * v for v in values) - total * total
    return count, [count * v - total for v in values], spread


def reference(values, weights, biases, centered, eps, step_x, step_w, step_o, bits_o):
    """One group, in Python's float64."""
    count, numerators, spread = sums(values, centered)
    root = math.sqrt(float(spread) + eps * count * count / (step_x * step_x))
    scaled = [
        float(n) / root * float(w) + float(b) * 2.0**-10
        for n, w, b in zip(numerators, weights, biases, strict=True)
    ]
    return [clamp(half_up(y * (step_w / step_o)), *code_limits(bits_o)) for y in scaled]


def inverse_root(x: int) -> tuple[int, int]:
    """The engine's table: an even window of ten bits below the highest pair of bits."""
    if x == 0:
        return 32767, 4
    pair = (x.bit_length() - 1) // 2
    window = x >> (2 * pair - 8) if pair >= 4 else x << (8 - 2 * pair)
    return min(32767, math.isqrt(2**38 // window)), pair + 5


def reference_engine(values, weights, biases, eps, step_x, step_w, step_o, bits_o):
    """One row, in Python's integers, epsilon in numpy's float32."""
    count, numerators, spread = sums(values, True)
    epsilon = np.float32(eps) * np.float32(step_x**-2) * np.float32(count) * np.float32(count)
    inverse, shift = inverse_root(spread + math.floor(epsilon + np.float32(0.5)))
    shift_o = 10 + round(math.log2(step_o / step_w))
    return [
        clamp(rs(rs(n * inverse, shift) * w + b, shift_o), *code_limits(bits_o))
        for n, w, b in zip(numerators, weights, biases, strict=True)
    ]


# --- drawn norms ------------------------------------------------------------------------------


@st.composite
def norms(draw, widest=16, groups=(1, 3), spreads=(1, 4)):
    """Codes ``[rows, groups, channels, spread]``, weights, biases, steps and widths."""
    bits = [draw(st.integers(2, widest)) for _ in range(3)]
    shape = (
        draw(st.integers(1, 3)),
        draw(st.integers(*groups)),
        draw(st.integers(1, 6)),
        draw(st.integers(*spreads)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low, high = code_limits(bits[0])
    x = torch.randint(low, high + 1, shape, generator=generator)
    extreme = draw(st.sampled_from(["none", "low", "zero", "one"]))
    if extreme != "none":
        x[0] = {"low": low, "zero": 0, "one": 0}[extreme]
    if extreme == "one":
        x[0, ..., 0] = high
    w_low, w_high = code_limits(bits[1])
    weight = torch.randint(w_low, w_high + 1, shape[1:3], generator=generator)
    bias = torch.randint(-(2**14), 2**14, shape[1:3], generator=generator)
    step_x = 2.0 ** draw(st.integers(-12, 2))
    step_w = 2.0 ** draw(st.integers(-8, 1))
    step_o = step_w * 2.0 ** draw(st.integers(-10, 3))
    return x, weight, bias, (step_x, step_w, step_o), bits


def run(drawn, centered=True, eps=1e-5, platform="onnxruntime"):
    x, weight, bias, steps, bits = drawn
    y = integer_layer_norm(
        x.to(payload_dtype(bits[0])),
        weight.to(payload_dtype(bits[1])),
        bias.int(),
        x.shape[3],
        centered,
        eps,
        *steps,
        *bits,
        *code_limits(bits[2]),
        "half_up",
        platform,
    )
    assert y.shape == x.shape
    assert y.dtype == payload_dtype(bits[2])
    return y.tolist()


def expected(drawn, one_group):
    """Apply a reference of one group everywhere."""
    x, weight, bias, steps, bits = drawn
    rows, groups, channels, spread = x.shape
    result = torch.empty(x.shape, dtype=torch.int64)
    for row in range(rows):
        for group in range(groups):
            weights, biases = (
                [v for v in p[group].tolist() for _ in range(spread)] for p in (weight, bias)
            )
            found = one_group(x[row, group].flatten().tolist(), weights, biases, *steps, bits[2])
            result[row, group] = torch.tensor(found).view(channels, spread)
    return result.tolist()


# --- kernels ----------------------------------------------------------------------------------


@few
@given(norms(), st.booleans(), st.sampled_from([1e-5, 1e-12, 0.1]))
def test_norm_without_an_engine_kernel(drawn, centered, eps):
    def one(values, weights, biases, *rest):
        return reference(values, weights, biases, centered, eps, *rest)

    wanted = expected(drawn, one)
    platforms = ["onnxruntime", "venus"]
    groups, _, spread = drawn[0].shape[1:]
    if groups > 1 or spread > 1 or not centered or max(drawn[4]) > 8:
        platforms += ["venusa", "arcs"]
    for platform in platforms:
        assert run(drawn, centered, eps, platform) == wanted


@few
@given(
    norms(widest=8, groups=(1, 1), spreads=(1, 1)),
    st.sampled_from([1e-5, 1e-3, 1e-12]),
    st.sampled_from(["arcs", "mars", "venusa"]),
)
def test_layer_norm_of_an_engine(drawn, eps, platform):
    def one(values, weights, biases, *rest):
        return reference_engine(values, weights, biases, eps, *rest)

    assert run(drawn, True, eps, platform) == expected(drawn, one)


def test_the_epsilon_of_the_engine_is_rounded_to_float32():
    """Four float32 operations: one product per factor, and the sum with a half."""

    def single(x):
        return struct.unpack("f", struct.pack("f", x))[0]

    different = 0
    for count in (16, 100, 297, 331):
        for exponent in range(1, 15):
            value = single(1e-5) * 4.0**exponent
            for factor in (count, count):
                value = single(value * factor)
            found = epsilon_of_engine(1e-5, count, 2.0**-exponent)
            assert found == math.floor(single(value + 0.5))
            different += found != math.floor(1e-5 * 4.0**exponent * count * count + 0.5)
    assert different


def test_engine_vectors():
    """Vectors measured on the engine, without a graph around them."""
    for name in ("layernorm_q4__arcs", "layernorm_q4__venusA"):
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "attrs_json"}
            node = json.loads(str(file["attrs_json"]))["attrs"]["LayerNormInt/LayerNormInt_y5"]
        steps = [1 / node[f"scale_{key}"] for key in "xwo"]
        weight, bias = (arrays[f"const_w{i}"].view(1, -1) for i in (3, 4))
        x = arrays["in0"]
        platform = node["platform"].lower()
        y = integer_layer_norm(
            x, weight, bias, 1, True, 1e-5, *steps, 8, 8, 8, -128, 127, "half_up", platform
        )
        assert torch.equal(y, arrays["out0"])


@pytest.mark.parametrize("bits", [8, 16])
def test_error_bound_without_an_engine_kernel(bits):
    """Half a step."""
    x = torch.randint(*code_limits(bits), (50, 1, 64, 1))
    weight = torch.randint(-100, 100, (1, 64))
    bias = torch.randint(-5000, 5000, (1, 64))
    step = 2.0 ** (4 - bits)
    found = torch.tensor(run((x, weight, bias, (step, 2.0**-7, step), [bits, 8, bits])))
    exact = F.layer_norm(x.double() * step, (64, 1), weight[0, :, None].double() * 2.0**-7)
    exact = exact + bias.view(1, 1, 64, 1) * 2.0**-17
    low, high = code_limits(bits)
    assert (found - (exact / step).clamp(low, high)).abs().max() <= 0.5 + 1e-6


def test_error_bound_of_an_engine():
    """Its inverse root is up to 0.2 % too large, a normalized value off by 2^-11 more."""
    x = torch.randint(-128, 128, (200, 1, 64, 1))
    drawn = (x, torch.full((1, 64), 64), torch.zeros(1, 64), (2.0**-4, 2.0**-6, 2.0**-5), [8] * 3)
    found = torch.tensor(run(drawn, platform="venusa")) * 2.0**-5
    exact = F.layer_norm(x.double() * 2.0**-4, (64, 1)).clamp(-4, 127 / 32)
    error = (found - exact) * exact.sign()
    assert error.max() <= 2.0**-6 + 2.0**-11 + 0.002 * 4
    assert error.min() >= -(2.0**-6) - 2.0**-11 - 1e-4 * 4
    assert not torch.equal(found, torch.tensor(run(drawn)) * 2.0**-5)


# --- ops --------------------------------------------------------------------------------------


def quantized(model, x, platform="venusa", steps=1, **fields):
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform=platform, **fields))
    train(model, (x,), steps, 0.0)
    return model


def site_of(model, kind):
    return next(site for site in instrumentation_of(model).sites if site.op.kind == kind)


def assert_close_to_float(make, x, kind, tolerance=0.1):
    torch.manual_seed(0)
    model = make()
    expected = model(x).detach()
    model = quantized(model, x, weight_bits=8, activation_bits=16, output_bits=16).eval()
    assert site_of(model, kind).quantized
    found = model(x)
    assert (found - expected).abs().max() < tolerance
    with linger.integer(model), torch.no_grad():
        assert torch.equal(model(x), found)


@pytest.mark.parametrize(
    ("kind", "make", "shape"),
    [
        ("layer_norm", lambda: nn.LayerNorm(12), (3, 5, 12)),
        ("layer_norm", lambda: nn.LayerNorm((5, 12), bias=False), (3, 5, 12)),
        ("rms_norm", lambda: nn.RMSNorm(12), (3, 5, 12)),
        ("rms_norm", lambda: nn.RMSNorm(12, eps=1e-3, elementwise_affine=False), (3, 12)),
        ("group_norm", lambda: nn.GroupNorm(3, 12), (2, 12, 5, 4)),
        ("group_norm", lambda: nn.GroupNorm(3, 12), (2, 12)),
        ("group_norm", lambda: nn.GroupNorm(1, 12, affine=False), (2, 12, 7)),
        ("instance_norm", lambda: nn.InstanceNorm1d(12, affine=True), (2, 12, 9)),
        ("instance_norm", lambda: nn.InstanceNorm2d(12), (2, 12, 5, 4)),
        ("instance_norm", lambda: nn.InstanceNorm3d(2), (2, 2, 3, 4, 5)),
    ],
)
def test_layers_of_torch(kind, make, shape):
    assert_close_to_float(make, torch.randn(shape) * 2 + 1, kind)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("layer_norm", lambda x, w, b: torch.layer_norm(x, (4,), w, b, 1e-5, True)),
        ("group_norm", lambda x, w, b: torch.group_norm(x, 2, w, b, 1e-5, True)),
        (
            "instance_norm",
            lambda x, w, b: torch.instance_norm(x, w, b, None, None, True, 0.1, 1e-5, True),
        ),
        ("instance_norm", lambda x, w, b: F.instance_norm(x, None, None, w, b)),
        ("rms_norm", lambda x, w, b: torch.rms_norm(x, (4,), w)),
    ],
)
def test_spellings_of_torch(kind, function):
    def make():
        model = Lambda(lambda self, x: function(x, self.weight, self.bias))
        model.weight = nn.Parameter(torch.randn(4))
        model.bias = nn.Parameter(torch.randn(4))
        return model

    assert_close_to_float(make, torch.randn(2, 4, 4), kind)


@pytest.mark.parametrize("platform", ["venusa", "venus", "onnxruntime"])
def test_a_weight_of_ones_is_exact_without_a_parameter(platform):
    x = torch.randn(4, 16)
    layer = quantized(nn.LayerNorm(16, elementwise_affine=False), x, platform).eval()
    with torch.no_grad():
        layer(x)
    affine = site_of(layer, "layer_norm").prepared["normalization"]
    assert affine.codes.unique().tolist() == [64]
    assert affine.step == 2.0**-6


def test_parameters_get_gradients_though_the_input_needs_none():
    x = torch.randn(6, 8)
    model = nn.LayerNorm(8)
    reference = nn.LayerNorm(8)
    quantized(model, x).train()
    cotangent = torch.randn(6, 8)
    model(x).backward(cotangent)
    reference(x).backward(cotangent)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.05, atol=0.1)


def test_range_limits_apply_to_weight_and_bias():
    x = torch.randn(6, 8)
    model = nn.LayerNorm(8)
    model.weight.data.fill_(3.0)
    model.bias.data.fill_(-5.0)
    linger.prepare(model, (x,))
    linger.normalize(model, weight=2.0, bias=1.0, output=None)
    limited = F.layer_norm(x, (8,), torch.full((8,), 2.0), torch.full((8,), -1.0))
    torch.testing.assert_close(model(x), limited)
    linger.quantize(model, QuantConfig(platform="venus"))
    train(model, (x,), 1, 0.0)
    model.eval()
    with torch.no_grad():
        model(x)
    affine = site_of(model, "layer_norm").prepared["normalization"]
    assert affine.weight.abs().max() <= 2.0
    assert affine.bias.abs().max() <= 1.0


def test_what_evaluation_prepares_follows_the_parameters():
    x = torch.randn(6, 8)
    model = quantized(nn.LayerNorm(8), x).eval()
    with torch.no_grad():
        before = model(x)
        model.weight.mul_(0.25)
        assert not torch.equal(model(x), before)


def test_a_large_bias_makes_the_weight_coarser():
    x = torch.randn(6, 8)
    model = nn.LayerNorm(8)
    model.bias.data.fill_(20.0)
    quantized(model, x, platform="onnxruntime", bias_bits=16).eval()
    with torch.no_grad():
        y = model(x)
    affine = site_of(model, "layer_norm").prepared["normalization"]
    assert affine.bias_codes.max() <= 2**15 - 1
    assert (y - 20).abs().max() < 4


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (lambda: nn.LayerNorm(4, eps=0.0), (2, 4), "eps must be positive"),
        (lambda: nn.InstanceNorm1d(4, track_running_stats=True), (2, 4, 9), "use nn.BatchNorm"),
    ],
)
def test_what_stays_float(make, shape, reason):
    model = nn.Sequential(nn.Linear(shape[-1], shape[-1]), make())
    quantized(model, torch.randn(shape))
    kind = "layer_norm" if len(shape) == 2 else "instance_norm"
    assert reason in site_of(model, kind).why_float


def test_a_weight_that_is_computed_from_the_input_stays_float():
    model = Lambda(lambda self, x: F.layer_norm(self.fc(x), (4,), weight=x[0]), fc=nn.Linear(4, 4))
    quantized(model, torch.randn(2, 4))
    assert "computed from the input" in site_of(model, "layer_norm").why_float


def test_sums_that_64_bits_do_not_hold_are_an_error():
    model = nn.InstanceNorm1d(1)
    x = torch.randn(1, 1, 2**16)
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform="venusa", activation_bits=16))
    with pytest.raises(UnsupportedError, match="exceed 64 bits"):
        model(x)


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (lambda: nn.LayerNorm(8, eps=0.1), (2, 8), "the engine ignores eps"),
        (lambda: nn.LayerNorm(363), (2, 363), "may exceed 32 bits"),
        (lambda: nn.RMSNorm(8), (2, 8), "takes the mean off"),
        (lambda: nn.GroupNorm(1, 8), (2, 8, 4), "one weight for each place"),
    ],
)
def test_what_the_engine_cannot_run_is_refused(make, shape, reason, tmp_path):
    x = torch.randn(shape)
    model = quantized(make(), x).eval()
    with pytest.raises(UnsupportedError, match=reason):
        export_onnx(model, (x,), tmp_path / "model.onnx", "linger")


def test_another_epsilon_that_rounds_to_the_same_number_is_exported(tmp_path):
    x = torch.randn(2, 8) * 4
    model = quantized(nn.LayerNorm(8, eps=1e-6), x).eval()
    export_onnx(model, (x,), tmp_path / "model.onnx", "linger")
