"""Layers on the ``tflite`` platform against loops over stored codes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_linger.ops.conv import finish_accumulator, in_one_product
from tests.models import Lambda
from tests.ops.tflite import oracle
from tests.ops.tflite.flows import Ran, Stored, calls, prepared, quantized

CONVOLUTIONS = {
    "row70-conv": {"channels": 6, "kernel": 3, "stride": 2, "before": 1},
    "row70-depthwise": {"channels": 4, "kernel": 3, "groups": 4, "before": 1},
    "row70-depthwise-multiplier": {"channels": 12, "kernel": 3, "groups": 4, "before": 1},
    "row70-grouped": {"channels": 6, "kernel": 3, "groups": 2},
    "row70-dilated": {"channels": 5, "kernel": 3, "dilation": 2, "before": 2},
    "row70-no-bias": {"channels": 5, "kernel": 1, "bias": False},
}


def image(seed: int = 0, batch: int = 2, channels: int = 4, size: int = 7) -> Tensor:
    """Values around 0.4, so that no zero point is 0."""
    torch.manual_seed(seed)
    return torch.randn(batch, channels, size, size) + 0.4


def ratios(ran: Ran, steps: list[float]) -> list[float]:
    (x,) = ran.operands
    return [x.scale * step / ran.result.scale for step in steps]


def assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert len(np.unique(found)) > 10, "a test on a constant shows nothing"
    assert np.array_equal(found, expected), f"{(found != expected).sum()} of {found.size} differ"


def assert_stand_for(weight: np.ndarray, steps: list[float], real: Tensor, dim: int = 0) -> None:
    """The codes, each at the step of its output channel, are the layer's weight, rounded."""
    scales = np.array(steps).reshape([-1 if d == dim else 1 for d in range(weight.ndim)])
    error = np.abs(weight * scales - real.detach().double().numpy())
    assert (error <= 0.501 * scales).all()


@pytest.mark.parametrize("geometry", [pytest.param(g, id=i) for i, g in CONVOLUTIONS.items()])
def test_a_convolution(geometry: dict[str, int]) -> None:
    x = image()
    stride, dilation = geometry.get("stride", 1), geometry.get("dilation", 1)
    before, kernel, groups = (
        geometry.get("before", 0),
        geometry["kernel"],
        geometry.get("groups", 1),
    )
    layer = nn.Conv2d(
        4,
        geometry["channels"],
        kernel,
        stride,
        before,
        dilation,
        groups,
        bias=bool(geometry.get("bias", True)),
    )
    model = quantized(nn.Sequential(nn.Conv2d(4, 4, 1), layer), x)
    ran = calls(model, x)["conv2d"]
    weight, bias, steps = prepared(ran.site)
    assert len(steps) == geometry["channels"]
    assert_stand_for(weight, steps, layer.weight)
    size = [(n + 2 * before - dilation * (kernel - 1) - 1) // stride + 1 for n in x.shape[2:]]
    (q,) = ran.operands
    acc = oracle.convolved(
        q.codes,
        weight,
        bias,
        q.zero,
        (stride, stride),
        (before, before),
        (size[0], size[1]),
        (dilation, dilation),
        groups,
    )
    assert q.zero != 0
    expected = oracle.requantized(acc, ratios(ran, steps), ran.result.zero, -128, 127)
    assert_equal(ran.result.codes, expected)


@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    [
        pytest.param(3, 2, 7, id="row70-same-odd"),
        pytest.param(3, 2, 8, id="row70-same-even"),
        pytest.param(2, 1, 7, id="row70-same-even-kernel"),
    ],
)
def test_same_padding(kernel: int, stride: int, size: int) -> None:
    x = image(size=size)
    out, before = oracle.same_padding(size, kernel, stride, 1)
    total = max((out - 1) * stride + kernel - size, 0)
    sides = (before, total - before) * 2

    def forward(self: Lambda, x: Tensor) -> Tensor:
        return self.conv(F.pad(self.stem(x), sides))

    layers = {"stem": nn.Conv2d(4, 4, 1), "conv": nn.Conv2d(4, 5, kernel, stride)}
    found = calls(quantized(Lambda(forward, **layers), x), x)
    padded, ran = found["pad"], found["conv2d"]
    weight, bias, steps = prepared(ran.site)
    (q,) = padded.operands
    acc = oracle.convolved(
        *(q.codes, weight, bias, q.zero, (stride, stride), (before, before)),
        *((out, out), (1, 1), 1),
    )
    expected = oracle.requantized(acc, ratios(ran, steps), ran.result.zero, -128, 127)
    assert_equal(ran.result.codes, expected)


@pytest.mark.parametrize("padding", [pytest.param(p, id=f"row70-transposed-{p}") for p in (0, 1)])
def test_a_transposed_convolution(padding: int) -> None:
    x = image(size=5)
    layer = nn.ConvTranspose2d(4, 5, 3, stride=2, padding=padding, output_padding=padding)
    layer.weight.data.mul_(torch.tensor([1.0, 0.1, 3.0, 0.5, 2.0]).view(1, 5, 1, 1))
    found = calls(model := quantized(nn.Sequential(nn.Conv2d(4, 4, 1), layer), x), x)
    ran = found["conv_transpose2d"]
    weight, bias, steps = prepared(ran.site)
    assert_stand_for(weight, steps, layer.weight, dim=1)
    (q,) = ran.operands
    size = model(x).shape[2:]
    acc = oracle.scattered(
        *(q.codes, weight, bias, q.zero, (2, 2), (padding, padding), (size[0], size[1]))
    )
    expected = oracle.requantized(acc, ratios(ran, steps), ran.result.zero, -128, 127)
    assert_equal(ran.result.codes, expected)


def test_row70_a_transposed_convolution_of_groups() -> None:
    """Each group is a transposed convolution of its own."""
    x = image(size=5)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    layer.weight.data.mul_(torch.tensor([1.0, 0.1, 3.0]).view(1, 3, 1, 1))
    layer.weight.data[2:].mul_(0.2)
    ran = calls(quantized(nn.Sequential(nn.Conv2d(4, 4, 1), layer), x), x)["conv_transpose2d"]
    weight, bias, steps = prepared(ran.site)
    (q,) = ran.operands
    acc = []
    for group in (0, 1):
        of_x, of_o = slice(2 * group, 2 * group + 2), slice(3 * group, 3 * group + 3)
        assert_stand_for(weight[of_x], steps[of_o], layer.weight[of_x], dim=1)
        part = (q.codes[:, of_x], weight[of_x], bias[of_o], q.zero, (2, 2), (0, 0), (11, 11))
        acc.append(oracle.scattered(*part))
    found = np.concatenate(acc, 1)
    expected = oracle.requantized(found, ratios(ran, steps), ran.result.zero, -128, 127)
    assert_equal(ran.result.codes, expected)


@pytest.mark.parametrize(
    "granularity",
    [pytest.param(g, id=f"row70-fully-connected-{g}") for g in ("tensor", "channel")],
)
def test_a_fully_connected_layer(granularity: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(40, 6) + 0.4
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
    ran = calls(quantized(model, x, granularity=granularity), x)["linear"]
    weight, bias, steps = prepared(ran.site)
    assert_stand_for(weight, steps, model[1].weight)
    (q,) = ran.operands
    acc = (q.codes - q.zero) @ weight.T + bias
    reals = ratios(ran, steps)
    if granularity == "tensor":  # the product of the scales is a float32 number
        product = np.float32(q.scale) * np.float32(steps[0])
        reals = [float(product) / ran.result.scale]
    expected = oracle.requantized(acc, reals, ran.result.zero, -128, 127)
    assert_equal(ran.result.codes, expected)


def test_row70_a_matrix_product_of_activations() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 6, 6) + 0.3

    def forward(self: Lambda, x: Tensor) -> Tensor:
        return torch.bmm(self.a(x), self.b(x))

    model = quantized(Lambda(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6)), x)
    ran = calls(model, x)["bmm"]
    a, b = ran.operands
    acc = a.centred @ b.centred
    real = float(np.float32(a.scale) * np.float32(b.scale)) / ran.result.scale
    expected = oracle.requantized(acc, [real], ran.result.zero, -128, 127)
    assert_equal(ran.result.codes, expected)


def test_row70_products_of_scales_are_of_the_right_precision() -> None:
    """On sums so large that the last bits of a multiplier show."""
    torch.manual_seed(0)
    sums = torch.randint(-(2**30), 2**30, (20000, 1)).double()
    x, w, out = (float(np.float32(scale)) for scale in (0.0123, 0.0457, 17.3))
    of_a_layer = (16, -(2**15), 2**15 - 1, "half_away", "tflite", 0)
    in_float32 = float(np.float32(x) * np.float32(w)) / out
    for scales, real in (
        ((x, [w]), x * w / out),
        (in_one_product(x, [w], out, "tflite"), in_float32),
    ):
        found = finish_accumulator(sums.clone(), *scales, out, *of_a_layer).long().numpy()
        expected = oracle.requantized(sums.long().numpy(), [real], 0, -(2**15), 2**15 - 1)
        assert_equal(found, expected)
    assert oracle.quantized_multiplier(in_float32) != oracle.quantized_multiplier(x * w / out)


@pytest.mark.parametrize(
    ("platform", "single"),
    [
        pytest.param("tflite", False, id="row76-double"),
        pytest.param("tflite_single_rounding", True, id="row76-single"),
    ],
)
def test_how_a_layer_rounds_has_a_name(platform: str, single: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(500, 6) + 0.4
    model = quantized(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 9)), x, platform=platform)
    ran = calls(model, x)["linear"]
    weight, bias, steps = prepared(ran.site)
    (q,) = ran.operands
    acc = (q.codes - q.zero) @ weight.T + bias
    results = {}
    for rounds_once in (False, True):
        expected = np.stack(
            [
                oracle.each(
                    lambda a, real=real, once=rounds_once: oracle.multiplied(int(a), real, once),
                    acc[:, channel],
                )
                for channel, real in enumerate(ratios(ran, steps))
            ],
            1,
        )
        results[rounds_once] = np.clip(expected + ran.result.zero, -128, 127)
    assert not np.array_equal(results[False], results[True])
    assert_equal(ran.result.codes, results[single])


@pytest.mark.parametrize(
    ("activation", "low", "high"),
    [
        pytest.param(torch.relu, 0.0, None, id="row71-relu"),
        pytest.param(F.relu6, 0.0, 6.0, id="row71-relu6"),
        pytest.param(F.hardtanh, -1.0, 1.0, id="row71-relu-n1-to-1"),
    ],
)
def test_an_activation_clamps_with_the_parameters_of_the_output(
    activation: object, low: float, high: float | None
) -> None:
    x = image() * 4

    def forward(self: Lambda, x: Tensor) -> Tensor:
        return activation(self.conv(self.stem(x)))  # type: ignore[operator]

    layers = {"stem": nn.Conv2d(4, 4, 1), "conv": nn.Conv2d(4, 5, 3)}
    layers["conv"].weight.data.mul_(6)
    ran = calls(quantized(Lambda(forward, **layers), x), x)["conv2d"]
    weight, bias, steps = prepared(ran.site)
    (q,), out = ran.operands, ran.result
    least = max(-128, edge(low, out))
    most = 127 if high is None else min(127, edge(high, out))
    acc = oracle.convolved(
        *(q.codes, weight, bias, q.zero, (1, 1), (0, 0), (5, 5), (1, 1), 1),
    )
    expected = oracle.requantized(acc, ratios(ran, steps), out.zero, least, most)
    assert_equal(out.codes, expected)
    assert (expected == least).any()


def edge(value: float, out: Stored) -> int:
    place = np.float32(value) / np.float32(out.scale)
    return out.zero + int(np.copysign(np.floor(np.abs(place) + 0.5), place))


def test_row69_weights_are_narrow_and_biases_have_the_scale_of_the_sum() -> None:
    x = image()
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.data[0] = 0.0
    layer.weight.data[1, 0, 0, 0] = -9.0
    ran = calls(quantized(nn.Sequential(nn.Conv2d(4, 4, 1), layer), x), x)["conv2d"]
    weight, bias, steps = prepared(ran.site)
    (q,) = ran.operands
    for channel in range(1, 6):
        row = layer.weight[channel].detach().numpy()
        assert np.float32(steps[channel]) == np.abs(row).max() / np.float32(127)
        assert np.abs(weight[channel]).max() == 127
    assert weight.min() == -127
    assert not weight[0].any()
    assert np.isfinite(steps[0])
    wanted = layer.bias.detach().double().numpy() / (q.scale * np.array(steps))
    assert np.abs(bias - wanted).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("weight_range", [0.1, "99%", "lsq"])
def test_row69_weights_beyond_their_range_stay_narrow(weight_range: object) -> None:
    x = image()
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.data[:, 0, 0, 0] = -9.0
    model = nn.Sequential(nn.Conv2d(4, 4, 1), layer)
    ran = calls(quantized(model, x, weight_range=weight_range), x)["conv2d"]
    weight, _, _ = prepared(ran.site)
    assert (weight[:, 0, 0, 0] == -127).all()
    assert weight.min() == -127


def test_row69_a_large_bias_widens_the_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3) * 1e-3
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1e-4, 0.0, 0.0], [1.0, 0.5, -0.25]])
    layer.bias.data = torch.tensor([300.0, 0.1])
    ran = calls(quantized(nn.Sequential(nn.Identity(), nn.Linear(3, 3), layer), x), x)["linear"]
    _, bias, steps = prepared(ran.site)
    (q,) = ran.operands
    # max|w| becomes 2 |b| / (2^31 - 1) * 127 / s_in
    assert steps[0] == pytest.approx(2 * 300.0 / (2**31 - 1) / q.scale, rel=1e-6)
    assert 2**30 - 2**8 <= bias[0] <= 2**30 + 2**8
    assert steps[1] == pytest.approx(1.0 / 127)


def test_row80_sixteen_bits_have_no_zero_point_and_64_bit_sums() -> None:
    torch.manual_seed(1)
    x = torch.randn(60, 6) + 0.4
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
    found = calls(quantized(model, x, activation_bits=16, output_bits=16), x)
    ran = found["linear"]
    weight, bias, steps = prepared(ran.site)
    (q,) = ran.operands
    assert (q.zero, q.bits, ran.result.zero, ran.result.bits) == (0, 16, 0, 16)
    assert np.abs(weight).max() == 127
    acc = q.codes @ weight.T + bias
    expected = np.stack(
        [
            oracle.each(lambda a, real=real: oracle.multiplied_wide(int(a), real), acc[:, i])
            for i, real in enumerate(ratios(ran, steps))
        ],
        1,
    )
    assert_equal(ran.result.codes, np.clip(expected, -(2**15), 2**15 - 1))
