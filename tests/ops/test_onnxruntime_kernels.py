"""The integer kernels of platform "onnxruntime" against onnxruntime, one op per graph.

The graphs are built here from ONNX nodes, without the library's exporter. Scales come in three
kinds: free, decimal (ratios of small whole numbers, which put many results next to a rounding tie)
and powers of two, for which onnxruntime must agree without its optimizations too.
"""

import itertools

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from lightning_linger.core.integer import multiplier, quantize, requantize
from lightning_linger.ops.activation import integer_clamp
from lightning_linger.ops.add import _multiply_add, integer_add
from lightning_linger.ops.cat import integer_cat
from lightning_linger.ops.conv import integer_conv
from lightning_linger.ops.linear import integer_linear
from lightning_linger.ops.mean import integer_mean
from lightning_linger.ops.mul import integer_mul
from lightning_linger.ops.norm import integer_scale_shift
from lightning_linger.ops.pool import integer_avg_pool, integer_max_pool

ZERO = 128
ROUNDING = ("half_even", "onnxruntime")
KINDS = ("free", "decimal", "power_of_two")
# (kind of scale, optimizations): what has to be equal.
SETTINGS = [("free", True), ("decimal", True), ("power_of_two", True), ("power_of_two", False)]
everywhere = pytest.mark.parametrize(("kind", "optimized"), SETTINGS)


class Graph:
    """A few nodes between stored uint8 inputs and one output."""

    def __init__(self) -> None:
        self.nodes, self.constants, self.inputs, self.feeds = [], [], [], {}
        self.names = (f"v{i}" for i in itertools.count())

    def constant(self, value: object) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), next(self.names)))
        return self.constants[-1].name

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [next(self.names)], **attributes))
        return self.nodes[-1].output[0]

    def codes(self, codes: Tensor, scale: float) -> str:
        """A dequantized input."""
        name = next(self.names)
        shape = list(codes.shape)
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.UINT8, shape))
        self.feeds[name] = (codes.int() + ZERO).numpy().astype(np.uint8)
        return self.dequantized(name, scale)

    def dequantized(self, name: str, scale: float) -> str:
        step = self.constant(np.float32(scale))
        return self.node("DequantizeLinear", name, step, self.constant(np.uint8(ZERO)))

    def quantized(self, name: str, scale: float) -> str:
        step = self.constant(np.float32(scale))
        return self.node("QuantizeLinear", name, step, self.constant(np.uint8(ZERO)))

    def parameter(self, codes: Tensor, scale: Tensor, dtype: type, axis: int = 0) -> str:
        values = self.constant(codes.numpy().astype(dtype))
        step = self.constant(scale.numpy().astype(np.float32))
        # onnxruntime does not fuse a Gemm whose parameters come without zero points.
        zeros = self.constant(np.zeros(scale.shape, dtype))
        return self.node("DequantizeLinear", values, step, zeros, axis=axis)

    def run(self, result: str, optimized: bool = True, quantized: bool = True) -> Tensor:
        """Return the result, as codes if it is quantized."""
        dtype = TensorProto.UINT8 if quantized else TensorProto.FLOAT
        output = helper.make_tensor_value_info(result, dtype, None)
        graph = helper.make_graph(self.nodes, "g", self.inputs, [output], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, self.feeds)[0])
        return (found.int() - ZERO).to(torch.int8) if quantized else found


class Numbers:
    """Random codes and scales of one kind."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.random = np.random.default_rng(seed)

    def scale(self, low: float = 0.003, high: float = 0.3, count: int | None = None) -> Tensor:
        value = np.exp(self.random.uniform(np.log(low), np.log(high), count))
        if self.kind == "power_of_two":
            value = 2.0 ** np.round(np.log2(value))
        if self.kind == "decimal":
            decade = 10.0 ** np.floor(np.log10(value))
            value = (np.floor(value / decade) + 0.5) * decade
        return torch.from_numpy(np.asarray(value, np.float32))

    def one(self, low: float = 0.003, high: float = 0.3) -> float:
        return float(self.scale(low, high))

    def near(self, value: float) -> float:
        return self.one(value * 0.6, value * 1.6)

    def codes(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.random.integers(-128, 128, shape, dtype=np.int8))

    def weights(self, *shape: int, bits: int = 8) -> Tensor:
        top = 2 ** (bits - 1) - 1
        return torch.from_numpy(self.random.integers(-top, top + 1, shape)).to(torch.int8)

    def tie_bias(self, ratios: Tensor) -> Tensor:
        """Accumulators whose results lie next to a half, on and beyond both ends of the codes."""
        halves = self.random.integers(-131, 131, ratios.shape) + 0.5
        ideal = np.rint(halves / ratios.double().numpy())
        return torch.from_numpy(np.clip(ideal, -(2**30), 2**30)).to(torch.int32)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected), f"{int((found != expected).sum())} of {found.numel()}"
    assert found.float().std() > 0 or found.numel() < 10


def conv_kernel(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    geometry: tuple,
    steps: tuple[float, list[float], float],
    transposed: bool = False,
    fits: bool = False,
) -> Tensor:
    """``linger::conv`` on 8 bits."""
    stride, padding, dilation, groups = geometry
    dims = x.dim() - 2
    outer = [[n] * dims for n in (stride, padding, dilation)]
    limits = (8, 8, 8, -128, 127)
    return integer_conv(
        x, w, b, *outer, groups, transposed, [0] * dims, *steps, *limits, *ROUNDING, fits
    )


CONVOLUTIONS = {
    "3x3": ((3, 16, 12, 12), (24, 16, 3, 3), (1, 1, 1, 1)),
    "strided, dilated": ((2, 5, 24, 24), (32, 5, 3, 3), (2, 2, 2, 1)),
    "groups": ((2, 16, 12, 12), (32, 4, 3, 3), (1, 1, 1, 4)),
    "depthwise": ((2, 40, 12, 12), (40, 1, 3, 3), (1, 1, 1, 40)),
    "1d": ((3, 16, 100), (32, 16, 5), (1, 2, 1, 1)),
    "3d": ((2, 4, 6, 6, 6), (12, 4, 3, 3, 3), (1, 1, 1, 1)),
}


@everywhere
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_equals_onnxruntime(name, per_channel, kind, optimized):
    shape_x, shape_w, geometry = CONVOLUTIONS[name]
    numbers = Numbers(kind, 1)
    x, w = numbers.codes(*shape_x), numbers.weights(*shape_w)
    scale_x, channels = numbers.one(), shape_w[0]
    scale_w = numbers.scale(5e-4, 2e-2, channels if per_channel else None)
    fan_in = int(np.prod(shape_w[1:]))
    b = torch.from_numpy(numbers.random.normal(size=channels) * 3000 * fan_in**0.5).to(torch.int32)
    scale_o = numbers.near(scale_x * float(scale_w.median()) * 100 * fan_in**0.5)
    graph = Graph()
    stride, padding, dilation, groups = geometry
    dims = x.dim() - 2
    y = graph.node(
        "Conv",
        graph.codes(x, scale_x),
        graph.parameter(w, scale_w, np.int8),
        graph.parameter(b, scale_x * scale_w, np.int32),
        kernel_shape=shape_w[2:],
        strides=[stride] * dims,
        pads=[padding] * 2 * dims,
        dilations=[dilation] * dims,
        group=groups,
    )
    found = graph.run(graph.quantized(y, scale_o), optimized)
    steps = (scale_x, scale_w.view(-1).tolist(), scale_o)
    assert_same(found, conv_kernel(x, w, b, geometry, steps))


@pytest.mark.parametrize("seed", range(6))
def test_accumulators_next_to_a_tie_and_beyond_float32_round_like_onnxruntime(seed):
    numbers = Numbers("decimal" if seed % 2 else "free", seed)
    scale_x, scale_o = numbers.one(), numbers.one(0.01, 0.1)
    scale_w = numbers.scale(1e-6, 1e-2, 600)
    b = numbers.tie_bias(multiplier(scale_x, scale_w.tolist(), scale_o))
    x = torch.from_numpy(numbers.random.integers(-2, 3, (2, 4, 6, 6))).to(torch.int8)
    w = torch.from_numpy(numbers.random.integers(-1, 2, (600, 4, 1, 1))).to(torch.int8)
    graph = Graph()
    y = graph.node(
        "Conv",
        graph.codes(x, scale_x),
        graph.parameter(w, scale_w, np.int8),
        graph.parameter(b, scale_x * scale_w, np.int32),
    )
    found = graph.run(graph.quantized(y, scale_o))
    assert int(b.abs().max()) > 2**24
    steps = (scale_x, scale_w.tolist(), scale_o)
    assert_same(found, conv_kernel(x, w, b, (1, 0, 1, 1), steps))


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_transposed_convolution_equals_onnxruntime_on_codes(kind, optimized):
    """ConvTranspose has no integer kernel; on codes it is exact, and `Mul` requantizes."""
    numbers = Numbers(kind, 2)
    x, w = numbers.codes(2, 12, 14, 14), numbers.weights(12, 20, 4, 4)
    scale_x, scale_w = numbers.one(), numbers.scale(5e-4, 2e-2, 20)
    scale_o = numbers.near(scale_x * float(scale_w.median()) * 1400)
    ratios = multiplier(scale_x, scale_w.tolist(), scale_o)
    b = numbers.tie_bias(ratios).clamp(-(2**23), 2**23)
    graph = Graph()
    one = torch.ones(())
    y = graph.node(
        "ConvTranspose",
        graph.codes(x, 1.0),
        graph.parameter(w, one, np.int8),
        graph.parameter(b, one, np.int32),
        strides=[2, 2],
        pads=[1] * 4,
    )
    y = graph.node("Mul", y, graph.constant(ratios.view(1, -1, 1, 1).numpy()))
    found = graph.run(graph.quantized(y, 1.0), optimized)
    steps = (scale_x, scale_w.tolist(), scale_o)
    assert_same(found, conv_kernel(x, w, b, (2, 1, 1, 1), steps, transposed=True))


def linear_kernel(x, w, b, scale_x, scale_w, scale_o):
    limits = (8, 8, 8, -128, 127)
    return integer_linear(x, w, b, scale_x, scale_w, scale_o, *limits, *ROUNDING, False)


@everywhere
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("shape", [(150, 60), (4, 30, 60), (2, 3, 10, 60)])
def test_linear_equals_onnxruntime(shape, ties, kind, optimized):
    numbers = Numbers(kind, 3)
    x, w = numbers.codes(*shape), numbers.weights(90, 60)
    scale_x, scale_w = numbers.one(), numbers.scale(5e-4, 2e-2, 90)
    scale_o = numbers.near(scale_x * float(scale_w.median()) * 800)
    b = numbers.tie_bias(multiplier(scale_x, scale_w.tolist(), scale_o))
    if ties:
        x = x.clamp(-1, 1)
    if not optimized:  # float kernels count to 2^24
        b = b.clamp(-(2**23), 2**23)
    graph = Graph()
    bias = graph.parameter(b, scale_x * scale_w, np.int32)
    if len(shape) == 2:
        weight = graph.parameter(w, scale_w, np.int8)
        y = graph.node("Gemm", graph.codes(x, scale_x), weight, bias, transB=1)
    else:
        weight = graph.parameter(w.t().contiguous(), scale_w, np.int8, axis=1)
        y = graph.node("Add", graph.node("MatMul", graph.codes(x, scale_x), weight), bias)
    found = graph.run(graph.quantized(y, scale_o), optimized)
    assert_same(found, linear_kernel(x, w, b, scale_x, scale_w.tolist(), scale_o))


@everywhere
def test_linear_with_float_output_equals_onnxruntime(kind, optimized):
    numbers = Numbers(kind, 4)
    x, w = numbers.codes(150, 60), numbers.weights(90, 60)
    scale_x, scale_w = numbers.one(), numbers.scale(5e-4, 2e-2, 90)
    b = torch.from_numpy(numbers.random.integers(-90000, 90000, 90)).to(torch.int32)
    graph = Graph()
    weight = graph.parameter(w, scale_w, np.int8)
    bias = graph.parameter(b, scale_x * scale_w, np.int32)
    y = graph.node("Gemm", graph.codes(x, scale_x), weight, bias, transB=1)
    found = graph.run(y, optimized, quantized=False)
    assert_same(found, linear_kernel(x, w, b, scale_x, scale_w.tolist(), 0.0))


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_convolution_with_float_output_equals_onnxruntime_beyond_float32(kind, optimized):
    """A Conv left in float would round differently; ConvInteger counts to 2^31."""
    numbers = Numbers(kind, 5)
    x, w = numbers.codes(1, 1200, 5, 5).clamp(100), numbers.weights(6, 1200, 3, 3).abs()
    scale_x, scale_w = numbers.one(), numbers.scale(5e-4, 2e-2, 6)
    b = torch.from_numpy(numbers.random.integers(-90000, 90000, 6)).to(torch.int32)
    graph = Graph()
    name = graph.codes(x, 1.0)
    stored = graph.nodes.pop().input[0]
    assert name
    zeros = graph.constant(np.uint8(ZERO)), graph.constant(np.int8(0))
    acc = graph.node("ConvInteger", stored, graph.constant(w.numpy()), *zeros)
    acc = graph.node("Add", acc, graph.constant(b.view(1, -1, 1, 1).numpy()))
    acc = graph.node("Cast", acc, to=TensorProto.FLOAT)
    factor = (torch.tensor(scale_x) * scale_w).view(1, -1, 1, 1)
    y = graph.node("Mul", acc, graph.constant(factor.numpy()))
    found = graph.run(y, optimized, quantized=False)
    ours = conv_kernel(x, w, b, (1, 0, 1, 1), (scale_x, scale_w.tolist(), 0.0))
    assert float((found / factor).abs().max()) > 2**24
    assert_same(found, ours)


@everywhere
def test_scale_and_shift_equals_a_depthwise_convolution(kind, optimized):
    numbers = Numbers(kind, 6)
    x, w = numbers.codes(2, 40, 15, 15), numbers.weights(40)
    scale_x, scale_w = numbers.one(), numbers.scale(5e-4, 2e-2, 40)
    scale_o = numbers.near(scale_x * float(scale_w.median()) * 100)
    b = numbers.tie_bias(multiplier(scale_x, scale_w.tolist(), scale_o)).clamp(-(2**23), 2**23)
    graph = Graph()
    y = graph.node(
        "Conv",
        graph.codes(x, scale_x),
        graph.parameter(w.view(40, 1, 1, 1), scale_w, np.int8),
        graph.parameter(b, scale_x * scale_w, np.int32),
        group=40,
    )
    found = graph.run(graph.quantized(y, scale_o), optimized)
    limits = (8, 8, 8, -128, 127)
    steps = (scale_x, scale_w.tolist(), scale_o)
    assert_same(found, integer_scale_shift(x, w, b, *steps, *limits, *ROUNDING, False))


def all_pairs() -> tuple[Tensor, Tensor]:
    codes = torch.arange(-128, 128).to(torch.int8)
    return codes.view(1, -1).expand(256, -1), codes.view(-1, 1).expand(-1, 256)


def binary_kernel(
    op: str, x: Tensor, y: Tensor, scale_x: float, scale_y: float, scale_o: float
) -> Tensor:
    steps, limits = (scale_x, scale_y, scale_o), (8, -128, 127)
    if op == "Mul":
        return integer_mul(x, y, *steps, *limits, *ROUNDING)
    sign = 1 if op == "Add" else -1
    return integer_add(x, y, sign, *steps, *limits, *ROUNDING, round_operands=False)


@everywhere
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
def test_every_pair_of_codes_equals_onnxruntime(op, kind, optimized):
    x, y = (codes.contiguous() for codes in all_pairs())
    for seed in range(12):
        numbers = Numbers(kind, seed)
        a, b = numbers.one(), numbers.one()
        o = numbers.near(a * b * 74 if op == "Mul" else 1.2 * max(a, b))
        graph = Graph()
        z = graph.node(op, graph.codes(x, a), graph.codes(y, b))
        found = graph.run(graph.quantized(z, o), optimized)
        assert_same(found, binary_kernel(op, x, y, a, b, o))


BROADCASTS = {
    "scalar": ((3, 7, 50), ()),
    "channels": ((3, 7, 50), (7, 1)),
    "rows": ((3, 7, 50), (50,)),
    "batch": ((3, 7, 50), (1, 7, 50)),
    "vector": ((40, 1), (1, 1)),
    "one value": ((1, 1), (1, 1)),
    "one value and a scalar": ((1, 1), ()),
}


@pytest.mark.parametrize("op", ["Add", "Mul"])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("name", BROADCASTS)
def test_broadcast_operands_equal_onnxruntime_in_either_order(name, constant, op):
    """The operand that is broadcast stands second, and both have the same rank."""
    for seed in range(80 if name.startswith("one") else 8):
        numbers = Numbers(("free", "decimal")[seed % 2], seed)
        x, y = (numbers.codes(*shape) for shape in BROADCASTS[name])
        a, b = numbers.one(), numbers.one()
        o = numbers.near(a * b * 74 if op == "Mul" else 1.2 * max(a, b))
        graph = Graph()
        expanded = y.view([1] * (x.dim() - y.dim()) + list(y.shape))
        second = graph.codes(expanded, b)
        if constant:
            stored = graph.nodes.pop().input[0]
            graph.inputs.pop()
            second = graph.dequantized(graph.constant(graph.feeds.pop(stored)), b)
        z = graph.node(op, graph.codes(x, a), second)
        found = graph.run(graph.quantized(z, o))
        assert torch.equal(found, binary_kernel(op, x, y, a, b, o))
        if not name.startswith("one"):
            assert torch.equal(found, binary_kernel(op, y, x, b, a, o))


@everywhere
@pytest.mark.parametrize("fresh", [True, False])
def test_concatenation_equals_onnxruntime(fresh, kind, optimized):
    for seed in range(8):
        numbers = Numbers(kind, seed)
        parts = [numbers.codes(2, n, 300) for n in (5, 6, 7)]
        scales = [numbers.one() for _ in parts]
        scale_o = numbers.one() if fresh else max(scales)
        graph = Graph()
        inputs = [graph.codes(x, s) for x, s in zip(parts, scales, strict=True)]
        found = graph.run(
            graph.quantized(graph.node("Concat", *inputs, axis=1), scale_o), optimized
        )
        assert_same(found, integer_cat(parts, 1, scales, scale_o, 8, *ROUNDING))


def codes_with_sums(sums: np.ndarray, count: int, seed: int) -> Tensor:
    """``[1, len(sums), count]`` codes with given sums."""
    base, rest = sums // count, sums % count
    codes = base[:, None] + (np.arange(count)[None] < rest[:, None])
    mixed = np.random.default_rng(seed).permuted(codes, axis=1)
    return torch.from_numpy(mixed[None]).to(torch.int8)


def sums_next_to_ties(count: int) -> np.ndarray:
    every = np.arange(-128 * count, 127 * count + 1, max(1, count // 7))
    ties = np.floor((np.arange(-128, 127) + 0.5) * count)
    sums = np.concatenate([every, ties, ties + 1])
    return np.unique(np.clip(sums, -128 * count, 127 * count)).astype(np.int64)


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("count", [2, 3, 6, 7, 49, 64, 100, 1000])
def test_mean_equals_onnxruntime_on_codes(count, optimized):
    """The scale stays, so the mean is one of codes; a sum and a division are exact everywhere."""
    x = codes_with_sums(sums_next_to_ties(count), count, 0)
    graph = Graph()
    total = graph.node("ReduceSum", graph.codes(x, 1.0), graph.constant(np.array([2])), keepdims=0)
    mean = graph.node("Div", total, graph.constant(np.float32(count)))
    found = graph.run(graph.quantized(mean, 1.0), optimized)
    assert_same(found, integer_mean(x, [2], False, 0.0371, 8, *ROUNDING))


POOLS = {
    "2x2": ((2, 2), (2, 2), (0, 0)),
    "2x3": ((2, 3), (2, 3), (0, 0)),
    "3x3 padded": ((3, 3), (2, 2), (1, 1)),
    "6x5": ((6, 5), (3, 4), (0, 0)),
    "1d": ((6,), (2,), (2,)),
    "3d": ((2, 3, 2), (2, 2, 2), (1, 1, 1)),
}


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("with_padding", [True, False])
@pytest.mark.parametrize("name", POOLS)
def test_average_pool_equals_onnxruntime_on_codes(name, with_padding, optimized):
    kernel, stride, padding = POOLS[name]
    x = codes_with_sums(sums_next_to_ties(int(np.prod(kernel))), int(np.prod(kernel)), 1)
    x = torch.cat([x, x.flip(1), x.roll(7, 1)], -1)
    x = x.view(1, -1, *(k * (3 if d == 0 else 1) for d, k in enumerate(kernel)))
    graph = Graph()
    mean = graph.node(
        "AveragePool",
        graph.codes(x, 1.0),
        kernel_shape=kernel,
        strides=stride,
        pads=padding * 2,
        count_include_pad=int(with_padding),
    )
    found = graph.run(graph.quantized(mean, 1.0), optimized)
    step = 0.0371
    ours = integer_avg_pool(
        x, kernel, stride, padding, False, with_padding, 0, step, step, 8, *ROUNDING
    )
    assert_same(found, ours)


@everywhere
def test_max_pool_equals_onnxruntime(kind, optimized):
    numbers = Numbers(kind, 7)
    x, scale = numbers.codes(2, 10, 20, 20), numbers.one()
    graph = Graph()
    y = graph.node(
        "MaxPool", graph.codes(x, scale), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4
    )
    found = graph.run(graph.quantized(y, scale), optimized)
    assert_same(found, integer_max_pool(x, [3, 3], [2, 2], [1, 1], [1, 1], False, "onnxruntime"))


@everywhere
def test_clamping_equals_onnxruntime(kind, optimized):
    codes = torch.arange(-128, 128).to(torch.int8)
    for seed in range(20):
        scale = Numbers(kind, seed).one()
        edge = torch.tensor(90) * torch.tensor(scale)
        graph = Graph()
        bounds = graph.constant(np.float32(0)), graph.constant(edge.numpy())
        y = graph.node("Clip", graph.node("Relu", graph.codes(codes, scale)), *bounds)
        found = graph.run(graph.quantized(y, scale), optimized)
        assert_same(found, integer_clamp(codes, 0, 90, 8, "onnxruntime"))


@everywhere
def test_quantizing_equals_onnxruntime_next_to_ties(kind, optimized):
    for seed in range(10):
        numbers = Numbers(kind, seed)
        scale = numbers.one()
        ties = ((np.arange(-140, 140) + 0.5) * scale).astype(np.float32)
        spread = (numbers.random.normal(size=2000) * scale * 60).astype(np.float32)
        around = np.concatenate([ties, np.nextafter(ties, 1e9), np.nextafter(ties, -1e9), spread])
        x = torch.from_numpy(np.concatenate([around, np.float32([1e30, -1e30, 0])]))
        graph = Graph()
        graph.inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape)))
        graph.feeds["x"] = x.numpy()
        found = graph.run(graph.quantized("x", scale), optimized)
        assert_same(found, quantize(x, scale, 8, -128, 127, *ROUNDING))


@everywhere
def test_requantizing_by_powers_of_two_equals_onnxruntime_on_codes(kind, optimized):
    codes = torch.arange(-128, 128).to(torch.int8)
    for shift in (1, 2, 4):
        scale = Numbers(kind, shift).one()
        graph = Graph()
        found = graph.run(graph.quantized(graph.codes(codes, 1.0), 2.0**shift), optimized)
        ours = requantize(codes, scale, scale * 2.0**shift, 8, 8 - shift, *ROUNDING)
        assert_same(found.clamp(-(2 ** (7 - shift)), 2 ** (7 - shift) - 1), ours)


def test_multiply_add_is_rounded_once():
    # 128 + 2^-17 is a float32 tie; what lies 2^-48 above it is lost in a float64 sum.
    a, b = torch.tensor([2.0**-8]), torch.tensor([2.0**-9])
    tie = torch.tensor([128.0])
    assert _multiply_add(a, b, tie).item() == 128.0
    above = torch.tensor([2.0**-9 * (1 + 2.0**-20)])
    assert (a.double() * above.double() + 128.0).float().item() > 128.0
    a, above = torch.tensor([2.0**-8 * (1 + 2.0**-23)]), torch.tensor([2.0**-9 * (1 + 2.0**-23)])
    tiny = torch.tensor([2.0**-8 * (1 + 2.0**-16)]), torch.tensor([2.0**-9 * (1 - 2.0**-16)])
    for x, y in ((a, above), tiny):
        for sign in (1.0, -1.0):
            c = torch.tensor([sign * 128.0])
            found = _multiply_add(x * sign, y, c).double().item()
            exact = float(x.double()) * float(y.double())
            wanted = 128.0 + (2.0**-16 if exact > 2.0**-17 else 0.0)
            assert found == sign * wanted
