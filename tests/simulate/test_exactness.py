"""Rule 1: the fake-quant evaluation forward equals the integer forward, bit for bit."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import (
    Chain,
    Lambda,
    ResNet,
    assert_integer_exact,
    images,
    site_of,
    train,
    trained,
)

IMAGE, LINE, CUBE, ROW = (3, 4, 8, 8), (3, 4, 12), (2, 4, 5, 6, 4), (6, 4)
Builder = Callable[[], nn.Module]


def _functional(function: Callable[..., Any], convs: int = 1) -> Builder:
    """Convolutions of the input, then a function of their results, then a convolution."""

    def forward(self: Any, x: Tensor) -> Any:
        return function(*(conv(x) for conv in self.convs))

    return lambda: Lambda(
        forward, convs=nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(convs))
    )


OPS: dict[str, tuple[Builder, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), LINE),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), IMAGE),
    "conv2d-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE),
    "conv3d": (lambda: nn.Conv3d(4, 2, 3, padding=1), CUBE),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), IMAGE),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 4, 2, 1), LINE),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), IMAGE),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 2, 2, 2), CUBE),
    "linear": (lambda: nn.Linear(4, 5), ROW),
    "linear-3d": (lambda: nn.Linear(12, 5), LINE),
    "batch_norm1d": (lambda: nn.BatchNorm1d(4), ROW),
    "batch_norm2d": (lambda: nn.BatchNorm2d(4), IMAGE),
    "batch_norm3d": (lambda: nn.BatchNorm3d(4, affine=False), CUBE),
    "relu": (_functional(F.relu), IMAGE),
    "relu6": (_functional(lambda a: F.relu6(a * 8)), IMAGE),
    "clamp": (_functional(lambda a: a.clamp(-0.3, 0.5)), IMAGE),
    "add": (_functional(lambda a, b: a + b * 0.1, 2), IMAGE),
    "add-number": (_functional(lambda a: a + 0.37), IMAGE),
    "add-broadcast": (_functional(lambda a, b: a + b.mean((2, 3), keepdim=True), 2), IMAGE),
    "sub": (_functional(lambda a, b: a - b, 2), IMAGE),
    "rsub": (_functional(lambda a: 0.6 - a), IMAGE),
    "mul": (_functional(lambda a, b: a * b, 2), IMAGE),
    "square": (_functional(lambda a: a * a), IMAGE),
    "mul-number": (_functional(lambda a: a * 0.37), IMAGE),
    "mul-negative": (_functional(lambda a: -3.3 * a), IMAGE),
    "cat": (_functional(lambda a, b: torch.cat([a, b * 0.2, a], 1), 2), IMAGE),
    "avg_pool": (_functional(lambda a: F.avg_pool2d(a, 3, 2, 1)), IMAGE),
    "avg_pool-ceil": (_functional(lambda a: F.avg_pool2d(a, 3, 2, 1, True, False)), IMAGE),
    "avg_pool-divisor": (_functional(lambda a: F.avg_pool2d(a, 2, divisor_override=3)), IMAGE),
    "adaptive": (_functional(lambda a: F.adaptive_avg_pool2d(a, (2, 4))), IMAGE),
    "max_pool": (_functional(lambda a: F.max_pool2d(a, 3, 2, 1)), IMAGE),
    "mean": (_functional(lambda a: a.mean((1, 3))), IMAGE),
    "pad": (_functional(lambda a: F.pad(a, (1, 2, 0, 1))), IMAGE),
    "pad-value": (_functional(lambda a: F.pad(a, (1, 2), value=0.3)), IMAGE),
    "pad-reflect": (_functional(lambda a: F.pad(a, (1, 2, 1, 1), mode="reflect")), IMAGE),
    "shape": (
        _functional(lambda a: a.flatten(2).transpose(1, 2).unsqueeze(1).squeeze(1)[:, 2:]),
        IMAGE,
    ),
    "chunk": (_functional(lambda a: torch.cat(a.chunk(2, 1)[::-1], 1) + a), IMAGE),
    "split": (_functional(lambda a: [p * 2 for p in a.split([1, 3], 1)]), IMAGE),
    "permute": (_functional(lambda a: F.linear(a.permute(0, 2, 3, 1), torch.eye(4) * 0.7)), IMAGE),
    "reshape": (_functional(lambda a: a.reshape(3, -1).view(3, 4, 64).mean(2)), IMAGE),
    "dropout": (_functional(lambda a: F.dropout(a, 0.5, training=False) * 2), IMAGE),
    "unknown": (_functional(lambda a: torch.tanh(a) * a + a.abs()), IMAGE),
    "maximum": (_functional(lambda a, b: torch.maximum(a, b) + a, 2), IMAGE),
}
# platform, weight bits, activation bits, output bits
GROUPS: dict[str, list[tuple[str, int, int, int | None]]] = {
    "4-bit": [("venusa", 4, 4, o) for o in (8, 16, 32, None)],
    "8-bit": [("venusa", 8, 8, o) for o in (8, 16, 32, None)],
    "16-bit": [("venusa", 16, 16, o) for o in (8, 16, None)],
    "16-bit-accumulator": [("venusa", 16, 16, 32)],
    "mixed": [
        *[("venusa", 4, 8, 8), ("venusa", 8, 16, 8), ("venusa", 16, 4, 4), ("venusa", 2, 2, 2)],
        *[("venusa", 3, 5, 7), ("venusa", 8, 4, 16), ("venusa", 4, 8, None)],
    ],
    "others": [
        (platform, *bits)
        for platform in ("arcs", "venus", "mars")
        for bits in ((4, 4, 8), (8, 8, 8), (16, 16, 16), (8, 8, None), (8, 8, 32))
    ],
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("op", OPS)
def test_op(op: str, group: str) -> None:
    """Every platform and width for one op."""
    build, shape = OPS[op]
    layer = build()
    scale = torch.exp2(torch.randint(-3, 4, (1,))).item()
    x = torch.randn(shape) * scale
    model = linger.prepare(Chain(layer), (x,))
    for platform, weight_bits, activation_bits, output_bits in GROUPS[group]:
        config = QuantConfig(
            platform=platform,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            output_bits=output_bits,
        )
        linger.quantize(model, config)
        train(model, (x,), 1, 0.0)
        model.eval()
        try:
            assert_integer_exact(model, x)
            assert_integer_exact(model, x * 40)
        except AssertionError as error:
            pytest.fail(f"{(platform, weight_bits, activation_bits, output_bits)}: {error}")


@pytest.mark.parametrize("fold", [None, "running", "batch", "frozen"])
@pytest.mark.parametrize(
    "bits", [(8, 8, 8), (4, 8, 8), (8, 16, 16), (16, 16, 16), (8, 8, None)], ids=str
)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_residual_network(fold: str | None, bits: tuple[int, int, Any], granularity: str) -> None:
    config = QuantConfig(
        weight_bits=bits[0], activation_bits=bits[1], output_bits=bits[2], granularity=granularity
    )
    x = images()
    model = trained(ResNet(dropout=0.2), x, config=config, fold=fold, steps=4, lr=0.02)
    assert_integer_exact(model, x)
    assert_integer_exact(model, x * 100)


@pytest.mark.parametrize("kind", ["ema_minmax", "absmax", "minmax", 2.7])
@pytest.mark.parametrize("rounding", ["half_up", "half_even", "half_away", "floor", "ceil"])
def test_range_kinds_and_roundings(kind: Any, rounding: str) -> None:
    x = images()
    model = trained(
        ResNet(), x, config=QuantConfig(range=kind, rounding=rounding), fold="running", steps=2
    )
    assert_integer_exact(model, x)


# --- random networks --------------------------------------------------------------------------


class Random(nn.Module):
    """A network drawn step by step; each step appends a value that later ones may read."""

    def __init__(self, steps: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.plan: list[Callable[[list[Tensor]], Tensor]] = []
        for step in steps:
            self.plan.append(step[0])
            for layer in step[1:]:
                self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.plan:
            values.append(step(values))
        return values[-1], values[len(values) // 2]


@st.composite
def networks(draw: Any) -> tuple[nn.Module, Tensor]:
    """A random network with an input for it."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dims = draw(st.sampled_from([1, 2]))
    shapes: list[tuple[int, ...]] = [
        (
            draw(st.integers(2, 3)),
            draw(st.sampled_from([2, 4])),
            *([draw(st.integers(6, 9))] * dims),
        )
    ]
    steps: list[tuple[Any, ...]] = []
    kinds = [
        *("conv", "conv", "conv_bn", "conv_bn_relu", "transpose", "linear", "bn", "relu", "relu6"),
        *("clamp", "add", "add", "sub", "mul", "scale", "shift", "cat", "avg", "max", "adaptive"),
        *(
            "mean",
            "reshape",
            "permute",
            "squeeze",
            "slice",
            "chunk",
            "split",
            "pad",
            "dropout",
            "reuse",
        ),
    ]
    reusable: list[tuple[nn.Module, int]] = []

    def append(run: Callable[[list[Tensor]], Tensor], shape: Any, *layers: nn.Module) -> None:
        steps.append((run, *layers))
        shapes.append(tuple(shape))

    for number in range(draw(st.integers(3, 8))):
        kind = draw(st.sampled_from(kinds)) if number else draw(st.sampled_from(kinds[:5]))
        at = draw(st.integers(max(0, len(shapes) - 3), len(shapes) - 1))
        shape = shapes[at]
        n, c, *size = shape
        spatial = len(size) == dims and min(size, default=0) >= 1
        if kind in ("conv", "conv_bn", "conv_bn_relu") and spatial:
            k, s = draw(st.integers(1, 3)), draw(st.integers(1, 2))
            groups = draw(st.sampled_from([1, c])) if c <= 8 else 1
            out = draw(st.sampled_from([1, 2])) * c if groups > 1 else draw(st.sampled_from([2, 4]))
            conv = getattr(nn, f"Conv{dims}d")(
                c, out, k, s, k // 2, groups=groups, bias=draw(st.booleans())
            )
            new = [(w + 2 * (k // 2) - k) // s + 1 for w in size]
            layers = [conv]
            if kind != "conv":
                bn = getattr(nn, f"BatchNorm{dims}d")(out)
                nn.init.uniform_(bn.weight, -1.5, 1.5)
                nn.init.normal_(bn.bias)
                layers.append(bn)
            elif s == 1 and out == c and new == size:
                reusable.append((conv, c))
            if kind == "conv_bn_relu":
                layers.append(nn.ReLU(inplace=True))
            net = nn.Sequential(*layers)
            append(lambda v, a=at, m=net: m(v[a]), (n, out, *new), net)
        elif kind == "transpose" and spatial:
            conv = getattr(nn, f"ConvTranspose{dims}d")(c, 2, 2, 2, bias=draw(st.booleans()))
            append(lambda v, a=at, m=conv: m(v[a]), (n, 2, *[2 * w for w in size]), conv)
        elif kind == "linear":
            out = draw(st.integers(1, 5))
            fc = nn.Linear(shape[-1], out, bias=draw(st.booleans()))
            append(lambda v, a=at, m=fc: m(v[a]), (*shape[:-1], out), fc)
        elif kind == "bn" and len(shape) == 2 + dims and math.prod(size) * n > 1:
            bn = getattr(nn, f"BatchNorm{dims}d")(c)
            append(lambda v, a=at, m=bn: m(v[a]), shape, bn)
        elif kind == "reuse" and reusable:
            conv, channels = draw(st.sampled_from(reusable))
            if spatial and c == channels:
                append(lambda v, a=at, m=conv: m(v[a]), _same(conv, shape))
        elif kind in ("relu", "relu6"):
            function = getattr(F, kind)
            append(lambda v, a=at, f=function: f(v[a]), shape)
        elif kind == "clamp":
            low = draw(st.sampled_from([-1.0, -0.25, 0.0]))
            append(lambda v, a=at, b=low: v[a].clamp(b, 0.7), shape)
        elif kind in ("add", "sub", "mul"):
            others = [i for i, other in enumerate(shapes) if other == shape]
            other = draw(st.sampled_from(others))
            function = getattr(torch, kind)
            append(lambda v, a=at, b=other, f=function: f(v[a], v[b]), shape)
        elif kind == "scale":
            factor = draw(st.sampled_from([0.5, 2.0, 0.37, -1.3, 3.0]))
            append(lambda v, a=at, f=factor: v[a] * f, shape)
        elif kind == "shift":
            offset = draw(st.sampled_from([1.0, -0.3, 0.05]))
            append(lambda v, a=at, f=offset: f - v[a] if f > 0 else v[a] + f, shape)
        elif kind == "cat" and c <= 8:
            others = [i for i, o in enumerate(shapes) if o[:1] + o[2:] == shape[:1] + shape[2:]]
            other = draw(st.sampled_from(others))
            total = c + shapes[other][1]
            append(lambda v, a=at, b=other: torch.cat([v[a], v[b]], 1), (n, total, *size))
        elif kind in ("avg", "max") and spatial and min(size) >= 2:
            k, pad = draw(st.sampled_from([(2, 0), (2, 1), (3, 1)]))
            pool = getattr(F, f"{kind}_pool{dims}d")
            if min(size) + 2 * pad >= k:
                new = [(w + 2 * pad - k) // 2 + 1 for w in size]
                append(lambda v, a=at, f=pool, k=k, p=pad: f(v[a], k, 2, p), (n, c, *new))
        elif kind == "adaptive" and spatial and size[0] % 2 == 0:
            pool = getattr(F, f"adaptive_avg_pool{dims}d")
            append(lambda v, a=at, f=pool: f(v[a], 2), (n, c, *([2] * dims)))
        elif kind == "mean" and len(shape) > 2:
            append(lambda v, a=at: v[a].mean(-1), shape[:-1])
        elif kind == "reshape":
            append(lambda v, a=at: v[a].flatten(1), (n, math.prod(shape[1:])))
        elif kind == "permute" and len(shape) > 2:
            append(lambda v, a=at: v[a].transpose(1, -1), (n, shape[-1], *shape[2:-1], c))
        elif kind == "squeeze":
            append(lambda v, a=at: v[a].unsqueeze(1).squeeze(1).contiguous(), shape)
        elif kind == "slice" and shape[-1] > 1:
            append(lambda v, a=at: v[a][..., 1:], (*shape[:-1], shape[-1] - 1))
        elif kind == "chunk" and c % 2 == 0:
            append(lambda v, a=at: v[a].chunk(2, 1)[1], (n, c // 2, *size))
        elif kind == "split" and c > 1:
            append(lambda v, a=at, c=c: torch.split(v[a], [1, c - 1], 1)[1], (n, c - 1, *size))
        elif kind == "pad":
            value = draw(st.sampled_from([0.0, 0.4]))
            append(
                lambda v, a=at, b=value: F.pad(v[a], (1, 0), value=b), (*shape[:-1], shape[-1] + 1)
            )
        elif kind == "dropout":
            drop = nn.Dropout(0.3)
            append(lambda v, a=at, m=drop: m(v[a]), shape, drop)
    return Random(steps), torch.randn(shapes[0]) * draw(st.sampled_from([0.05, 1.0, 20.0]))


def _same(conv: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(conv(torch.zeros(shape)).shape)


@settings(max_examples=120)
@given(
    network=networks(),
    bits=st.sampled_from(
        [
            (8, 8, 8),
            (8, 8, 8),
            (4, 8, 8),
            (8, 8, 16),
            (8, 16, 16),
            (16, 16, 16),
            (4, 4, 4),
            (8, 8, None),
        ]
    ),
    fold=st.sampled_from([None, "running", "batch"]),
    normalized=st.booleans(),
)
def test_random_networks(
    network: tuple[nn.Module, Tensor],
    bits: tuple[int, int, Any],
    fold: str | None,
    normalized: bool,
) -> None:
    model, x = network
    with torch.no_grad():
        reference = model.eval()(x)
    model.train()
    linger.prepare(model, (x,))
    if fold:
        linger.fuse_bn(model, mode=fold)
    if normalized:
        linger.normalize(model)
    linger.quantize(
        model, QuantConfig(weight_bits=bits[0], activation_bits=bits[1], output_bits=bits[2])
    )
    train(model, (x,), 2, 0.0)
    model.eval()
    found = model(x)
    assert [t.shape for t in found] == [t.shape for t in reference]
    assert_integer_exact(model, x)
    assert_integer_exact(model, torch.flip(x, (0,)) * 3)


# --- accumulators beyond float32 --------------------------------------------------------------


def _at_the_extremes(
    model: nn.Module, layer: nn.Module, x: Tensor, bits: tuple[int, int]
) -> Tensor:
    """Weights and inputs at the ends of their ranges, signs aligned; returns the input."""
    with torch.no_grad():
        sign = torch.where(torch.rand_like(layer.weight) < 0.02, -1.0, 1.0)
        layer.weight.copy_(sign * (1 - 2.0 ** (1 - bits[0])))
        layer.weight.flatten()[0] = -1.0
        if layer.bias is not None:
            layer.bias.copy_(torch.linspace(-1, 1, layer.bias.numel()))
    return torch.where(torch.rand_like(x) < 0.02, -1.0, 1 - 2.0 ** (1 - bits[1]))


WIDE: dict[str, tuple[Builder, tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(256, 3, 3), (1, 256, 5, 5)),
    "linear": (lambda: nn.Linear(5000, 4), (3, 5000)),
    "transposed": (lambda: nn.ConvTranspose1d(600, 3, 5), (1, 600, 6)),
}


@pytest.mark.parametrize("bits", [(8, 8), (8, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("output_bits", [8, 16, 32, None])
@pytest.mark.parametrize("kind", WIDE)
def test_wide_accumulators(kind: str, output_bits: int | None, bits: tuple[int, int]) -> None:
    """More products than float32 can add: compared with int64 arithmetic."""
    build, shape = WIDE[kind]
    model = Chain(build())
    layer: Any = model.net[0]
    x = _at_the_extremes(model, layer, torch.empty(shape), bits)
    config = QuantConfig(
        weight_bits=bits[0], activation_bits=bits[1], output_bits=output_bits, range="absmax"
    )
    trained(model, x, config=config, steps=1)
    step_x, step_w = 2.0 ** (1 - bits[1]), 2.0 ** (1 - bits[0])
    acc = _reference(layer, x, step_x, step_w)
    assert acc.abs().max() > 2**24
    if output_bits is None or output_bits == 32:
        saturated = acc.clamp(-(2**31), 2**31 - 1) if output_bits == 32 else acc
        expected = (saturated.double() * step_x * step_w).float()
    else:
        step = site_of(model, "net.0/" + _kind_of(layer) + "/0").output.step()
        shift = int(math.log2(step / (step_x * step_w)))
        assert shift > 0
        top = 2 ** (output_bits - 1)
        codes = ((acc + (1 << (shift - 1))) >> shift).clamp(-top, top - 1)
        expected = codes.float() * step
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with linger.integer(model), torch.no_grad():
        assert torch.equal(model(x), expected)


def _kind_of(layer: nn.Module) -> str:
    return {"Conv2d": "conv2d", "Linear": "linear", "ConvTranspose1d": "conv_transpose1d"}[
        type(layer).__name__
    ]


def _reference(layer: Any, x: Tensor, step_x: float, step_w: float) -> Tensor:
    """The accumulator in int64: float64 holds each partial sum below 2^53 exactly."""
    codes_x = (x.double() / step_x).round()
    codes_w = (layer.weight.detach().double() / step_w).round()
    bias = torch.floor(layer.bias.detach().double() / (step_x * step_w) + 0.5)
    if isinstance(layer, nn.Linear):
        acc = codes_x.long() @ codes_w.long().T + bias.long()
    elif isinstance(layer, nn.Conv2d):
        columns = F.unfold(codes_x, layer.kernel_size).long()
        acc = codes_w.long().flatten(1) @ columns + bias.long().view(-1, 1)
        acc = acc.view(x.shape[0], -1, *(n - 2 for n in x.shape[2:]))
    else:
        acc = F.conv_transpose1d(codes_x, codes_w, bias).long()
    return acc


def test_a_product_of_16_bit_operands() -> None:
    x = torch.linspace(-1, 1, 3 * 4 * 64).view(3, 4, 8, 8)
    model = Lambda(
        lambda self, x: self.a(x) * self.b(x), a=nn.Conv2d(4, 8, 1), b=nn.Conv2d(4, 8, 1)
    )
    trained(model, x, config=QuantConfig(weight_bits=16, activation_bits=16, output_bits=16))
    assert_integer_exact(model, x)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_mean_over_a_large_image(bits: int) -> None:
    x = torch.rand(1, 2, 800, 800) * 0.3 + 0.7
    model = Lambda(
        lambda self, x: self.a(x).mean((2, 3)), a=nn.Conv2d(2, 2, 1, groups=2, bias=False)
    )
    nn.init.ones_(model.a.weight)
    trained(model, x, config=QuantConfig(activation_bits=bits, output_bits=bits), steps=1)
    assert_integer_exact(model, x)


@pytest.mark.parametrize("function", [F.avg_pool2d, F.adaptive_avg_pool2d], ids=["avg", "adaptive"])
def test_a_pool_over_a_large_window(function: Any) -> None:
    x = torch.rand(1, 2, 600, 600) * 0.3 + 0.7
    argument = 600 if function is F.avg_pool2d else 1
    model = Lambda(lambda self, x: function(self.a(x), argument), a=nn.Conv2d(2, 2, 1, bias=False))
    nn.init.ones_(model.a.weight)
    trained(model, x, steps=1)
    assert_integer_exact(model, x)


@pytest.mark.parametrize("steps", [1e-9, 1e-4, 1e4, 1e9], ids=str)
def test_extreme_magnitudes(steps: float) -> None:
    """Exponents at the ends of what a register can shift."""
    x = torch.randn(16, 4) * steps
    model = trained(Chain(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), x)
    assert_integer_exact(model, x)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
def test_large_biases(scale: float) -> None:
    x = torch.randn(16, 4) * 0.01
    model = Chain(nn.Linear(4, 5), nn.Linear(5, 3))
    with torch.no_grad():
        model.net[0].bias.mul_(scale)
    trained(model, x)
    assert_integer_exact(model, x)
    if scale < 1e6:  # beyond, the codes of the bias saturate
        expected = F.linear(x, model.net[0].weight, model.net[0].bias)
        torch.testing.assert_close(model.net[0](x), expected, rtol=0.02, atol=0.02 * scale)


# --- free scales ------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [None, "running"])
def test_free_scales_differ_by_ties_only(fold: str | None) -> None:
    x = images()
    model = trained(
        ResNet(), x, config=QuantConfig(platform="onnxruntime"), fold=fold, steps=3, lr=0.02
    )
    with torch.no_grad():
        fake = model(x)
        with linger.integer(model):
            whole = model(x)
    step = float(site_of(model, "fc/linear/0").output.step())
    codes = ((fake - whole) / step).round().abs()
    assert codes.max() <= 1
    assert (codes > 0).float().mean() < 0.05


def test_grad_mode_does_not_change_the_result() -> None:
    x = images()
    model = trained(ResNet(), x, fold="running", steps=3, lr=0.02)
    with torch.no_grad():
        quiet = model(x)
    assert torch.equal(model(x), quiet)
    with torch.inference_mode():
        assert torch.equal(model(x), quiet)
    y = model(x.requires_grad_())
    y.sum().backward()
    assert model.stem.weight.grad is not None
    assert x.grad.any()


def test_values_between_sites_are_integers() -> None:
    x = images()
    model = trained(ResNet(), x, fold="running")
    dtypes = []
    instrumentation_of(model).tap = lambda event: dtypes.append(event.result.dtype)
    with torch.no_grad(), linger.integer(model):
        model(x)
    instrumentation_of(model).tap = None
    assert len(dtypes) == 20
    assert set(dtypes) == {torch.int8}


def test_a_bias_that_does_not_fit_its_codes() -> None:
    """Fine steps of 16-bit operands: the code of a bias saturates, it does not wrap around."""
    x = torch.randn(16, 4) * 0.01
    model = Chain(nn.Linear(4, 5))
    with torch.no_grad():
        model.net[0].bias.copy_(torch.linspace(-1, 1, 5))
    config = QuantConfig(weight_bits=16, activation_bits=16, output_bits=16)
    trained(model, x, config=config)
    assert_integer_exact(model, x)
    expected = F.linear(x, model.net[0].weight, model.net[0].bias)
    assert torch.equal(model(x).sign()[:, [0, -1]], expected.sign()[:, [0, -1]])
