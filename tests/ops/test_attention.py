"""Attention: every step against Python integers, what masks promise, and where it is met."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.integer import code_limits, payload_dtype
from lightning_linger.core.payload import real_values
from lightning_linger.core.tags import tag_of
from lightning_linger.export import OnnxIntegerRunner, export_onnx
from lightning_linger.ops.attention.steps import integer_add_mask
from lightning_linger.ops.softmax import integer_softmax
from tests.models import Lambda, assert_integer_exact, keys, site_of, train

KEY = "/scaled_dot_product_attention/0"
LAYER = "/multi_head_attention_forward/0"


def nearest(value: Fraction, rounding: str) -> int:
    return round(value) if rounding == "half_even" else math.floor(value + Fraction(1, 2))


def clamped(code: int, bits: int) -> int:
    low, high = code_limits(bits)
    return max(low, min(high, code))


# --- the mask kernel --------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    bits=st.sampled_from([4, 8, 16]),
    exponent=st.integers(-9, 0),
    codes=st.lists(st.integers(-40000, 40000), min_size=4, max_size=4),
    mask=st.lists(
        st.one_of(st.floats(-300, 300, width=32), st.sampled_from([-math.inf, -1e9, -1000.0, 0.0])),
        min_size=4,
        max_size=4,
    ),
)
def test_add_mask_like_integers(bits, exponent, codes, mask):
    codes = [clamped(code, bits) for code in codes]
    scale = 2.0**exponent
    found = integer_add_mask(
        torch.tensor(codes, dtype=payload_dtype(bits)),
        torch.tensor(mask),
        scale,
        bits,
        "half_up",
        "venusa",
    )
    expected = []
    for code, value in zip(codes, mask, strict=True):
        if value <= -1000:
            expected.append(code_limits(bits)[0])
        else:
            added = clamped(nearest(Fraction(value) / Fraction(scale), "half_up"), bits)
            expected.append(clamped(code + added, bits))
    assert found.dtype == payload_dtype(bits)
    assert found.tolist() == expected


# --- all steps of one call --------------------------------------------------------------------


def model_of(width: int = 6, **fields) -> nn.Module:
    """Attention of one head among the results of three layers."""
    layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        given = {"attn_mask": mask[0]} if mask else {}
        parts = (layer(x) for layer in self.layers)
        return F.scaled_dot_product_attention(*parts, **given, **fields)

    return Lambda(forward, layers=layers)


def quantized(model: nn.Module, inputs: tuple, bits: int = 8, platform: str = "venusa"):
    linger.prepare(model, inputs)
    config = QuantConfig(
        platform=platform, weight_bits=bits, activation_bits=bits, output_bits=bits
    )
    linger.quantize(model, config)
    train(model, inputs, 2, 0.0)
    model.eval()
    return model


def events_of(model: nn.Module, *inputs: Tensor) -> list:
    found = []
    instrumentation = instrumentation_of(model)
    instrumentation.tap = found.append
    with torch.no_grad(), linger.integer(model):
        model(*inputs)
    instrumentation.tap = None
    return found


def whole(x: Tensor) -> np.ndarray:
    return x.numpy().astype(object)


def rescaled(acc: np.ndarray, ratio: Fraction, bits: int) -> np.ndarray:
    return np.vectorize(lambda n: clamped(nearest(n * ratio, "half_up"), bits), otypes=[object])(
        acc
    )


@pytest.mark.parametrize("mask", ["none", "causal", "bias", "boolean"])
@pytest.mark.parametrize("bits", [5, 8, 16])
@pytest.mark.parametrize("width", [4, 6])
def test_steps_like_integers(width, bits, mask):
    """Width 4 has a scale of 1/2, width 6 one that is no power of two."""
    torch.manual_seed(width * bits)
    x = torch.randn(2, 5, width) * 2.0
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    bias = torch.randn(5, 5).masked_fill(~allowed, -math.inf)
    masks = {"none": (), "causal": (), "bias": (bias,), "boolean": (allowed,)}[mask]
    model = quantized(model_of(width, is_causal=mask == "causal"), (x, *masks), bits)
    *_, event = events_of(model, x, *masks)
    site, (q, k, v) = event.site, event.call[:3]
    step_q, step_k, step_v = (Fraction(float(tag_of(t).step)) for t in (q, k, v))
    scores_step = Fraction(float(site.part("scores").step()))
    low, high = code_limits(bits)
    codes_q = whole(q)
    if width == 4:
        step_q /= 2
    else:
        # 1/sqrt(6) = 0.408: a constant between 1/4 and 1/2 on the grid of its width.
        unit = Fraction(1, 2) / 2 ** (bits - 1)
        constant = min(round(Fraction(1 / math.sqrt(6)) / unit), high)
        codes_q = rescaled(codes_q * constant, unit * 2, bits)
        step_q /= 2
    acc = np.matmul(codes_q, whole(k).swapaxes(1, 2))
    scores = rescaled(acc, step_q * step_k / scores_step, bits)
    if mask == "bias":
        added = [
            [
                clamped(nearest(Fraction(float(b)) / scores_step, "half_up"), bits) if a else 0
                for a, b in zip(allows, row, strict=True)
            ]
            for allows, row in zip(allowed, bias, strict=True)
        ]
        total = scores + np.array(added, dtype=object)
        scores = np.vectorize(lambda n: clamped(n, bits), otypes=[object])(total)
    if mask != "none":
        scores = np.where(allowed.numpy(), scores, low)
    probabilities = integer_softmax(
        torch.from_numpy(scores.astype(np.int64)).to(payload_dtype(bits)),
        2,
        float(scores_step),
        bits,
        2.0 ** (1 - bits),
        bits,
        low,
        high,
        "half_up",
        "venusa",
    )
    acc = np.matmul(whole(probabilities), whole(v))
    ratio = step_v / 2 ** (bits - 1) / Fraction(float(site.output.step()))
    expected = rescaled(acc, ratio, bits)
    assert np.array_equal(whole(event.result), expected)


# --- what masks promise -----------------------------------------------------------------------


def far(x: Tensor) -> Tensor:
    """The same beginning with another end, far outside the range."""
    changed = x.clone()
    changed[:, 3:] = torch.randn_like(changed[:, 3:]) * 50.0
    return changed


@pytest.mark.parametrize("platform", ["venusa", "arcs", "venus", "onnxruntime"])
@pytest.mark.parametrize("bits", [8, 16])
def test_nothing_reaches_back_through_a_causal_mask(platform, bits):
    x = torch.randn(2, 5, 6)
    model = quantized(model_of(is_causal=True), (x,), bits, platform)
    with torch.no_grad():
        assert torch.equal(model(x)[:, :3], model(far(x))[:, :3])
        assert not torch.equal(model(x)[:, 3:], model(far(x))[:, 3:])


@pytest.mark.parametrize("bits", [8, 16])
def test_padding_reaches_nothing(bits):
    model = nn.MultiheadAttention(6, 2, batch_first=True)
    x, padding = torch.randn(2, 5, 6), torch.tensor([[False] * 3 + [True] * 2] * 2)
    function = lambda self, x, mask: self.layer(x[:, :3], x, x, key_padding_mask=mask)  # noqa: E731
    model = quantized(Lambda(function, layer=model), (x, padding), bits)
    with torch.no_grad():
        (one, weights), (other, _) = model(x, padding), model(far(x), padding)
    assert weights[:, :, 3:].eq(0.0).all()
    assert torch.equal(one, other)


def test_the_first_of_a_causal_row_is_its_own_value():
    """One place that counts gets all the weight, however low its score."""
    x = torch.randn(2, 40, 6)
    model = quantized(model_of(is_causal=True), (x,), 16)
    *_, event = events_of(model, x)
    value = real_values(event.call.value)[:, 0]
    result = real_values(event.result)[:, 0]
    step = float(event.site.output.step())
    assert (result - value).abs().max() <= 2.0**-15 * value.abs().max() + step


def test_a_row_that_is_all_masked_is_the_mean():
    x = torch.randn(1, 4, 6)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 0] = True
    model = quantized(model_of(), (x, mask), 16)
    *_, event = events_of(model, x, mask)
    found = real_values(event.result)[0, 2]
    torch.testing.assert_close(found, real_values(event.call.value)[0].mean(0), atol=1e-3, rtol=0)


# --- where it is met --------------------------------------------------------------------------


CONTEXTS = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


def kinds_that_ran(mode: str, model: nn.Module, *args, **kwargs) -> list[str]:
    """The kinds of the sites that ran quantized in a mode."""
    found: list[str] = []
    model.train(mode == "train")
    instrumentation = instrumentation_of(model)
    instrumentation.tap = lambda event: (
        found.append(event.site.op.kind) if event.site.system() == "fake" else None
    )
    with CONTEXTS.get(mode, torch.enable_grad)():
        model(*args, **kwargs)
    instrumentation.tap = None
    return found


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_no_fast_path_hides_the_layer(mode, frozen, padded):
    """In evaluation torch has fused forms of whole layers, and of padding as nested tensors."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    model.requires_grad_(not frozen)
    x = torch.randn(2, 5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    kwargs = {"src_key_padding_mask": padding} if padded else {}
    linger.prepare(model, (x,), kwargs)
    linger.quantize(model)
    model(x, **kwargs)
    found = kinds_that_ran(mode, model, x, **kwargs)
    assert found.count("multi_head_attention_forward") == 2
    assert found.count("linear") == 4


def test_self_attention_has_one_input():
    model = nn.MultiheadAttention(6, 2)
    x = torch.randn(5, 2, 6)
    quantized(model, (x, x, x))
    assert list(site_of(model, LAYER).inputs) == ["0"]
    other = nn.MultiheadAttention(6, 2)
    quantized(other, (x, x.clone(), x.clone()))
    assert list(site_of(other, LAYER).inputs) == ["0", "1", "2"]
    assert keys(model) == [LAYER]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_results_have_the_shapes_of_torch(batch_first, average):
    model = nn.MultiheadAttention(6, 3, batch_first=batch_first, kdim=4, vdim=5)
    inputs = (torch.randn(2, 7, 6), torch.randn(2, 7, 4), torch.randn(2, 7, 5))
    run = Lambda(lambda self, *x: self.layer(*x, average_attn_weights=average), layer=model)
    expected = run(*inputs)
    found = quantized(run, inputs, 16)(*inputs)
    assert [y.shape for y in found] == [y.shape for y in expected]
    # 16 bits leave the float result's first digits alone.
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 2e-3 * b.abs().max()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"add_bias_kv": True}, "`add_bias_kv`"),
        ({"add_zero_attn": True}, "`add_zero_attn`"),
    ],
)
def test_rare_layers_are_refused(fields, reason):
    model = Lambda(
        lambda self, x: self.layer(self.linear(x), x, x)[0],
        layer=nn.MultiheadAttention(6, 2, **fields),
        linear=nn.Linear(6, 6),
    )
    x = torch.randn(5, 2, 6)
    quantized(model, (x,))
    site = site_of(model, "layer/multi_head_attention_forward/0")
    assert reason in site.why_float
    assert_integer_exact(model, x)


def test_a_negative_scale_is_refused():
    x = torch.randn(2, 5, 6)
    model = quantized(model_of(scale=-1.0), (x,))
    assert "must be positive" in site_of(model, KEY).why_float


# --- training ---------------------------------------------------------------------------------


def test_dropout_acts_in_training_only():
    x = torch.randn(2, 5, 6)
    model = quantized(model_of(dropout_p=0.5), (x,))
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_parameter_learns(granularity):
    model = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    linger.prepare(model, (x, memory))
    linger.quantize(model, QuantConfig(granularity=granularity))
    (model(x, memory) * torch.randn(2, 5, 8)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    for name in ("self_attn", "multihead_attn"):
        assert getattr(model, name).in_proj_weight.grad.abs().amax(1).gt(0).float().mean() > 0.9


def test_a_learned_bias_gets_the_gradient_of_the_scores():
    x = torch.randn(2, 5, 6)
    model = model_of()
    model.bias = nn.Parameter(torch.zeros(5, 5))
    run = Lambda(lambda self, x: self.inner(x, self.inner.bias), inner=model)
    cotangent = torch.randn(2, 5, 6)
    (expected,) = torch.autograd.grad((run(x) * cotangent).sum(), model.bias)
    quantized(run, (x,), 16)
    run.train()
    (run(x) * cotangent).sum().backward()
    assert (model.bias.grad - expected).abs().max() <= 0.02 * expected.abs().max()


# --- export -----------------------------------------------------------------------------------


def test_the_exported_steps_are_those_of_the_engine(tmp_path):
    model = Lambda(
        lambda self, x: self.layer(*[self.linear(x)] * 3, is_causal=True, attn_mask=mask)[0],
        linear=nn.Linear(6, 6),
        layer=nn.MultiheadAttention(6, 2, batch_first=True),
    )
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    x = torch.randn(2, 5, 6)
    quantized(model, (x,))
    runner = OnnxIntegerRunner(export_onnx(model, (x,), tmp_path / "model.onnx", "linger"))
    own = [n for n in runner.model.graph.node if n.name.startswith("layer/multi_head")]
    main = [n.op_type for n in own if n.op_type in ("QLinear", "QBmm", "QSoftmax", "QMul", "QAdd")]
    assert main == ["QLinear"] * 3 + ["QBmm", "QMul", "QAdd", "QSoftmax", "QBmm", "QLinear"]
    assert len({n.name for n in own}) == len(own)
    with torch.no_grad(), linger.integer(model):
        expected = model(x)
    (found,) = runner.run({runner.input_names[0]: x.numpy()}).values()
    assert np.array_equal(found, expected.numpy())


def test_a_computed_mask_names_the_way_out(tmp_path):
    x = torch.randn(2, 5, 6)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    model = quantized(model_of(), (x, mask))
    with pytest.raises(UnsupportedError, match="buffer of the model"):
        export_onnx(model, (x, mask), tmp_path / "model.onnx", "linger")
