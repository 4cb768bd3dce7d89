"""Graphs that take and give codes in the place of real values."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_linger as linger
from lightning_linger.export import OnnxIntegerRunner, export_onnx
from tests.models import Lambda

PLATFORMS = {"linger": "venusa", "qdq": "onnxruntime"}


def quantized(run, *inputs, platform="venusa", **layers):
    torch.manual_seed(0)
    layers = layers or {"conv": nn.Conv2d(3, 4, 3, padding=1), "fc": nn.Linear(4, 5)}
    model = linger.prepare(Lambda(run, **layers), inputs)
    linger.quantize(model, linger.QuantConfig(platform=platform))
    return linger.calibrate(model, [inputs]).eval()


def network(m, x):
    y = F.relu(m.conv(x))
    return m.fc(y.mean((2, 3))), F.max_pool2d(y, 2)


def described(path, ends):
    metadata = {p.key: p.value for p in onnx.load(path).metadata_props}
    return json.loads(metadata[f"lightning_linger.{ends}"])


def run_file(path, dialect, inputs):
    if dialect == "linger":
        return list(OnnxIntegerRunner(path).run(inputs).values())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def codes_of(x, grid):
    limits = np.iinfo(grid["dtype"])
    codes = np.floor(x / np.float32(grid["step"]) + 0.5) + grid["zero_point"]
    return np.clip(codes, limits.min, limits.max).astype(grid["dtype"])


def real_of(codes, grid):
    return (codes.astype(np.float32) - grid["zero_point"]) * np.float32(grid["step"])


@pytest.mark.parametrize("moved", [False, True], ids=["read", "moved"])
@pytest.mark.parametrize("dialect", PLATFORMS)
def test_codes_in_and_out_are_the_integer_forward(tmp_path, dialect, moved):
    torch.manual_seed(1)
    x = torch.randn(2, 3, 8, 8)

    def run(m, x):
        return network(m, x.flip(0).transpose(2, 3)[:1] if moved else x)

    model = quantized(run, x, platform=PLATFORMS[dialect])
    path = tmp_path / "model.onnx"
    export_onnx(model, (x,), path, dialect, integer_inputs=True, integer_outputs=True)
    graph = onnx.load(path).graph
    kinds = [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)]
    wanted = onnx.TensorProto.INT8 if dialect == "linger" else onnx.TensorProto.UINT8
    assert kinds == [wanted] * 3
    assert not {"Quant", "Dequant"} & {node.op_type for node in graph.node}
    (grid,) = described(path, "inputs").values()
    found = run_file(path, dialect, {"input_0": codes_of(x.numpy(), grid)})
    with torch.no_grad(), linger.integer(model):
        expected = model(x)
    grids = described(path, "outputs").values()
    for codes, at, real in zip(found, grids, expected, strict=True):
        assert codes.dtype == at["dtype"]
        assert np.array_equal(real_of(codes, at), real.numpy())


@pytest.mark.parametrize(("inputs", "outputs"), [(True, False), (False, True), (False, False)])
def test_each_end_is_chosen_by_itself(tmp_path, inputs, outputs):
    x = torch.randn(2, 3, 8, 8)
    path = tmp_path / "model.onnx"
    model = quantized(network, x)
    export_onnx(model, (x,), path, integer_inputs=inputs, integer_outputs=outputs)
    ops = [node.op_type for node in onnx.load(path).graph.node]
    assert ("Quant" in ops, "Dequant" in ops) == (not inputs, not outputs)
    keys = {p.key.partition(".")[2] for p in onnx.load(path).metadata_props}
    assert ("inputs" in keys, "outputs" in keys) == (inputs, outputs)


def test_indices_stay_indices(tmp_path):
    index = torch.tensor([[1, 2, 0]])
    model = quantized(lambda m, i: m.table(i), index, table=nn.Embedding(4, 8))
    path = tmp_path / "model.onnx"
    export_onnx(model, (index,), path, integer_inputs=True, integer_outputs=True)
    assert described(path, "inputs") == {}
    (found,) = run_file(path, "linger", {"input_0": index.numpy()})
    assert found.dtype == np.int8


def refused(model, match, *inputs, path, error=linger.UnsupportedError, **ends):
    with pytest.raises(error, match=match):
        export_onnx(model, inputs, path, **ends)
    assert not path.exists()


def test_real_values_at_an_end_are_refused(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    path = tmp_path / "model.onnx"
    both = quantized(lambda m, x: (m.conv(x), torch.atan(x)), x)
    refused(both, "node `.*` reads its real", x, path=path, integer_inputs=True)
    refused(both, "'output_1' cannot be codes: node", x, path=path, integer_outputs=True)
    same = quantized(lambda m, x: (m.conv(x), x), x)
    refused(same, "'input_0' cannot be codes", x, path=path, integer_inputs=True)
    refused(same, "'output_1' cannot be codes", x, path=path, integer_outputs=True)


def test_an_input_at_several_scales_is_refused(tmp_path):
    x = torch.randn(2, 3, 8, 8)

    layers = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3)}
    model = linger.prepare(Lambda(lambda m, x: (m.a(x), m.b(x)), **layers), (x,))
    linger.quantize(model, overrides={"b": {"activation_bits": 4}})
    linger.calibrate(model, [(x,)]).eval()
    path = tmp_path / "model.onnx"
    refused(model, "several scales, by `a/.*`, `b/.*`", x, path=path, integer_inputs=True)


def test_without_quantization_there_are_no_codes(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    model = linger.prepare(Lambda(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 3)), (x,))
    path, error = tmp_path / "model.onnx", linger.NotReadyError
    for ends in ({"integer_inputs": True}, {"integer_outputs": True}):
        refused(model, "before the quantize stage", x, path=path, error=error, **ends)
