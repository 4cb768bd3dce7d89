"""Sums, products, pools, means and what keeps its scale on the ``tflite`` platform."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig, UnsupportedError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.ops import tflite
from lightning_linger.ops.softmax import integer_softmax
from lightning_linger.ops.table import Tabulation
from lightning_linger.ops.tflite_curves import kernel_of
from lightning_linger.platforms import platform_of
from tests.models import Lambda, train
from tests.ops.tflite import oracle
from tests.ops.tflite.flows import Ran, calls, quantized


def convs(function: Callable[..., Tensor], operands: int = 1, **fields: Any) -> dict[str, Ran]:
    """What a function of the results of convolutions computes."""
    torch.manual_seed(3)
    x = torch.randn(2, 4, 8, 8) + 0.3

    def forward(self: Any, x: Tensor) -> Tensor:
        return function(*(layer(x) for layer in self.layers))

    layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(operands))
    for index, layer in enumerate(layers):
        layer.weight.data.mul_(2.0**index)
        layer.bias.data.add_(0.3 * index)
    return calls(quantized(Lambda(forward, layers=layers), x, **fields), x)


def clipped(ran: Ran, centred: np.ndarray, low: int = -128) -> np.ndarray:
    half = 2 ** (ran.result.bits - 1)
    return np.clip(centred + ran.result.zero, max(low, -half), half - 1)


def rescaled(values: np.ndarray, real: float) -> np.ndarray:
    return oracle.each(lambda v: oracle.multiplied(int(v), real), values)


def assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert len(np.unique(found)) > 10, "a test on a constant shows nothing"
    assert np.array_equal(found, expected), f"{(found != expected).sum()} of {found.size} differ"


@pytest.mark.parametrize(
    ("platform", "single"), [("tflite", False), ("tflite_single_rounding", True)]
)
@pytest.mark.parametrize(
    ("kind", "sign"),
    [pytest.param("add", 1, id="row71-add"), pytest.param("sub", -1, id="row71-sub")],
)
def test_sums(kind: str, sign: int, platform: str, single: bool) -> None:
    function = torch.add if kind == "add" else torch.sub
    ran = convs(function, 2, platform=platform)[kind]
    a, b = ran.operands
    scales = (a.scale, b.scale, ran.result.scale)
    expected = oracle.added(a.centred, b.centred, sign, scales, single=single)
    assert_equal(ran.result.codes, clipped(ran, expected))


@pytest.mark.parametrize("sign", [pytest.param(s, id=f"row71-{s:+d}") for s in (1, -1)])
def test_ratios_of_scales_are_of_the_right_precision(sign: int) -> None:
    """On results so large that the last bits of a multiplier show."""
    scales = tuple(float(np.float32(scale)) for scale in (0.0123, 0.0457, 2e-7))
    a, b = (np.arange(-255, 256, 5) * factor for factor in (1, -1))
    found = tflite.centred_sum(torch.from_numpy(a), torch.from_numpy(b), sign, scales)
    assert np.array_equal(found.numpy(), oracle.added(a, b, sign, scales))
    # The other precision gives others: the oracle's sign chooses it.
    assert not np.array_equal(found.numpy(), oracle.added(a, -b, -sign, scales))


def test_row80_a_sum_of_sixteen_bits_shifts_by_fifteen() -> None:
    ran = convs(torch.add, 2, activation_bits=16, output_bits=16)["add"]
    a, b = ran.operands
    expected = oracle.added(a.codes, b.codes, 1, (a.scale, b.scale, ran.result.scale), left=15)
    assert (ran.result.zero, ran.result.bits) == (0, 16)
    assert_equal(ran.result.codes, clipped(ran, expected, -(2**15)))


@pytest.mark.parametrize("number", [0.7, -2.5, 5.0])
def test_row71_a_number_is_a_constant_at_the_end_of_its_range(number: float) -> None:
    found = convs(lambda x: (x + number) * number)
    for kind in ("add", "mul"):
        ran = found[kind]
        (q,) = ran.operands
        scale = float(np.float32(abs(number)) / np.float32(255))
        code = np.array(255 if number > 0 else -255)
        if kind == "add":
            expected = oracle.added(q.centred, code, 1, (q.scale, scale, ran.result.scale))
        else:
            real = q.scale * scale / ran.result.scale
            expected = rescaled(q.centred * code, real)
        assert_equal(ran.result.codes, clipped(ran, expected))


def test_row71_products() -> None:
    ran = convs(torch.mul, 2)["mul"]
    a, b = ran.operands
    expected = rescaled(a.centred * b.centred, a.scale * b.scale / ran.result.scale)
    assert_equal(ran.result.codes, clipped(ran, expected))


def test_row71_requantization() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    point = linger.nn.FakeQuantize()
    model = quantized(
        nn.Sequential(nn.Conv2d(4, 4, 3), point),
        x,
        overrides={"1": {"range": 0.4}},
    )
    ran = calls(model, x)["quantization_point"]
    (q,) = ran.operands
    expected = rescaled(q.centred, q.scale / ran.result.scale)
    assert_equal(ran.result.codes, clipped(ran, expected))
    assert {-128, 127} <= set(ran.result.codes.flatten())


def test_row71_slopes() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.PReLU(4), nn.LeakyReLU(0.2), nn.LeakyReLU(-0.3))
    model[1].weight.data = torch.tensor([0.25, -0.1, 1.5, 0.01])
    found = calls(quantized(model, x), x)
    ran = found["prelu"]
    slopes = ran.site.prepared["slopes"]
    (q,), codes = ran.operands, slopes.codes.numpy().astype(np.int64)[None, :, None, None]
    positive, negative = (
        real / ran.result.scale for real in (q.scale, q.scale * float(slopes.step))
    )
    expected = np.where(
        q.centred >= 0,
        rescaled(q.centred, positive),
        rescaled(q.centred * codes, negative),
    )
    assert_equal(ran.result.codes, clipped(ran, expected))
    for kind, slope in (("leaky_relu", 0.2), ("leaky_relu+", -0.3)):
        ran = found[kind]
        (q,) = ran.operands
        scale_x, scale_o = np.float32(q.scale), np.float32(ran.result.scale)
        below = float(np.float32(scale_x * np.float32(slope)) / scale_o)
        sign = -1 if slope < 0 else 1
        expected = np.where(
            q.centred >= 0,
            rescaled(q.centred, float(scale_x / scale_o)),
            sign * rescaled(q.centred, abs(below)),
        )
        assert_equal(ran.result.codes, clipped(ran, expected))


# --- pools and means ----------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [pytest.param(p, id=f"row72-padding-{p}") for p in (0, 1)])
def test_averages_divide_sums_of_stored_codes(padding: int) -> None:
    ran = convs(lambda x: F.avg_pool2d(x, 2, 2, padding, count_include_pad=False))["avg_pool2d"]
    (q,) = ran.operands
    assert (q.scale, q.zero) == (ran.result.scale, ran.result.zero)
    expected = oracle.averaged(q.codes, (2, 2), (2, 2), (padding, padding))
    assert_equal(ran.result.codes, expected)


@pytest.mark.parametrize("zero", [-128, -5, 0, 77, 127])
def test_row72_a_half_goes_away_from_the_stored_zero(zero: int) -> None:
    stored = torch.arange(-8, 8).view(1, 1, 4, 4)
    found = tflite.average(
        F.avg_pool2d((stored - zero).double(), 2, divisor_override=1).long(), 4, zero
    )
    expected = oracle.averaged(stored.numpy(), (2, 2), (2, 2), (0, 0))
    assert np.array_equal(found.numpy() + zero, expected)


def test_row72_maxima_are_those_of_stored_codes() -> None:
    ran = convs(lambda x: F.max_pool2d(x, 2))["max_pool2d"]
    (q,) = ran.operands
    windows = q.codes.reshape(2, 4, 4, 2, 4, 2)
    assert (q.scale, q.zero) == (ran.result.scale, ran.result.zero)
    assert_equal(ran.result.codes, windows.max((3, 5)))


@pytest.mark.parametrize(
    ("platform", "reference"),
    [
        pytest.param("tflite", oracle.mean, id="row72-mean"),
        pytest.param("tflite_divided_mean", oracle.older_mean, id="row72-older-mean"),
    ],
)
def test_means(platform: str, reference: Any) -> None:
    ran = convs(lambda x: x.mean((2, 3)) * 1.0, platform=platform)["mean"]
    (q,) = ran.operands
    sums = q.centred.sum((2, 3))
    expected = reference(sums, 64, q.scale, ran.result.scale)
    assert q.scale != ran.result.scale
    assert np.array_equal(ran.result.codes, clipped(ran, expected))


def test_row72_the_two_means_differ() -> None:
    sums = np.arange(-3000, 3000)
    assert not np.array_equal(
        oracle.mean(sums, 49, 0.02, 0.005), oracle.older_mean(sums, 49, 0.02, 0.005)
    )
    for averaging, reference in (("scaled", oracle.mean), ("divided", oracle.older_mean)):
        found = tflite.centred_mean(torch.from_numpy(sums), 49, (0.02, 0.005), averaging)
        scales = (float(np.float32(0.02)), float(np.float32(0.005)))
        assert np.array_equal(found.numpy(), reference(sums, 49, *scales))


def test_a_sum_is_brought_to_its_scale() -> None:
    ran = convs(lambda x: x.sum((2, 3)))["sum"]
    (q,) = ran.operands
    expected = rescaled(q.centred.sum((2, 3)), q.scale / ran.result.scale)
    assert np.array_equal(ran.result.codes, clipped(ran, expected))


# --- one scale ----------------------------------------------------------------------------------


KEEPERS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "amax": lambda x: x.amax(3),
    "relu": lambda x: F.relu(F.max_pool2d(x, 2)),
    "topk": lambda x: x.topk(3).values,
    "amin": lambda x: x.amin(3),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "mirror_pad": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "split": lambda x: x.split(2, 1)[1],
    "gather": lambda x: x.gather(3, torch.zeros(2, 4, 3, 3, dtype=torch.long)),
    "depth_to_space": lambda x: F.pixel_shuffle(x, 2),
    "strided_slice": lambda x: x[:, :, ::2, 1:],
    "unstack": lambda x: x.unbind(1)[1],
}


@pytest.mark.parametrize("kind", [pytest.param(k, id=f"row74-{k}") for k in KEEPERS])
def test_the_scale_stays(kind: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(2, 4, 8, 8) + 0.3

    def forward(self: Any, x: Tensor) -> Tensor:
        # Movements keep the scale too, or the product at the end would not have it.
        y = KEEPERS[kind](self.conv(x))
        return y.reshape(2, -1).unsqueeze(1).transpose(0, 1).flip(0)[..., :9] * 0.5

    model = quantized(Lambda(forward, conv=nn.Conv2d(4, 4, 3)), x)
    found = calls(model, x)
    grid = {(s.scale, s.zero) for s in (found["first conv2d"].result, found["mul"].operands[0])}
    assert len(grid) == 1
    assert found["mul"].operands[0].bits == 8


def test_row75_padding_is_the_zero_point() -> None:
    ran = convs(lambda x: F.pad(x, (1, 2, 3, 0)))["pad"]
    (q,) = ran.operands
    assert q.zero not in (0, -128)
    expected = np.pad(q.codes, ((0, 0), (0, 0), (3, 0), (1, 2)), constant_values=q.zero)
    assert_equal(ran.result.codes, expected)


def test_row75_a_padded_number_is_the_nearest_code() -> None:
    fractions = set()
    for value in (0.25, 0.255, -0.26):
        ran = convs(lambda x, value=value: F.pad(x, (1, 1), value=value))["pad"]
        (q,) = ran.operands
        place = value / q.scale
        code = q.zero + round(place)
        expected = np.pad(q.codes, ((0, 0),) * 3 + ((1, 1),), constant_values=code)
        assert_equal(ran.result.codes, expected)
        fractions.add(round(place) - int(place))
    assert fractions - {0}, "all of them round as they truncate"


def test_row71_a_relu6_of_its_own_clamps_codes() -> None:
    ran = convs(lambda x: F.relu6(F.max_pool2d(x * 9.0, 2)))["relu6"]
    (q,) = ran.operands
    assert (q.scale, q.zero) == (ran.result.scale, ran.result.zero)
    six = q.zero + int(np.floor(np.float32(6.0) / np.float32(q.scale) + 0.5))
    assert q.codes.min() < q.zero
    assert q.codes.max() > six
    assert_equal(ran.result.codes, np.clip(q.codes, q.zero, six))


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_row74_operands_of_a_concatenation_are_requantized(join: Any) -> None:
    ran = convs(lambda x, y, z: join([x, y, -0.5 * z]), 3)[join.__name__]
    out = ran.result
    moved = [rescaled(q.centred, q.scale / out.scale) for q in ran.operands]
    expected = np.concatenate(moved) if join is torch.cat else np.stack(moved)
    assert_equal(out.codes, clipped(ran, expected))
    assert len({(q.scale, q.zero) for q in ran.operands}) == 3
    lows = [q.scale * (-128 - q.zero) for q in ran.operands]
    highs = [q.scale * (127 - q.zero) for q in ran.operands]
    # Nothing is lost, and nothing is wasted.
    assert out.scale * (-128 - out.zero) <= min(lows) + 0.5 * out.scale
    assert out.scale * (127 - out.zero) >= max(highs) - 0.5 * out.scale
    assert out.scale <= (max(highs) - min(lows)) / 255 * 1.0001


def test_row74_operands_on_one_grid_are_joined_as_they_are() -> None:
    ran = convs(lambda x: torch.cat([x, F.max_pool2d(x, 1), x.flip(0)]))["cat"]
    assert_equal(ran.result.codes, np.concatenate([q.codes for q in ran.operands]))


@pytest.mark.parametrize("kind", ["maximum", "minimum"])
def test_row74_operands_of_a_comparison_are_requantized(kind: str) -> None:
    ran = convs(lambda x, y: getattr(torch, kind)(x, y), 2)[kind]
    out = ran.result
    moved = [clipped(ran, rescaled(q.centred, q.scale / out.scale)) for q in ran.operands]
    assert_equal(out.codes, getattr(np, kind)(*moved))


@pytest.mark.parametrize("size", [2, 5, 8, 16, 19])
@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_resizing(align_corners: bool, size: int) -> None:
    options: Any = {"mode": "bilinear", "align_corners": align_corners}
    ran = convs(lambda x: F.interpolate(x, size=(size, size), **options))["interpolate"]
    (q,) = ran.operands
    assert_equal(ran.result.codes, resized(q.codes, size, align_corners))


def resized(q: np.ndarray, size: int, align_corners: bool) -> np.ndarray:
    """Positions of 10 fraction bits; sums of stored codes, halves away from zero."""
    source = q.shape[2]
    scale = (1024 * source + size // 2) // size
    start = scale // 2 - 512
    if align_corners:
        start = 0
        if size > 1:
            scale = (1024 * (source - 1) + (size - 1) // 2) // (size - 1)
    taps = []
    for place in range(size):
        position = place * scale + start
        low = max(oracle.truncated(position, 1024), 0)
        high = min(oracle.truncated(position + 1023, 1024), source - 1)
        taps.append((low, high, position - 1024 * low))
    out = np.zeros((*q.shape[:2], size, size), np.int64)
    for y, (y0, y1, v) in enumerate(taps):
        for x, (x0, x1, u) in enumerate(taps):
            total = (
                q[:, :, y0, x0] * (1024 - v) * (1024 - u)
                + q[:, :, y0, x1] * (1024 - v) * u
                + q[:, :, y1, x0] * v * (1024 - u)
                + q[:, :, y1, x1] * v * u
            )
            out[:, :, y, x] = oracle.each(
                lambda t: oracle.truncated(int(t) + (2**19 if t > 0 else -(2**19)), 2**20), total
            )
    return out


# --- fixed output parameters --------------------------------------------------------------------

FIXED = {
    "sigmoid": (torch.sigmoid, 1 / 256, -128),
    "tanh": (torch.tanh, 1 / 128, 0),
    "softmax": (lambda x: torch.softmax(x, 1), 1 / 256, -128),
    "log_softmax": (lambda x: torch.log_softmax(x, 1), 1 / 16, 127),
    "normalize": (lambda x: F.normalize(x, dim=1), 1 / 128, 0),
}


@pytest.mark.parametrize("kind", [pytest.param(k, id=f"row73-{k}") for k in FIXED])
def test_output_parameters_are_fixed_and_the_kernel_is_the_engines(kind: str) -> None:
    function, scale, zero = FIXED[kind]
    ran = convs(function)[kind]
    (q,), out = ran.operands, ran.result
    assert (out.scale, out.zero, out.bits) == (scale, zero, 8)
    stored = torch.from_numpy(q.codes)
    if kind in ("sigmoid", "tanh"):
        kernel = tflite.logistic if kind == "sigmoid" else tflite.tanh
        expected = kernel(stored, q.scale, q.zero)
    elif kind == "normalize":
        expected = tflite.l2_normalization(stored.movedim(1, -1), q.zero).movedim(-1, 1)
    else:
        kernel = getattr(tflite, kind)
        expected = kernel(stored.movedim(1, -1), q.scale).movedim(-1, 1)
    assert_equal(out.codes, expected.numpy().astype(np.int64))


SIXTEEN_BITS = {"activation_bits": 16, "output_bits": 16}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, id=f"row73-{k}") for k in ("sigmoid", "tanh", "softmax")]
)
def test_output_parameters_of_sixteen_bits(kind: str) -> None:
    ran = convs(FIXED[kind][0], **SIXTEEN_BITS)[kind]
    assert (ran.result.scale, ran.result.zero, ran.result.bits) == (1 / 32768, 0, 16)


@pytest.mark.parametrize("kind", [pytest.param(k, id=f"row73-{k}") for k in FIXED])
def test_settings_of_all_layers_leave_fixed_parameters(kind: str) -> None:
    function, scale, zero = FIXED[kind]
    fields = {"range": 2.0, "symmetry": "symmetric", "data_scale": 3.0}
    ran = convs(function, **fields)
    (q,), out = ran[kind].operands, ran[kind].result
    assert (q.zero, out.scale, out.zero) == (0, scale, zero)
    assert ran[kind].site.output.grid.affine


@pytest.mark.parametrize(
    ("kind", "given", "fields"),
    [
        *(
            pytest.param(kind, {name: value}, {}, id=f"row73-{kind}-{name}")
            for kind in FIXED
            for name, value in (("range", 2.0), ("symmetry", "symmetric"))
        ),
        *(
            pytest.param(kind, {"range": 2.0}, SIXTEEN_BITS, id=f"row73-{kind}-of-16-bits")
            for kind in ("sigmoid", "tanh", "softmax")
        ),
    ],
)
def test_nobody_changes_fixed_parameters(
    kind: str, given: dict[str, Any], fields: dict[str, Any]
) -> None:
    x = torch.randn(2, 4, 8, 8)

    def forward(self: Any, x: Tensor) -> Tensor:
        return FIXED[kind][0](self.conv(x))

    model = linger.prepare(Lambda(forward, conv=nn.Conv2d(4, 4, 3)), (x,))
    with pytest.raises(
        ConfigError, match=rf"/{kind}/0.*fixes the scale and the zero point.*{next(iter(given))}"
    ):
        linger.quantize(
            model, QuantConfig(platform="tflite", **fields), overrides={f"type:{kind}": given}
        )


def test_row73_an_eps_that_shows_is_another_function() -> None:
    x = torch.randn(2, 4, 8, 8)

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.normalize(self.conv(x), eps=self.eps)

    strict = QuantConfig(platform="tflite", strict_platform=True)
    model = linger.prepare(Lambda(forward, conv=nn.Conv2d(4, 4, 3), eps=1e-12), (x,))
    assert not linger.check(linger.quantize(model, strict), "tflite")
    model = linger.prepare(Lambda(forward, conv=nn.Conv2d(4, 4, 3), eps=0.1), (x,))
    with pytest.raises(UnsupportedError, match=r"/normalize/0.*Use eps=1e-12"):
        linger.quantize(model, strict)


def test_hard_swish_is_the_engines() -> None:
    ran = convs(F.hardswish)["hardswish"]
    (q,), out = ran.operands, ran.result
    expected = tflite.hard_swish(
        torch.from_numpy(q.codes), (q.scale, out.scale), (q.zero, out.zero)
    )
    assert_equal(out.codes, expected.numpy().astype(np.int64))


# --- variants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param(k, id=f"row76-{k}") for k in ("sigmoid", "tanh")])
def test_a_build_with_tables_of_floats(kind: str) -> None:
    function, scale, zero = FIXED[kind]
    ran = convs(function, platform="tflite_float_tables")[kind]
    (q,) = ran.operands
    real = function(torch.from_numpy(q.centred).float() * q.scale).double().numpy()
    place = np.copysign(np.floor(np.abs(real / scale) + 0.5), real)
    assert_equal(ran.result.codes, np.clip(place + zero, -128, 127).astype(np.int64))


# Steps at which a code of the two kinds of tables differs.
TELLING = {
    "sigmoid": (0.00923975, 0.0341854, 0.03603467, 0.07215472, 0.07573525),
    "tanh": (0.02065022,),
}


@pytest.mark.parametrize("kind", [pytest.param(k, id=f"row76-{k}") for k in TELLING])
def test_tables_of_floats_are_not_the_fixed_point_kernels(kind: str) -> None:
    _, step, zero = FIXED[kind]
    low, high = -128 - zero, 127 - zero
    codes, differing = torch.arange(-255, 256), 0
    for scale in TELLING[kind]:
        asked = Tabulation(
            float(np.float32(scale)), 9, step, 9, low, high, "half_away", entry_bits=9
        )
        tables = []
        for platform in ("tflite", "tflite_float_tables"):
            kernel = kernel_of(kind, (), platform_of(platform), asked)
            assert kernel is not None
            assert kernel.in_float is (platform == "tflite_float_tables")
            tables.append(kernel.entries(codes, asked).clamp(low, high))
        differing += int((tables[0] != tables[1]).sum())
        assert (tables[0] - tables[1]).abs().max() <= 1
    assert 1 <= differing <= 2 * len(TELLING[kind])


def test_row76_a_softmax_of_floats() -> None:
    torch.manual_seed(0)
    rows, scale = torch.randint(-128, 128, (20000, 4), dtype=torch.int16), float(np.float32(0.02))
    kernels = {"tflite": tflite.softmax, "tflite_float_tables": tflite.softmax_in_float}
    found = {}
    for platform, kernel in kernels.items():
        codes = integer_softmax(rows, 1, scale, 9, 1 / 256, 9, 0, 255, "half_away", platform)
        found[platform] = codes.long()
        assert torch.equal(found[platform], kernel(rows, scale).long() + 128)
        real = torch.softmax(rows.double() * scale, 1) * 256
        assert (found[platform] - real.clamp(max=255)).abs().max() <= 0.501
    assert (found["tflite"] != found["tflite_float_tables"]).any()


@pytest.mark.parametrize(
    "platform",
    [
        pytest.param(name, id=f"row76-{name}")
        for name in (
            *("tflite", "tflite_single_rounding", "tflite_float_tables", "tflite_divided_mean"),
        )
    ],
)
def test_the_variant_is_named_in_the_summary(platform: str) -> None:
    x = torch.randn(2, 4, 8, 8)
    model = linger.prepare(nn.Sequential(nn.Conv2d(4, 4, 3)), (x,))
    linger.quantize(model, QuantConfig(platform=platform))
    train(model, (x,), 1, 0.0)
    (row,) = linger.summary(model)
    assert row.platform == platform
    assert row.scale_kind == "free/channel affine"
    assert platform in str(linger.summary(model))


# --- what TFLite lacks --------------------------------------------------------------------------


def test_what_the_engine_lacks_stays_float_with_a_reason() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x)[0])

    x = torch.randn(2, 5, 4)
    model = linger.prepare(Lambda(forward, lstm=nn.LSTM(4, 4), linear=nn.Linear(4, 4)), (x,))
    linger.quantize(model, QuantConfig(platform="tflite"))
    reasons = {site.op.kind: site.why_float for site in instrumentation_of(model).sites}
    assert "arithmetic of their own" in str(reasons["lstm"])
    assert reasons["linear"] is None


def test_affine_activations_need_an_engine_with_zero_points() -> None:
    x = torch.randn(2, 4)
    model = linger.prepare(nn.Sequential(nn.Linear(4, 4)), (x,))
    with pytest.raises(ConfigError, match="has no zero points"):
        linger.quantize(model, QuantConfig(platform="onnxruntime", symmetry="affine"))


def test_zero_points_can_be_switched_off() -> None:
    ran = convs(torch.add, 2, symmetry="symmetric")["add"]
    assert {q.zero for q in (*ran.operands, ran.result)} == {0}
