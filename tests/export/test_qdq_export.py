"""Integer forward == onnxruntime on the exported ``qdq`` model, element for element.

With free scales under onnxruntime's default optimizations, with power-of-two scales without any
optimization too.
"""

import collections
import random
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_linger as linger
from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.dialects import DIALECTS
from lightning_linger.export.exporter import export_onnx
from lightning_linger.export.qdq import QDQ, qdq_dialect
from tests.models import Block, Chain, Lambda, ResNet, trained

DIALECTS.setdefault(QDQ.name, QDQ)


def config(**fields: Any) -> linger.QuantConfig:
    return linger.QuantConfig(platform="onnxruntime", **fields)


def session(path: Any, optimized: bool, kept: Any = None, **entries: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    for name, value in entries.items():
        options.add_session_config_entry(name.replace("__", "."), value)
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if kept is not None:
        options.optimized_model_filepath = str(kept)
    return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])


@torch.no_grad()
def integers(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with linger.integer(model):
        return tree_leaves(model(*inputs))


def differences(
    model: nn.Module, inputs: tuple[Tensor, ...], running: ort.InferenceSession
) -> tuple[int, int]:
    """How many output elements differ, and of how many."""
    names = [value.name for value in running.get_inputs()]
    found = running.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    ours = integers(model, *inputs)
    count = 0
    for a, b in zip(ours, found, strict=True):
        assert a.dtype == torch.from_numpy(b).dtype
        assert a.shape == b.shape
        count += int((a != torch.from_numpy(b)).sum())
    varied = sum(a.numel() for a in ours if a.numel() > 1 and a.std() > 0)
    assert varied, "the test says nothing about constant outputs"
    return count, varied


def assert_exact(
    make: Any,
    inputs: tuple[Tensor, ...],
    folder: Any,
    scales: tuple[str, ...] = ("free", "power_of_two"),
    **fields: Any,
) -> int:
    """Train, export and compare; return how many elements were equal."""
    compared = 0
    fold = fields.pop("fold", None)
    for scale in scales:
        torch.manual_seed(1)
        model = trained(make(), *inputs, config=config(scale=scale, **fields), fold=fold, steps=2)
        path = export_onnx(model, inputs, folder / f"{scale}.onnx", dialect="qdq")
        for optimized in (True, False)[: 1 if scale == "free" else 2]:
            wrong, total = differences(model, inputs, session(path, optimized))
            assert wrong == 0, f"{wrong} of {total} differ ({scale=}, {optimized=})"
            compared += total
    return compared


# --- op by op -----------------------------------------------------------------------------------


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)) * 1.3


X2, X1, X3 = (4, 6, 11, 12), (4, 6, 40), (2, 4, 6, 7, 8)


def on_conv(forward: Any, **layers: nn.Module) -> Any:
    """A model whose op works on the outputs of two convolutions of different scale."""

    def run(m: Any, x: Tensor) -> Any:
        return forward(m, m.a(x), m.b(x) * 3)

    return lambda: Lambda(run, a=nn.Conv2d(6, 8, 3), b=nn.Conv2d(6, 8, 3), **layers)


def pools(*layers: nn.Module) -> Any:
    def run(m: Any, a: Tensor, b: Tensor) -> Any:
        return [layer(a) for layer in layers]

    return on_conv(run, layers=nn.ModuleList(layers))


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv": (lambda: Chain(nn.Conv2d(6, 16, 3, padding=1), nn.Conv2d(16, 8, 1)), X2),
    "conv, strided and dilated": (
        lambda: Chain(nn.Conv2d(6, 9, 3, stride=2, padding=2, dilation=2, bias=False)),
        X2,
    ),
    "groups": (lambda: Chain(nn.Conv2d(6, 12, 3, groups=3), nn.Conv2d(12, 12, 3, groups=12)), X2),
    "conv1d": (lambda: Chain(nn.Conv1d(6, 9, 5, padding=2), nn.Conv1d(9, 9, 3, groups=9)), X1),
    "conv3d": (lambda: Chain(nn.Conv3d(4, 6, 3, padding=1)), X3),
    "no batch": (lambda: Chain(nn.Conv2d(6, 16, 3), nn.MaxPool2d(2), nn.AvgPool2d(2)), X2[1:]),
    "transposed": (
        lambda: Chain(
            nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 4, stride=2, groups=4, bias=False),
        ),
        X2,
    ),
    "transposed, 1d": (lambda: Chain(nn.ConvTranspose1d(6, 8, 4, stride=2)), X1),
    "transposed, 3d": (lambda: Chain(nn.ConvTranspose3d(4, 4, 2, stride=2)), X3),
    "linear, vector": (lambda: Chain(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10)), (30,)),
    "linear, 2d": (lambda: Chain(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10)), (50, 30)),
    "linear, 3d": (lambda: Chain(nn.Linear(30, 20), nn.Linear(20, 9, bias=False)), (7, 6, 30)),
    "linear, 4d": (lambda: Chain(nn.Linear(30, 20), nn.ReLU6()), (3, 4, 5, 30)),
    "batch norm": (lambda: Chain(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)), X2),
    "batch norm, 2d": (lambda: Chain(nn.Linear(30, 9), nn.ReLU(), nn.BatchNorm1d(9)), (40, 30)),
    "batch norm, 1d": (lambda: Chain(nn.BatchNorm1d(6), nn.Conv1d(6, 6, 3)), X1),
    "clamps": (
        on_conv(
            lambda m, a, b: (
                (a + b).relu(),
                F.relu6(b),
                F.hardtanh(a.flatten(1), -0.4, 0.3),
                b.clamp(max=0.5),
            )
        ),
        X2,
    ),
    "clamps of used values": (
        on_conv(lambda m, a, b: (a, F.relu(a), F.relu6(b) * 2, b.clamp(-1.0, 0.25))),
        X2,
    ),
    "add, sub, mul": (on_conv(lambda m, a, b: (a + b, a - b, b - a, a * b, b + b)), X2),
    "numbers": (
        on_conv(lambda m, a, b: (a + 0.7, 0.3 - a, b * 0.11, -2.5 * b, b - 1, a * 0 + b)),
        X2,
    ),
    "broadcast": (
        on_conv(
            lambda m, a, b: (
                a + b.mean((2, 3), keepdim=True),
                b.mean((2, 3), keepdim=True) + a,
                a * b[:, :1],
                a[0, 0] + b,
                b[:1] - a,
                a.mean((1, 2, 3)).reshape(4, 1, 1, 1) + b,
            )
        ),
        X2,
    ),
    "cat": (
        on_conv(lambda m, a, b: (torch.cat([a, b, a], 1), torch.cat([a * 0.1, b], -1))),
        X2,
    ),
    "average pools": (
        pools(
            nn.AvgPool2d(2),
            nn.AvgPool2d(3, stride=2, padding=1),
            nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
            nn.AvgPool2d(2, stride=3, ceil_mode=True),
            nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
            nn.AvgPool2d((3, 2), divisor_override=5),
            nn.AvgPool2d((9, 10)),
            nn.AdaptiveAvgPool2d(1),
            nn.AdaptiveAvgPool2d((3, 5)),
        ),
        X2,
    ),
    "maximum pools": (
        pools(
            nn.MaxPool2d(2),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.MaxPool2d(2, dilation=2),
            nn.MaxPool2d(2, stride=3, ceil_mode=True),
            nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        ),
        X2,
    ),
    "pools, 1d": (
        lambda: Lambda(
            lambda m, x: (
                F.max_pool1d(m.a(x), 3, 2),
                F.avg_pool1d(m.a(x), 6, 4),
                F.adaptive_avg_pool1d(m.a(x), 1),
            ),
            a=nn.Conv1d(6, 6, 3),
        ),
        X1,
    ),
    "pools, 3d": (
        lambda: Chain(nn.Conv3d(4, 6, 1), nn.MaxPool3d(2, 1), nn.AvgPool3d((2, 3, 2), padding=1)),
        X3,
    ),
    "means": (
        on_conv(
            lambda m, a, b: (
                a.mean((2, 3)),
                b.mean(1, keepdim=True),
                a.mean(-1),
                b.mean((1, 3)).mean(1, keepdim=True),
            )
        ),
        X2,
    ),
    "movement": (
        on_conv(
            lambda m, a, b: (
                a.flatten(1)[:, 3:-5],
                b.reshape(4, 16, -1).transpose(1, 2),
                torch.cat(a.permute(0, 2, 3, 1).chunk(3, -1)[1:], -1),
                b[:, 2].unsqueeze(1)[..., ::2].squeeze(1),
                torch.cat(b.split([3, 5], 1)[::-1], 1).contiguous(),
                a.unflatten(1, (2, 4)).movedim(1, 0),
            )
        ),
        X2,
    ),
    "pad": (
        on_conv(
            lambda m, a, b: (
                F.pad(a, (1, 2, 0, 1)),
                F.pad(b, (1, 1, 1, 1), value=0.9),
                F.pad(a, (2, 1, 0, 2), mode="reflect"),
                F.pad(b, (1, 1, 2, 2), mode="replicate"),
                F.pad(a, (1, 1, 1, 1), mode="circular"),
            )
        ),
        X2,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_integer_forward_equals_onnxruntime(name, tmp_path):
    make, shape = MODELS[name]
    assert assert_exact(make, (randn(*shape),), tmp_path) > 0


def test_average_over_a_whole_map_of_ties(tmp_path):
    """onnxruntime's fused kernel multiplies by 1 / 14, which takes ties for more or less."""

    def make() -> nn.Module:
        return Lambda(
            lambda m, x: (
                F.avg_pool2d(m.a(x), (2, 7)),
                F.adaptive_avg_pool2d(m.a(x), 1),
                m.a(x).mean((2, 3)),
            ),
            a=nn.Conv2d(6, 64, 1),
        )

    assert_exact(make, (randn(16, 6, 2, 7),), tmp_path)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("weight_bits", [4, 5, 7])
def test_weight_bits_and_granularity(weight_bits, granularity, tmp_path):
    def make() -> nn.Module:
        return Lambda(
            lambda m, x: m.fc(m.up(F.relu(m.conv(x)))),
            conv=nn.Conv2d(6, 8, 3),
            up=nn.ConvTranspose2d(8, 4, 2, stride=2),
            fc=nn.Linear(20, 5),
        )

    fields = {"weight_bits": weight_bits, "granularity": granularity}
    assert_exact(make, (randn(*X2),), tmp_path, **fields)


@pytest.mark.parametrize("activation_bits", [4, 6, 16])
def test_activation_bits(activation_bits, tmp_path):
    """Narrow codes are clamped in the storage of 8 bits; 16 bits are exact below 2^24."""

    def make() -> nn.Module:
        return Lambda(
            lambda m, x: F.avg_pool2d(F.pad(F.relu(m.conv(x)) + m.skip(x), (1, 1)), 2) * 0.5,
            conv=nn.Conv2d(2, 4, 1),
            skip=nn.Conv2d(2, 4, 1),
        )

    fields = {"activation_bits": activation_bits, "output_bits": activation_bits, "weight_bits": 6}
    assert_exact(make, (randn(4, 2, 9, 10),), tmp_path, **fields)


def test_widths_change_between_layers(tmp_path):
    inputs = (randn(4, 2, 9, 10),)
    for scale in ("free", "power_of_two"):
        model = Chain(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
        overrides = {"net.0": {"output_bits": 16}, "net.1": {"output_bits": 5}}
        trained(model, *inputs, config=config(scale=scale), overrides=overrides)
        path = export_onnx(model, inputs, tmp_path / "m.onnx", dialect="qdq")
        assert differences(model, inputs, session(path, True))[0] == 0


@pytest.mark.parametrize("output_bits", [None, 32])
def test_outputs_that_are_not_quantized(output_bits, tmp_path):
    def make() -> nn.Module:
        return Lambda(
            lambda m, x: (
                m.conv(x),
                m.depth(x),
                m.fc(x),
                m.fc(x[0, 0]),
                m.fc2(x[0, 0, 0]),
                m.up(x),
                m.bn(x),
            ),
            conv=nn.Conv2d(6, 8, 3),
            depth=nn.Conv2d(6, 6, 3, groups=6, bias=False),
            fc=nn.Linear(12, 7),
            fc2=nn.Linear(12, 7, bias=False),
            up=nn.ConvTranspose2d(6, 5, 2),
            bn=nn.BatchNorm2d(6),
        )

    fields = {"output_bits": output_bits} | ({"granularity": "tensor"} if output_bits else {})
    assert_exact(make, (randn(*X2),), tmp_path, **fields)


# --- networks -----------------------------------------------------------------------------------


class Stack(nn.Module):
    """Blocks of channels and resolution that stay, so that many elements come out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.layers = nn.Sequential(Block(16), Block(16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layers(torch.relu(self.bn(self.stem(x))))
        return x, self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("fold", ["running", None])
def test_residual_network_of_many_elements(fold, tmp_path):
    """Exact with the examples that set the ranges, with others, and where codes saturate."""
    torch.manual_seed(0)
    model = trained(Stack(), randn(8, 3, 32, 32), config=config(), fold=fold, steps=2, lr=0.01)
    path = export_onnx(model, (randn(8, 3, 32, 32),), tmp_path / "m.onnx", dialect="qdq")
    running = session(path, True)
    for factor in (1.0, 0.3, 4.0):
        wrong, total = differences(model, (torch.randn(8, 3, 32, 32) * factor,), running)
        assert total > 100_000
        assert wrong == 0


def test_convolutions_and_sums_run_on_integers(tmp_path):
    x = torch.randn(4, 3, 12, 12)
    model = trained(ResNet(), x, config=config(), fold="running")
    path = export_onnx(model, (x,), tmp_path / "m.onnx", dialect="qdq")
    session(path, True, kept=tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    found = collections.Counter(node.op_type for node in graph.node)
    wanted = {"QLinearConv": 5, "QLinearAdd": 2, "QGemm": 1}
    assert {op: found[op] for op in wanted} == wanted
    assert not {"Conv", "Gemm", "MatMul", "Add", "FusedConv", "FusedGemm"} & set(found)


def test_the_file_is_float_in_and_out_and_says_what_it_is(tmp_path):
    x = torch.randn(4, 3, 12, 12)
    model = trained(ResNet(), x, config=config(), fold="running")
    path = export_onnx(model, (x,), tmp_path / "m.onnx", dialect="qdq")
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    ends = [*proto.graph.input, *proto.graph.output]
    assert {v.type.tensor_type.elem_type for v in ends} == {onnx.TensorProto.FLOAT}
    assert {node.domain for node in proto.graph.node} == {""}
    zeros = {
        int(onnx.numpy_helper.to_array(i))
        for i in proto.graph.initializer
        if i.data_type == onnx.TensorProto.UINT8 and i.name.endswith("zero_point")
    }
    assert zeros == {128}
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata["lightning_linger.dialect"] == "qdq"


OPERATIONS = (
    *("conv", "depthwise", "groups", "pointwise", "up", "bn", "conv_bn", "conv_bn_relu"),
    *("relu", "relu6", "residual", "sub", "mul", "scale", "shift", "cat", "avg", "max", "pad"),
    *("gate", "channels_last_linear", "slice", "shuffle"),
)


class RandomNet(nn.Module):
    """A chain of operations, each with a small random geometry."""

    def __init__(self, operations: list[str], seed: int) -> None:
        super().__init__()
        self.operations = operations
        draw = random.Random(seed)
        channels = 4
        self.stem = nn.Conv2d(2, channels, 3, padding=1)
        self.layers = nn.ModuleList()
        self.numbers = [draw.choice([0.11, -0.7, 1.5, 2.0, 3.3]) for _ in operations]
        for op in operations:
            kernel = draw.choice([1, 2, 3])
            layer: nn.Module = nn.Identity()
            if op in ("conv", "conv_bn", "conv_bn_relu", "residual"):
                layer = nn.Conv2d(4, 4, 3, padding=1, bias=draw.random() < 0.5)
            elif op == "depthwise":
                layer = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            elif op == "groups":
                layer = nn.Conv2d(4, 4, kernel, padding=1, groups=2)
            elif op in ("pointwise", "cat"):
                layer = nn.Conv2d(8 if op == "cat" else 4, 4, 1)
            elif op == "up":
                layer = nn.ConvTranspose2d(4, 4, kernel, groups=draw.choice([1, 2]))
            elif op == "channels_last_linear":
                layer = nn.Linear(4, 4, bias=draw.random() < 0.5)
            elif op == "bn":
                layer = nn.BatchNorm2d(4)
            elif op == "avg":
                layer = nn.AvgPool2d(kernel, 1, draw.choice([0, kernel // 2]))
            elif op == "max":
                layer = nn.MaxPool2d(kernel, 1, kernel // 2)
            if op.startswith("conv_bn"):
                layer = nn.Sequential(layer, nn.BatchNorm2d(4))
            self.layers.append(layer)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = x = self.stem(x)
        for op, layer, number in zip(self.operations, self.layers, self.numbers, strict=True):
            x = self.step(op, layer, number, x, first)
        return x, self.fc(x.mean((2, 3)))

    def step(self, op: str, layer: nn.Module, number: float, x: Tensor, first: Tensor) -> Tensor:
        same = x.shape == first.shape
        if op == "relu" or op == "conv_bn_relu":
            return F.relu(layer(x))
        if op == "relu6":
            return F.relu6(x)
        if op == "residual":
            return F.relu(layer(x) + x)
        if op == "sub":
            return x - first if same and x is not first else number - x
        if op == "mul":
            return x * first if same else x * x
        if op == "scale":
            return x * number
        if op == "shift":
            return number + x
        if op == "cat":
            return layer(torch.cat([x, F.relu(x) * number], 1))
        if op == "pad":
            return F.pad(x, (1, 0, 0, 1))[:, :, :9, :9]
        if op == "gate":
            return x * x.mean((2, 3), keepdim=True)
        if op == "channels_last_linear":
            return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if op == "slice":
            return x[:, :, 1:] if x.shape[2] > 4 else x
        if op == "shuffle":
            return x.reshape(x.shape[0], 2, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return layer(x)


@pytest.mark.slow
@settings(max_examples=32, phases=[Phase.generate])  # shrinking would take minutes
@given(
    operations=st.lists(st.sampled_from(OPERATIONS), min_size=2, max_size=7),
    seed=st.integers(0, 1000),
    scale=st.sampled_from(["free", "power_of_two"]),
    weight_bits=st.integers(4, 8),
    granularity=st.sampled_from(["tensor", "channel"]),
    fold=st.sampled_from(["running", None]),
)
def test_random_networks(tmp_path_factory, operations, seed, scale, weight_bits, granularity, fold):
    assert_exact(
        lambda: RandomNet(operations, seed),
        (randn(4, 2, 8, 9),),
        tmp_path_factory.mktemp("random"),
        scales=(scale,),
        weight_bits=weight_bits,
        granularity=granularity,
        fold=fold,
    )


# --- options and refusals -----------------------------------------------------------------------


def test_signed_storage_holds_the_same_codes(tmp_path, monkeypatch):
    monkeypatch.setitem(DIALECTS, "qdq_signed", qdq_dialect("qdq_signed", signed=True))
    inputs = (randn(4, 3, 12, 12),)
    model = trained(ResNet(), *inputs, config=config(scale="power_of_two"), fold="running")
    path = export_onnx(model, inputs, tmp_path / "m.onnx", dialect="qdq_signed")
    types = {i.data_type for i in onnx.load(path).graph.initializer}
    assert onnx.TensorProto.UINT8 not in types
    assert differences(model, inputs, session(path, False))[0] == 0
    integers_allowed = {"session__qdqisint8allowed": "1"}
    assert differences(model, inputs, session(path, True, **integers_allowed))[0] == 0


def test_other_platforms_are_refused(tmp_path):
    x = randn(4, 3, 12, 12)
    model = trained(ResNet(), x, config=linger.QuantConfig(platform="venusa"))
    with pytest.raises(UnsupportedError, match=r"`stem/conv2d/0`.*'venusa'.*dialect='linger'"):
        export_onnx(model, (x,), tmp_path / "m.onnx", dialect="qdq")
    assert not list(tmp_path.iterdir())


def test_other_rounding_is_refused(tmp_path):
    x = randn(4, 3, 12, 12)
    model = trained(ResNet(), x, config=config(rounding="half_up"))
    with pytest.raises(UnsupportedError, match=r"half to even.*'half_up'"):
        export_onnx(model, (x,), tmp_path / "m.onnx", dialect="qdq")


def test_what_float32_cannot_count_is_refused(tmp_path):
    x = randn(2, 600, 4, 4)
    model = Chain(nn.ConvTranspose2d(600, 4, 3))
    nn.init.constant_(model.net[0].weight, 0.1)
    trained(model, x, config=config())
    with pytest.raises(UnsupportedError, match=r"`net.0/conv_transpose2d/0`.*2\^24.*weight_bits"):
        export_onnx(model, (x,), tmp_path / "m.onnx", dialect="qdq")
    wide = trained(
        Lambda(lambda m, x: m.conv(x).mean((2, 3)), conv=nn.Conv2d(1, 1, 1)),
        randn(1, 1, 30, 30),
        config=config(activation_bits=16, output_bits=16),
    )
    with pytest.raises(UnsupportedError, match=r"900 codes of 16 bits"):
        export_onnx(wide, (randn(1, 1, 30, 30),), tmp_path / "m.onnx", dialect="qdq")


def test_accumulators_beyond_float32_are_exact_with_optimizations(tmp_path):
    """3x3 over many channels passes 2^24; onnxruntime's integer kernels count on."""
    torch.manual_seed(0)
    x = torch.randn(2, 800, 6, 6).abs() + 2
    layers = nn.Conv2d(800, 8, 3), nn.Conv2d(800, 8, 3)
    for layer in layers:
        nn.init.uniform_(layer.weight, 0.01, 0.02)
    make = Lambda(lambda m, x: (m.a(x), m.b(x)), a=layers[0], b=layers[1])
    model = trained(make, x, config=config(), overrides={"b": {"output_bits": None}})
    path = export_onnx(model, (x,), tmp_path / "m.onnx", dialect="qdq")
    biggest = np.abs(integers(model, x)[1].double().numpy()).max()
    steps = model.get_submodule("_linger").find("b/conv2d/0").prepared["weights"]
    assert biggest / (steps.scale_x * max(steps.steps)) > 2**24
    assert differences(model, (x,), session(path, True))[0] == 0
