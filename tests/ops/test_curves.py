"""Functions of one number: which kernel computes them where, and what the kernels give."""

import math
import random
from fractions import Fraction

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.integer import code_limits, payload_dtype
from lightning_linger.core.quantizer import Window
from lightning_linger.export import OnnxIntegerRunner, export_onnx
from lightning_linger.ops import luna
from lightning_linger.ops.curves import CURVES, integer_curve
from lightning_linger.ops.glu import integer_glu
from lightning_linger.ops.sign import integer_abs, integer_neg
from lightning_linger.ops.slopes import integer_prelu
from tests.models import Lambda, assert_integer_exact, site_of, train, trained
from tests.ops.test_harness import integer_results, run_linger, run_onnxruntime
from tests.ops.test_luna import MEASURED, rs, sat, segment_of, sigmoid_model, tanh_model

POWER_OF_TWO = ("venusa", "arcs", "venus", "mars")
GENERATION = {"venusa": "venusa", "arcs": "arcs", "mars": "arcs", "venus": "venus"}
MODELS = {"sigmoid": sigmoid_model, "tanh": tanh_model}


def codes_of(bits: int) -> Tensor:
    low, high = code_limits(bits)
    return torch.arange(low, high + 1).to(payload_dtype(bits))


def moved(x: int, fraction: int, wanted: int, bits: int) -> int:
    """A number with another fraction, saturated."""
    shift = fraction - wanted
    return sat(rs(x, shift) if shift > 0 else x << -shift, bits)


# --- the engines' own kernels -------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["arcs", "venusa", "mars"])
@pytest.mark.parametrize("exponent", range(13))
def test_8_bit_sigmoid_and_tanh_equal_the_engine(platform, exponent):
    with np.load(MEASURED) as measured:
        for function, name in (("sigmoid", "sigmoid_arcs"), ("tanh", "tanh_q27")):
            grids = (2.0**-exponent, 2.0**-7, 8, 8, -128, 127, platform)
            found = integer_curve(codes_of(8), function, *grids)
            assert found.dtype == torch.int8
            assert np.array_equal(found.numpy(), measured[f"{name}_int8in_q{exponent}"])


def test_venus_sigmoid_and_tanh_equal_the_engine_for_every_16_bit_operand():
    with np.load(MEASURED) as measured:
        for function in ("sigmoid", "tanh"):
            grids = (2.0**-11, 2.0**-7, 16, 8, -128, 127, "venus")
            found = integer_curve(codes_of(16), function, *grids)
            expected = measured[f"venus_luna_{function}_int8_q11_int16in"]
            assert np.array_equal(found.numpy(), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(POWER_OF_TWO),
    st.integers(-6, 28),
    st.integers(2, 16),
    st.booleans(),
)
def test_bounded_kernels_equal_the_model(function, platform, exponent, bits_x, positive):
    formats = luna.curves_of(GENERATION[platform])
    low = 0 if positive else -128
    codes = codes_of(bits_x)[:: max(1, 2**bits_x // 300)]
    expected = []
    for code in codes.tolist():
        operand = moved(code, exponent, formats.input_fraction, formats.input_bits)
        y = MODELS[function](operand, GENERATION[platform])
        expected.append(max(low, sat(rs(y, formats.output_fraction - 7), 8)))
    grids = (2.0**-exponent, 2.0**-7, bits_x, 8, low, 127, platform)
    assert integer_curve(codes, function, *grids).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["gelu", "silu"]),
    st.integers(-6, 28),
    st.integers(-6, 28),
    st.integers(2, 16),
    st.integers(2, 16),
)
def test_smooth_kernels_equal_the_model(function, exponent_x, exponent_o, bits_x, bits_o):
    table = {"gelu": luna._GELU, "silu": luna._SILU}[function]
    codes = codes_of(bits_x)[:: max(1, 2**bits_x // 300)]
    expected = []
    for code in codes.tolist():
        x = moved(code, exponent_x, 27, 32)
        j = segment_of(abs(x), table.bands)
        slope = table.mirrored[j] if x < 0 else table.slopes[j]
        y = sat(rs(x * slope + (table.offsets[j] << 30), 27), 32)
        expected.append(moved(y, 27, exponent_o, bits_o))
    grids = (2.0**-exponent_x, 2.0**-exponent_o, bits_x, bits_o, *code_limits(bits_o), "venusa")
    assert integer_curve(codes, function, *grids).tolist() == expected


@pytest.mark.parametrize("function", ["sigmoid", "tanh", "gelu", "silu"])
def test_many_codes_are_computed_like_few(function):
    codes = codes_of(8).repeat(3).reshape(3, 1, 256)
    grids = (2.0**-4, 2.0**-7, 8, 8, -128, 127, "venusa")
    found = integer_curve(codes, function, *grids)
    few = torch.cat([integer_curve(part, function, *grids) for part in codes.split(1)])
    assert found.shape == codes.shape
    assert torch.equal(found, few)


# --- the other kernels --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8, 13, 16])
def test_negation_and_absolute_value_saturate(bits):
    codes = codes_of(bits)
    top = code_limits(bits)[1]
    negated, absolute = (f(codes, 0.5, bits, "") for f in (integer_neg, integer_abs))
    assert negated.dtype == absolute.dtype == codes.dtype
    assert negated.tolist() == [min(-code, top) for code in codes.tolist()]
    assert absolute.tolist() == [min(abs(code), top) for code in codes.tolist()]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_prelu_equals_the_model(data):
    bits_x, bits_w, bits_o = (data.draw(st.integers(2, 16)) for _ in "xwo")
    channels = data.draw(st.integers(1, 3))
    draw = data.draw(st.randoms(use_true_random=False))
    exponent_x, exponent_w, exponent_o = (draw.randint(-2, 12) for _ in "xwo")
    slopes = [draw.randint(*code_limits(bits_w)) for _ in range(channels)]
    edges = code_limits(bits_x)
    rows = [[*edges, 0, 1, -1, draw.randint(*edges)] for _ in range(channels)]
    low, high = code_limits(bits_o)
    expected = []
    for slope, row in zip(slopes, rows, strict=True):
        for x in row:
            real = Fraction(x, 1) / Fraction(2) ** exponent_x
            if x < 0:
                real *= Fraction(slope, 1) / Fraction(2) ** exponent_w
            rounded = math.floor(real * Fraction(2) ** exponent_o + Fraction(1, 2))
            expected.append(max(low, min(high, rounded)))
    found = integer_prelu(
        torch.tensor([rows], dtype=payload_dtype(bits_x)),
        torch.tensor(slopes, dtype=payload_dtype(bits_w)),
        *(2.0**-exponent for exponent in (exponent_x, exponent_w, exponent_o)),
        *(bits_x, bits_w, bits_o, low, high, "half_up", "venusa"),
    )
    assert found.dtype == payload_dtype(bits_o)
    assert found.flatten().tolist() == expected


def glu_model(a: int, b: int, exponent_x: int, exponent_o: int, bits_o: int, platform: str) -> int:
    formats = luna.curves_of(GENERATION[platform])
    operand = moved(b, exponent_x, formats.input_fraction, formats.input_bits)
    opened = rs(sigmoid_model(operand, GENERATION[platform]), formats.output_fraction - 15)
    return sat(rs(a * opened, exponent_x + 15 - exponent_o), bits_o)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(POWER_OF_TWO),
    st.integers(2, 16),
    st.integers(2, 16),
    st.integers(-3, 14),
    st.integers(-3, 29),
    st.randoms(use_true_random=False),
)
@example("venusa", 16, 16, 12, 12, random.Random(0))
@example("arcs", 16, 16, 12, 12, random.Random(1))
@example("venus", 16, 16, 12, 12, random.Random(2))
def test_glu_equals_the_model(platform, bits_x, bits_o, exponent_x, exponent_o, draw):
    exponent_o = min(exponent_o, exponent_x + 15)
    low, high = code_limits(bits_x)
    linear = [low, high, *(draw.randint(low, high) for _ in range(60))]
    gate = [high, low, *(draw.randint(low, high) for _ in range(60))]
    expected = [
        glu_model(a, b, exponent_x, exponent_o, bits_o, platform)
        for a, b in zip(linear, gate, strict=True)
    ]
    x = torch.tensor([[linear], [gate]], dtype=payload_dtype(bits_x))
    grids = (2.0**-exponent_x, 2.0**-exponent_o, bits_x, bits_o, *code_limits(bits_o), platform)
    assert integer_glu(x, 0, *grids).flatten().tolist() == expected


# --- which kernel computes what -----------------------------------------------------------------


def after_linear(function, size=6):
    return Lambda(lambda self, x: function(self.fc(x)), fc=nn.Linear(size, size))


def kernels_of(model, inputs, kind):
    """The integer ops that a site of a kind calls."""
    called = []
    names = ("curve", "mul", "glu", "prelu", "lookup", "interpolate")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("curves", "glu", "table"):
            for name in (f"integer_{name}" for name in names):
                target = getattr(getattr(linger.ops, module), name, None)
                if target is not None:
                    patch.setattr(
                        f"lightning_linger.ops.{module}.{name}",
                        lambda *a, _f=target, _n=name, **k: (called.append(_n), _f(*a, **k))[1],
                    )
        with torch.no_grad(), linger.integer(model):
            model(*inputs)
    site = next(s for s in instrumentation_of(model).sites if s.op.kind == kind)
    assert site.quantized, site.why_float
    return called


@pytest.mark.parametrize(
    ("kind", "platform", "bits", "expected"),
    [
        *(("sigmoid", platform, (8, 8), "integer_curve") for platform in POWER_OF_TWO),
        *(("tanh", platform, (8, 8), "integer_curve") for platform in POWER_OF_TWO),
        ("sigmoid", "venus", (16, 8), "integer_curve"),
        ("sigmoid", "arcs", (16, 8), "integer_interpolate"),
        ("sigmoid", "arcs", (8, 16), "integer_lookup"),
        ("sigmoid", "venusa", (4, 8), "integer_curve"),
        ("sigmoid", "venusa", (4, 4), "integer_lookup"),
        ("sigmoid", "onnxruntime", (8, 8), "integer_lookup"),
        ("sigmoid", "onnxruntime", (16, 16), "integer_interpolate"),
        ("gelu", "venusa", (8, 8), "integer_curve"),
        ("gelu", "venusa", (16, 16), "integer_curve"),
        ("gelu", "arcs", (8, 8), "integer_lookup"),
        ("silu", "venusa", (8, 8), "integer_curve"),
        ("silu", "venus", (8, 8), "integer_lookup"),
        ("exp", "venusa", (8, 8), "integer_lookup"),
        ("leaky_relu", "venusa", (8, 8), "integer_prelu"),
        ("leaky_relu", "onnxruntime", (8, 8), "integer_lookup"),
        ("square", "venusa", (8, 8), "integer_mul"),
        ("square", "onnxruntime", (16, 16), "integer_mul"),
    ],
)
def test_the_engine_computes_what_it_has_and_a_table_the_rest(kind, platform, bits, expected):
    function = getattr(torch, kind, None) or getattr(F, kind)
    config = QuantConfig(platform=platform, activation_bits=bits[0], output_bits=bits[1])
    model = trained(after_linear(function), torch.randn(4, 6), config=config)
    assert kernels_of(model, (torch.randn(4, 6),), kind) == [expected]


def test_another_rounding_is_not_the_engines():
    config = QuantConfig(platform="arcs", rounding="half_even")
    for function, kind in ((torch.sigmoid, "sigmoid"), (F.glu, "glu")):
        model = trained(after_linear(function), torch.randn(4, 6), config=config)
        assert "integer_lookup" in kernels_of(model, (torch.randn(4, 6),), kind)
        assert_integer_exact(model, torch.randn(4, 6) * 5)


def test_approximate_gelu_is_a_table():
    model = trained(after_linear(lambda x: F.gelu(x, approximate="tanh")), torch.randn(4, 6))
    assert kernels_of(model, (torch.randn(4, 6),), "gelu") == ["integer_lookup"]


@pytest.mark.parametrize("platform", [*POWER_OF_TWO, "onnxruntime"])
def test_bounded_functions_have_a_fixed_scale(platform):
    model = trained(
        after_linear(lambda x: torch.sigmoid(x) + torch.tanh(x) + F.hardsigmoid(x)),
        torch.randn(4, 6),
        config=QuantConfig(platform=platform),
    )
    for key in ("/sigmoid/0", "/tanh/0", "/hardsigmoid/0"):
        step = float(site_of(model, key).output.step())
        assert step == (2.0**-7 if platform != "onnxruntime" else float(np.float32(1) / 127))


def test_a_switch_leaves_an_op_in_float_by_kind_or_by_site():
    function = after_linear(lambda x: torch.sigmoid(x) + torch.sigmoid(x + 1) * 2)
    for overrides, quantized in (
        ({"type:sigmoid": None}, [False, False]),
        ({"/sigmoid/1": None}, [True, False]),
        (None, [True, True]),
    ):
        model = trained(function, torch.randn(4, 6), overrides=overrides)
        sites = [site_of(model, f"/sigmoid/{i}") for i in range(2)]
        assert [site.quantized for site in sites] == quantized
        assert_integer_exact(model, torch.randn(4, 6))
        linger.strip(model)


# --- calls that have no integer form ------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "kind", "reason"),
    [
        (lambda x: torch.pow(x, x.abs()), "pow", "base and exponent are both computed"),
        (lambda x: torch.pow(-2.0, x), "pow", "powers of -2.0 have no integer form"),
        (lambda x: torch.exp(x, out=torch.empty(4, 6)), "exp", "`out=` has no integer form"),
        (lambda x: torch.neg(x, out=torch.empty(4, 6)), "neg", "`out=` has no integer form"),
    ],
)
def test_calls_without_an_integer_form_stay_float(function, kind, reason):
    def forward(x):
        with torch.no_grad():
            return function(x)

    model = after_linear(forward)
    linger.prepare(model, (torch.randn(4, 6),))
    linger.quantize(model)
    site = site_of(model, f"/{kind}/0")
    assert not site.quantized
    assert reason in site.why_float


@pytest.mark.parametrize(
    ("platform", "kind"),
    [
        *(("venusa", kind) for kind in ("sigmoid", "tanh", "gelu", "exp")),
        *(("arcs", kind) for kind in ("tanh", "silu", "mish")),
        ("venus", "gelu"),
    ],
)
def test_strict_platforms_refuse_what_the_engine_cannot_run(platform, kind):
    model = after_linear(getattr(torch, kind, None) or getattr(F, kind))
    linger.prepare(model, (torch.randn(4, 6),))
    with pytest.raises(UnsupportedError, match=f"cannot run {kind}. Use "):
        linger.quantize(model, QuantConfig(platform=platform, strict_platform=True))


@pytest.mark.parametrize("platform", ["arcs", "venus"])
def test_strict_platforms_take_a_sigmoid(platform):
    config = QuantConfig(platform=platform, strict_platform=True)
    model = trained(after_linear(torch.sigmoid), torch.randn(4, 6), config=config)
    assert site_of(model, "/sigmoid/0").quantized


# --- where a function has no value --------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
def test_poles_saturate_without_moving_the_range(platform, bits):
    x = torch.tensor([[-1.0, 0.0, 0.25, 0.5, 0.9, 1.0]])
    low, high = code_limits(bits)
    cases = {
        torch.log: (math.log(4), {0: low, 1: low}),
        torch.sqrt: (1.0, {0: 0, 1: 0}),
        torch.rsqrt: (2.0, {0: high, 1: high}),
        torch.reciprocal: (4.0, {1: high}),
        lambda v: v**-0.5: (2.0, {0: high, 1: high}),
    }
    for function, (reach, ends) in cases.items():
        identity = nn.Linear(6, 6, bias=False)
        identity.weight.data = torch.eye(6)
        model = Lambda(lambda self, v, f=function: f(self.fc(v)), fc=identity)
        config = QuantConfig(platform=platform, activation_bits=bits, output_bits=bits)
        linger.prepare(model, (x,))
        linger.quantize(model, config)
        model.train()
        operand = x.clone().requires_grad_()
        model(operand).sum().backward()
        assert torch.isfinite(operand.grad).all()
        assert torch.isfinite(identity.weight.grad).all()
        assert operand.grad[0, 1] == 0
        site = instrumentation_of(model).sites[-1]
        step = float(site.output.step())
        assert step <= 1.05 * reach / 2 ** (bits - 1) * (2 if platform == "venusa" else 1.02)
        model.eval()
        y = model(x).detach()
        for index, code in ends.items():
            assert round(y[0, index].item() / step) == code
        assert_integer_exact(model, x)


# --- gradients ----------------------------------------------------------------------------------


def test_slopes_of_prelu_are_trained_and_limited():
    model = nn.Sequential(nn.Linear(6, 6), nn.PReLU(6, 0.7))
    x = torch.randn(16, 6)
    model[0].requires_grad_(False)  # the gradient reaches the slopes without one of the operand
    linger.prepare(model, (x,))
    linger.normalize(model, weight=0.5, bias=None, output=None)
    linger.quantize(model)
    model.train()
    model(x).square().sum().backward()
    assert model[1].weight.grad is not None
    assert not model[1].weight.grad.any()  # all are beyond the limit
    model[1].weight.data.fill_(0.3)
    model(x).square().sum().backward()
    assert model[1].weight.grad.any()
    model[1].weight.data.fill_(0.7)
    model.eval()
    negative = model[0](x) < 0
    with torch.no_grad():
        y = model(x)
    linger.strip(model)
    assert torch.allclose(y[negative], 0.5 * model[0](x)[negative], atol=0.05)


def test_slopes_follow_their_weights_in_evaluation():
    model = trained(nn.Sequential(nn.Linear(6, 6), nn.PReLU()), torch.randn(4, 6))
    x = -10 * torch.rand(4, 6)
    with torch.no_grad():
        before = model(x)
        model[1].weight.fill_(-0.2)
        after = model(x)
    assert not torch.equal(before, after)
    assert_integer_exact(model, x)


def test_a_table_is_made_anew_when_its_scale_moves():
    model = after_linear(torch.exp)
    linger.prepare(model, (torch.randn(4, 6),))
    linger.quantize(model)
    for factor in (1.0, 4.0, 0.1):
        train(model, (torch.randn(4, 6) * factor,), 30, 0.0)
        model.eval()
        assert_integer_exact(model, torch.randn(4, 6) * factor)


def test_a_table_belongs_to_the_steps_of_its_operand():
    def forward(self, x):
        a, b = self.a(x), self.b(x) * 0.05
        return torch.exp(a if self.first else b)

    model = Lambda(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6), first=True)
    x = torch.randn(8, 6)
    linger.prepare(model, (x,))
    linger.quantize(model)
    for first in (True, False):
        model.first = first
        train(model, (x,), 2, 0.0)
    model.eval()
    for first in (True, False, True):  # one site, whose operand has another scale each time
        model.first = first
        assert_integer_exact(model, x)
        expected = torch.exp(model.a(x) if first else model.b(x) * 0.05)
        assert (model(x) - expected).abs().max() <= 0.25 * expected.abs().max()


def test_steps_that_cannot_be_read_round_the_float_function(monkeypatch):
    """As in training on a GPU: at most a code away from the kernel."""
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    model = trained(after_linear(lambda v: torch.log(v.abs() + 0.1) + F.silu(v)), x)
    exact = model(x).detach()
    steps = [float(site.output.step()) for site in instrumentation_of(model).sites if site.output]
    monkeypatch.setattr("lightning_linger.ops.kernel._has_readable_step", lambda x: False)
    rounded = model(x).detach()
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() <= 3 * max(steps)


# --- export -------------------------------------------------------------------------------------


def passing_codes() -> nn.Linear:
    """A layer whose result has exactly the codes of its operand, with power-of-two scales."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.501)  # 64 steps of 2^-7
    return layer


def every_function(x: Tensor) -> tuple[Tensor, ...]:
    results = []
    for kind in sorted(CURVES):
        function = getattr(torch, kind, None) or getattr(F, kind)
        numbers = {"threshold": (0.25, -0.5), "pow": (1.5,)}.get(kind, ())
        results.append(function(x, *numbers))
    return (x, *results, -x, x.abs(), x**3, 1.5**x, F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("scale", ["free", "power_of_two"])
def test_every_code_of_every_function_is_equal_in_onnxruntime(bits, scale, tmp_path):
    low, high = code_limits(bits)
    x = torch.arange(low, high + 1).float().unsqueeze(1) * 2.0 ** (3 - bits)
    model = Lambda(lambda self, v: every_function(self.fc(v)), fc=passing_codes())
    config = QuantConfig(
        platform="onnxruntime", activation_bits=bits, output_bits=bits, scale=scale
    )
    trained(model, x, config=config)
    expected = integer_results(model, (x,))
    missing = 2**bits - expected[0].unique().numel()
    assert missing <= (2**bits * 0.01 if scale == "free" else 0)
    path = export_onnx(model, (x,), tmp_path / "all.onnx", "qdq")
    for optimized in (True, False):
        found = run_onnxruntime(path, optimized, (x,))
        assert len(found) == len(expected)
        for index, (result, wanted) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(torch.from_numpy(result), wanted), index


@pytest.mark.parametrize("platform", ["venusa", "arcs", "venus"])
@pytest.mark.parametrize("reach", [0.01, 8.0, 100.0])
def test_every_code_of_a_sigmoid_is_equal_in_the_exported_graph(platform, reach, tmp_path):
    x = torch.arange(-128, 128).float().unsqueeze(1) * reach / 64
    model = Lambda(
        lambda self, v: (torch.sigmoid(self.fc(v)), torch.tanh(self.fc(v) + 0)),
        fc=passing_codes(),
    )
    trained(model, x, config=QuantConfig(platform=platform))
    path = export_onnx(model, (x,), tmp_path / "curves.onnx", "linger")
    expected = integer_results(model, (x,))
    for result, wanted in zip(run_linger(path, (x,)), expected, strict=True):
        assert torch.equal(torch.from_numpy(result), wanted)


def test_venus_widens_its_operand_and_saturates_before(tmp_path):
    def types(reach):
        x = torch.randn(8, 6) * reach
        model = trained(after_linear(torch.tanh), x, config=QuantConfig(platform="venus"))
        site_of(model, "fc/linear/0").output.window = Window()
        path = export_onnx(model, (x,), tmp_path / f"{reach}.onnx", "linger")
        return [node.op_type for node in onnx.load(path).graph.node]

    assert types(1.0) == ["Quant", "QLinear", "Requant", "QTanh", "Dequant"]
    assert types(500.0) == ["Quant", "QLinear", "Requant", "Requant", "QTanh", "Dequant"]


def test_a_wide_coarse_operand_is_refused_on_venus(tmp_path):
    x = torch.randn(8, 6) * 500
    config = QuantConfig(platform="venus", activation_bits=16, output_bits=16)
    model = trained(
        after_linear(torch.tanh), x, config=config, overrides={"type:tanh": {"output_bits": 8}}
    )
    with pytest.raises(UnsupportedError, match=r"`/tanh/0`.*of tanh of coarse 16-bit codes"):
        export_onnx(model, (x,), tmp_path / "wide.onnx", "linger")


def test_the_runner_takes_a_coarse_venus_operand_for_a_finer_one_as_the_engine_does():
    def run(scale):
        attributes = {"platform": "venus", "platform_quant": "luna_quant", "scale_o": 128.0}
        node = onnx.helper.make_node("iqSigmoid", ["x"], ["y"], scale_x=scale, **attributes)
        graph = onnx.helper.make_graph(
            [node],
            "g",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.INT16, [65536])],
            [onnx.ValueInfoProto(name="y")],
        )
        return OnnxIntegerRunner(onnx.helper.make_model(graph)).run({"x": codes_of(16).numpy()})[
            "y"
        ]

    assert np.array_equal(run(512.0), run(2048.0))
    assert not np.array_equal(run(4096.0), run(2048.0))


# --- captures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
def test_a_compiled_model_reads_the_tables_of_the_eager_one(platform):
    def forward(self, x):
        return F.prelu(torch.exp(self.a(x)) + 2.0 ** self.b(x), self.slope) - F.glu(self.c(x)) ** 2

    layers = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 12)}
    model = Lambda(forward, **layers, slope=nn.Parameter(torch.tensor([0.3])))
    x = torch.randn(8, 6)
    trained(model, x, config=QuantConfig(platform=platform))
    kinds = [site.op.kind for site in instrumentation_of(model).sites if site.quantized]
    found = sorted(kind for kind in kinds if kind != "linear")
    assert found == ["add", "exp", "glu", "pow", "pow", "prelu", "sub"]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        eager = model(x)
        assert torch.equal(compiled(x), eager)
    model.train()
    compiled(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_model_compiled_before_any_forward_rounds_the_float_function():
    x = torch.randn(8, 6)
    model = trained(after_linear(torch.exp), x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        first = compiled(x)
        step = float(site_of(model, "/exp/0").output.step())
        assert (first - model(x)).abs().max() <= step
