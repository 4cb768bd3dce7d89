"""What a user may ask of an export: names, open sizes, opsets, storage, files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_linger as linger
from lightning_linger.export import written
from lightning_linger.export.engines import engine_of
from tests.models import Chain, Lambda, ResNet, images, trained

DIALECTS = {"linger": "venusa", "qdq": "onnxruntime"}
each_dialect = pytest.mark.parametrize(("dialect", "platform"), DIALECTS.items(), ids=DIALECTS)


def quantized(
    model: nn.Module, *inputs: Any, platform: str = "onnxruntime", **fields: Any
) -> nn.Module:
    return trained(model, *inputs, config=linger.QuantConfig(platform=platform, **fields), steps=2)


@torch.no_grad()
def integers(model: nn.Module, *args: Any, **kwargs: Any) -> list[np.ndarray]:
    with linger.integer(model):
        return [x.numpy() for x in tree_leaves(model(*args, **kwargs))]


def assert_equal(path: Path, dialect: str, model: nn.Module, *inputs: Tensor) -> None:
    found = engine_of(path, dialect)([x.numpy() for x in inputs])
    expected = integers(model, *inputs)
    assert len(found) == len(expected)
    for ours, theirs in zip(expected, found, strict=True):
        assert ours.shape == theirs.shape
        assert np.array_equal(ours, theirs)
        assert ours.std() > 0


def dims(value: Any) -> list[Any]:
    found = value.type.tensor_type.shape.dim
    return [d.dim_param or d.dim_value for d in found]


# --- names --------------------------------------------------------------------------------------


class TwoWay(nn.Module):
    """Two inputs, one of them in a dictionary, and two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, a: Tensor, rest: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = self.left(a), self.right(rest["b"])
        return {"sum": a + b, "product": a * b}


@each_dialect
def test_inputs_and_outputs_take_the_names_that_are_given(
    dialect: str, platform: str, tmp_path: Path
) -> None:
    a, b = torch.randn(3, 6), torch.randn(3, 4)
    model = quantized(TwoWay(), a, {"b": b}, platform=platform)
    path = linger.export_onnx(model, (a, {"b": b}), tmp_path / "own.onnx", dialect)
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["a", "rest_b"]
    assert [value.name for value in graph.output] == ["sum", "product"]
    path = linger.export_onnx(
        model,
        (a,),
        tmp_path / "given.onnx",
        dialect,
        {"rest": {"b": b}},
        input_names=["first", "left/linear/0"],
        output_names=["first", "total"],
    )
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["first", "left/linear/0"]
    # An input keeps its name; a file has one value per name.
    assert [value.name for value in graph.output] == ["first_output", "total"]
    found = engine_of(path, dialect)([a.numpy(), b.numpy()])
    for ours, theirs in zip(integers(model, a, {"b": b}), found, strict=True):
        assert np.array_equal(ours, theirs)


# --- open sizes ---------------------------------------------------------------------------------


class Attention(nn.Module):
    """Views, transposes and products whose shapes hold the batch and the length."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class LastStep(nn.Module):
    """A slice to the end of an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(4, 6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x)[:, :, -1])


OPEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (ResNet, (4, 3, 12, 12)),
    "resnet, one image": (ResNet, (1, 3, 12, 12)),
    "linear in three dimensions": (lambda: Chain(nn.Linear(6, 5), nn.ReLU()), (3, 4, 6)),
    "flatten": (
        lambda: Chain(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)),
        (2, 2, 6, 6),
    ),
    "sequence": (
        LastStep,
        (2, 4, 9),
    ),
}


QUICK = ("resnet, one image", "flatten")


@each_dialect
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPEN]
)
def test_a_batch_may_have_any_size(name: str, dialect: str, platform: str, tmp_path: Path) -> None:
    make, shape = OPEN[name]
    x = torch.randn(shape)
    model = quantized(make(), torch.randn(6, *shape[1:]), platform=platform)
    axes = {"x": {0: "batch"}}
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", dialect, dynamic_axes=axes)
    graph = onnx.load(path).graph
    assert dims(graph.input[0])[0] == dims(graph.output[0])[0] == "batch"
    for batch in (1, 3, 8):
        assert_equal(path, dialect, model, torch.randn(batch, *shape[1:]))


def test_several_axes_may_be_open(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8)
    model = quantized(Attention(), x)
    path = linger.export_onnx(
        model,
        (x,),
        tmp_path / "m.onnx",
        "qdq",
        input_names=["frames"],
        dynamic_axes={"frames": {0: "batch", 1: "time"}},
    )
    graph = onnx.load(path).graph
    assert dims(graph.input[0]) == ["batch", "time", 8]
    for batch, length in ((1, 5), (3, 7), (2, 16)):
        assert_equal(path, "qdq", model, torch.randn(batch, length, 8))


def shifted(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    return m.out(y[:, 1:]).transpose(0, 1)


def test_slices_to_the_end_and_moved_axes_stay_open(tmp_path: Path) -> None:
    # One sample: a transpose of it could be written as a reshape.
    x = torch.randn(1, 5, 6)
    layers = {"fc": nn.Linear(6, 4), "out": nn.Linear(4, 3)}
    model = quantized(Lambda(shifted, **layers), torch.randn(4, 5, 6), platform="venusa")
    axes = {"input_0": {0: "batch", 1: "time"}}
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "linger", dynamic_axes=axes)
    assert dims(onnx.load(path).graph.output[0]) == [0, "batch", 3]
    for batch, length in ((1, 5), (3, 9)):
        assert_equal(path, "linger", model, torch.randn(batch, length, 6))


def test_an_axis_of_several_inputs_is_one(tmp_path: Path) -> None:
    a, b = torch.randn(2, 6), torch.randn(2, 4)
    model = quantized(TwoWay(), a, {"b": b})
    axes = {"a": {0: "n"}, "rest_b": {0: "n"}}
    path = linger.export_onnx(model, (a, {"b": b}), tmp_path / "m.onnx", "qdq", dynamic_axes=axes)
    a, b = torch.randn(5, 6), torch.randn(5, 4)
    found = engine_of(path, "qdq")([a.numpy(), b.numpy()])
    for ours, theirs in zip(integers(model, a, {"b": b}), found, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.slow
def test_a_float_stage_may_have_open_sizes_too(tmp_path: Path) -> None:
    model = linger.fuse_bn(linger.prepare(ResNet(), (images(),))).eval()
    axes = {"x": {0: "batch"}}
    path = linger.export_onnx(model, (images(),), tmp_path / "m.onnx", dynamic_axes=axes)
    x = images(7)
    (found,) = engine_of(path, "qdq")([x.numpy()])
    assert np.allclose(found, model(x).detach().numpy(), atol=1e-5)


def merged(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    return y.reshape(y.shape[1], y.shape[0] * y.shape[2])


def averaged(m: Any, x: Tensor) -> Tensor:
    return m.fc(x).mean(1)


def numbered(m: Any, x: Tensor) -> Tensor:
    return m.fc(x) + torch.arange(x.shape[0]).view(-1, 1, 1) * 0.25


def unrolled(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    return torch.stack([y[i] for i in range(y.shape[0])])


def both(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    return y.reshape(2, x.shape[0] // 2, x.shape[1] // 2, 10)


NOT_OPEN: dict[str, tuple[Callable[..., Tensor], dict[int, str], str]] = {
    "a mean over it": (averaged, {1: "time"}, r"`/mean/0.*'time' cannot stay open"),
    "a constant as long as the batch": (numbered, {0: "batch"}, r"'batch' cannot stay open"),
    "a loop over the batch": (unrolled, {0: "batch"}, r"'batch' cannot stay open"),
    "a reshape of two open axes": (both, {0: "batch", 1: "time"}, r"Reshape.*reshape to -1 in one"),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name.startswith("a reshape") else pytest.param(name, marks=pytest.mark.slow)
        for name in NOT_OPEN
    ],
)
def test_what_depends_on_an_open_size_is_refused(name: str, tmp_path: Path) -> None:
    forward, axes, message = NOT_OPEN[name]
    x = torch.randn(4, 4, 6)
    model = quantized(Lambda(forward, fc=nn.Linear(6, 5)), x)
    linger.export_onnx(model, (x,), tmp_path / "fixed.onnx", "qdq")
    with pytest.raises(linger.UnsupportedError, match=f"(?s){message}"):
        linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq", dynamic_axes={"input_0": axes})
    assert [path.name for path in tmp_path.iterdir()] == ["fixed.onnx"]


def test_a_reshape_that_merges_an_open_axis_follows_from_the_others(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6)
    model = quantized(Lambda(merged, fc=nn.Linear(6, 5)), x)
    axes = {"input_0": {0: "batch"}}
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq", dynamic_axes=axes)
    assert_equal(path, "qdq", model, torch.randn(5, 3, 6))


# --- opsets and storage -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opset", [18, 23, *(pytest.param(opset, marks=pytest.mark.slow) for opset in (19, 20, 21, 22))]
)
def test_every_opset_runs_and_gives_the_same_integers(opset: int, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6, 6)
    model = quantized(Chain(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2)), x)
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq", opset_version=opset)
    assert [entry.version for entry in onnx.load(path).opset_import] == [opset]
    assert_equal(path, "qdq", model, x)


def test_wide_codes_need_a_newer_opset(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    model = quantized(Chain(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), x, output_bits=16)
    with pytest.raises(linger.UnsupportedError, match=r"`net\.0/conv2d/0`.*16 bits.*opset_version"):
        linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq", opset_version=20)
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq", opset_version=21)
    assert_equal(path, "qdq", model, x)


def stored(path: Path) -> set[int]:
    return {tensor.data_type for tensor in onnx.load(path).graph.initializer}


def test_activations_are_unsigned_unless_asked_for(tmp_path: Path) -> None:
    x = images()
    model = quantized(ResNet(), x, scale="power_of_two")
    plain = linger.export_onnx(model, (x,), tmp_path / "plain.onnx", "qdq")
    assert onnx.TensorProto.UINT8 in stored(plain)
    path = linger.export_onnx(model, (x,), tmp_path / "signed.onnx", "qdq", signed=True)
    assert onnx.TensorProto.UINT8 not in stored(path)
    assert_equal(path, "qdq", model, x)


def test_weights_of_four_bits_are_stored_as_such(tmp_path: Path) -> None:
    x = images()
    model = quantized(ResNet(), x, weight_bits=4, scale="power_of_two")
    plain = linger.export_onnx(model, (x,), tmp_path / "plain.onnx", "qdq")
    assert onnx.TensorProto.INT4 not in stored(plain)
    path = linger.export_onnx(model, (x,), tmp_path / "int4.onnx", "qdq", int4_weights=True)
    assert onnx.TensorProto.INT4 in stored(path)
    assert_equal(path, "qdq", model, x)


@pytest.mark.slow
def test_wider_weights_stay_int8(tmp_path: Path) -> None:
    x = images()
    model = quantized(ResNet(), x)
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq", int4_weights=True)
    assert onnx.TensorProto.INT4 not in stored(path)


# --- files --------------------------------------------------------------------------------------


def large() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(2)
    x = torch.randn(2, 60)
    return quantized(Chain(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 40)), x), x


def test_weights_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    model, x = large()
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq", external_data=True)
    (data,) = written.data_files(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, data])
    assert data.stat().st_size >= 60 * 50 + 50 * 40
    held = {
        t.name for t in onnx.load(path, load_external_data=False).graph.initializer if t.raw_data
    }
    assert not any(name.endswith("weight") for name in held)
    assert_equal(path, "qdq", model, x)


def test_large_models_have_one_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "LARGEST_SINGLE_FILE", 4000)
    model, x = large()
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq")
    assert len(written.data_files(path)) == 1
    single = linger.export_onnx(model, (x,), tmp_path / "s.onnx", "qdq", external_data=False)
    assert not written.data_files(single)


def test_an_earlier_file_of_weights_goes_with_its_graph(tmp_path: Path) -> None:
    model, x = large()
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq", external_data=True)
    (first,) = written.data_files(path)
    linger.export_onnx(model, (x,), path, "qdq", external_data=True)
    assert written.data_files(path) == [first]
    model.net[0].weight.data.mul_(-1.0)
    linger.export_onnx(model, (x,), path, "qdq", external_data=True)
    (second,) = written.data_files(path)
    assert second != first
    assert_equal(path, "qdq", model, x)
    linger.export_onnx(model, (x,), path, "qdq")
    assert not written.data_files(path)


@pytest.mark.parametrize("failing", [0, 1], ids=["weights", "graph"])
def test_an_interrupted_export_leaves_the_earlier_one(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = large()
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq", external_data=True)
    expected = integers(model, x)
    calls = []

    def refuse(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) > failing:
            raise OSError(28, "No space left on device")
        Path(source).rename(target)

    model.net[0].weight.data.mul_(-1.0)
    with monkeypatch.context() as patched:
        patched.setattr(written.os, "replace", refuse)
        with pytest.raises(linger.ConfigError, match=r"cannot write.*No space left"):
            linger.export_onnx(model, (x,), path, "qdq", external_data=True)
    found = engine_of(path, "qdq")([x.numpy()])
    assert np.array_equal(found[0], expected[0])
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


# --- wrong options ------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "too few names": ("qdq", {"input_names": []}, r"`input_names` takes 1.*\['x'\].*Found: \[\]"),
    "a name twice": ("qdq", {"output_names": ["a", "a"]}, r"`output_names` takes 1 diff"),
    "no such input": ("qdq", {"dynamic_axes": {"y": {0: "n"}}}, r"an input 'y'.*Inputs: \['x'\]"),
    "no such axis": (
        "qdq",
        {"dynamic_axes": {"x": {4: "n"}}},
        r"axis 4 of 'x', whose shape is \(4, 3, 12, 12\)",
    ),
    "no name": ("qdq", {"dynamic_axes": {"x": {0: 3}}}, r"axis 0 of 'x' 3\. Use a name"),
    "one name, two sizes": (
        "qdq",
        {"dynamic_axes": {"x": {0: "n", 1: "n"}}},
        r"'n' has the sizes 4 and 3",
    ),
    "an opset of old": ("qdq", {"opset_version": 13}, r"`opset_version` is 18 to \d+\. Found: 13"),
    "an opset to come": ("qdq", {"opset_version": 99}, r"Found: 99"),
    "int4 before its opset": (
        "qdq",
        {"opset_version": 20, "int4_weights": True},
        r"with int4 weights is 21 to",
    ),
    "an opset for the engine": (
        "linger",
        {"opset_version": 18},
        r"`opset_version`: only the 'qdq'",
    ),
    "storage for the engine": ("linger", {"signed": True}, r"`signed`: only the 'qdq'"),
}


@pytest.mark.parametrize(("dialect", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_named(
    dialect: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = linger.prepare(ResNet(), (images(),))
    with pytest.raises(linger.ConfigError, match=f"(?s){message}"):
        linger.export_onnx(model, (images(),), tmp_path / "m.onnx", dialect, **options)
    assert not list(tmp_path.iterdir())


def test_an_op_without_a_row_names_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_linger.export.qdq import QDQ

    x = images()
    model = quantized(ResNet(), x)
    monkeypatch.delitem(QDQ.table, "add")
    with pytest.raises(linger.UnsupportedError, match=r"`layers\.0/add/0`.*no form of `add`.*None"):
        linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq")
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_never_calibrated_is_named(tmp_path: Path) -> None:
    model = linger.quantize(linger.prepare(ResNet(), (images(),)))
    with pytest.raises(linger.NotReadyError, match=r"`stem/conv2d/0`.*calibrate"):
        linger.export_onnx(model, (images(),), tmp_path / "m.onnx")
    with pytest.raises(linger.NotReadyError, match=r"ResNet is not prepared"):
        linger.export_onnx(ResNet(), (images(),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    model = linger.prepare(ResNet(), (images(),))
    with pytest.raises(linger.ConfigError, match=r"the folder '.*none' does not exist\. Create it"):
        linger.export_onnx(model, (images(),), tmp_path / "none" / "m.onnx")


# --- sizes that are baked in --------------------------------------------------------------------


def named(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.conv(x).view(4, -1))


def given_by(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.conv(x).view(x.shape[0], -1))


def rolled(m: Any, x: Tensor) -> Tensor:
    return torch.roll(F.relu(m.conv(x)), 1, 1).view(x.shape[0], 2, -1)


def folded(m: Any, x: Tensor) -> Tensor:
    return torch.roll(m.conv(x), 1, 1).view(-1, 64)


def unpacked(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return torch.cat([y[i].flatten().view(1, -1) for i in range(y.shape[0])])


def baked(
    forward: Callable[..., Tensor], platform: str = "onnxruntime"
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 8, 8)
    layers = {"conv": nn.Conv2d(2, 2, 3, padding=1), "fc": nn.Linear(128, 5)}
    return quantized(Lambda(forward, **layers), x, platform=platform), x


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (named, r"(?:addmm: )?mat1 and mat2 shapes cannot be multiplied"),
        (lambda m, x: m.conv(x).view(4, 128), r"shape '\[4, 128\]' is invalid"),
        (
            lambda m, x: m.conv(x) + torch.zeros(4, 1, 1, 1),
            r"The size of tensor a \(\d+\) must match",
        ),
    ],
)
def test_a_size_that_is_written_into_the_model_is_named(
    forward: Callable[..., Tensor], reason: str, tmp_path: Path
) -> None:
    model, x = baked(forward)
    linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq")
    here = rf"test_options\.py:\d+: {reason}"
    axes = {"input_0": {0: "batch"}}
    with pytest.raises(
        linger.UnsupportedError,
        match=rf"'batch' cannot stay open: with batch=8, for input_0 \[8, 2, 8, 8\].*{here}.*4, is",
    ):
        linger.export_onnx(model, (x,), tmp_path / "open.onnx", "qdq", dynamic_axes=axes)
    if "tensor a" not in reason:  # one sample is added to four
        with pytest.raises(
            linger.UnsupportedError,
            match=rf"the forward fails on input_0 \[1, 2, 8, 8\], at .*{here}.*`x.shape\[0\]` or",
        ):
            linger.export_onnx(model, (x[:1],), tmp_path / "one.onnx", "qdq")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize(
    ("forward", "platform", "why"),
    [
        (rolled, "arcs", r"node '/view' \(Reshape\) holds that size: it reshapes to \[4, 2, -1\]"),
        (unpacked, "arcs", r"(The output 'output' has 4 rows all|is baked in: node '/view)"),
        (rolled, "onnxruntime", r"All that follows from it is baked in"),
    ],
)
def test_files_of_one_size_are_not_run_on_others(
    forward: Callable[..., Tensor], platform: str, why: str, size: int, tmp_path: Path
) -> None:
    model, x = baked(forward, platform)
    dialect = "qdq" if platform == "onnxruntime" else "linger"
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", dialect)
    assert_equal(path, dialect, model, x)
    other = torch.randn(size, 2, 8, 8)
    with pytest.raises(
        linger.ConfigError,
        match=rf"axis 0 of 'input_0' fixed at 4, and is given {size}\. .*{why}.*dynamic_axes=",
    ):
        engine_of(path, dialect)([other.numpy()])
    with pytest.raises(linger.ConfigError):
        engine_of(path, dialect)([x[0].numpy()])


@pytest.mark.parametrize("forward", [folded, given_by])
def test_other_sizes_are_run_where_nothing_depends_on_them(
    forward: Callable[..., Tensor], tmp_path: Path
) -> None:
    model, x = baked(forward, "arcs")
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "linger")
    assert_equal(path, "linger", model, torch.randn(6, 2, 8, 8))


def test_a_fixed_batch_is_the_batch_of_the_file(tmp_path: Path) -> None:
    x = images()
    model = quantized(ResNet(), x)
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq")
    running = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match=r"(?s)Got: 5 Expected: 4"):
        running.run(None, {"x": images(5).numpy()})
