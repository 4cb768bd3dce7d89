"""Whole networks in the dialect of the engines, and what exporting leaves behind."""

import copy
import json

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_linger as linger
from lightning_linger.export import export_onnx
from tests.export.linger_models import (
    ENGINE_NAMES,
    PLATFORMS,
    Net,
    attributes,
    exported,
    image,
    ops,
    quantized,
)
from tests.models import Lambda


@pytest.mark.parametrize("platform", PLATFORMS)
def test_network_equals_its_integer_forward(tmp_path, platform):
    x = image(3)
    proto = exported(quantized(Net(), x, platform=platform), tmp_path, x)
    # The clamp behind the mean is a site of its own: a mean has no quantizer it could merge into.
    assert ops(proto) == [
        *("Quant", "QConv2d", "Relu", "QConv2d", "QAdd", "Relu", "MaxPool", "QAvgPool2d"),
        *(["Requant"] * ("Requant" in ops(proto))),
        *("QCat", "QAvgPool2d", "Flatten", ops(proto)[-3], "QLinear", "Dequant"),
    ]
    assert ops(proto)[-3] in ("Relu", "Clip")
    conv = attributes(proto, "conv/conv2d/0")
    assert conv["platform"] == ENGINE_NAMES[platform]
    assert conv["quant_mode"] == "floor_add"
    assert ("platform_quant" in conv) == (platform == "venus")
    assert {conv["x_bits"], conv["w_bits"], conv["o_bits"]} == {8}
    assert (conv["kernel_shape"], conv["pads"]) == ([3, 3], [1, 1, 1, 1])
    assert (conv["strides"], conv["dilations"], conv["group"]) == ([1, 1], [1, 1], 1)
    assert all(np.log2(conv[name]).is_integer() for name in ("scale_x", "scale_w", "scale_o"))
    assert proto.opset_import[0].version == 18
    assert {o.domain for o in proto.opset_import} == {"", "linger"}


def test_scales_are_reciprocals_of_steps_and_agree_along_edges(tmp_path):
    x = image(3)
    model = quantized(Net(), x)
    proto = exported(model, tmp_path, x)
    steps = json.loads({p.key: p.value for p in proto.metadata_props}["lightning_linger.steps"])
    conv, stem = attributes(proto, "conv/conv2d/0"), attributes(proto, "stem/conv2d/0")
    assert conv["scale_x"] == stem["scale_o"] == 1 / steps["conv/conv2d/0"]["scale_x"]
    assert attributes(proto, "stem/conv2d/0/quantize")["scale_x"] == stem["scale_x"]
    assert attributes(proto, "/add/0")["scale_x"] == conv["scale_o"]


def test_weights_are_int8_in_torch_layout_and_values_are_typed(tmp_path):
    x = image(3)
    proto = exported(quantized(Net(), x), tmp_path, x)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert constants["conv/conv2d/0/weight"].dtype == np.int8
    assert constants["conv/conv2d/0/weight"].shape == (8, 8, 3, 3)
    assert constants["stem/conv2d/0/bias"].dtype == np.int32
    assert constants["fc/linear/0/weight"].shape == (5, 16)
    assert not any(name.startswith("Scale") for name in constants)
    typed = {v.name: v.type.tensor_type for v in proto.graph.value_info}
    ends = {v.name for v in proto.graph.output}
    for node in proto.graph.node:
        assert set(node.output) <= ends | set(typed)
    assert typed["conv/conv2d/0"].elem_type == onnx.TensorProto.INT8


def test_shape_inference_finds_what_was_recorded(tmp_path):
    x = image(3)
    proto = exported(quantized(Net(), x), tmp_path, x)
    computed = {name for node in proto.graph.node for name in node.output}
    recorded = {v.name: v.type for v in proto.graph.value_info if v.name in computed}
    del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    assert {v.name: v.type for v in inferred.graph.value_info} == recorded


def test_metadata_names_version_platform_and_configuration(tmp_path):
    x = image(3)
    proto = exported(quantized(Net(), x), tmp_path, x)
    metadata = {p.key.partition(".")[2]: p.value for p in proto.metadata_props}
    assert metadata["version"] == linger.__version__
    assert metadata["platform"] == "venusa"
    assert json.loads(metadata["config"])["common"]["weight_bits"] == 8


def test_plain_ops_are_named_after_their_modules(tmp_path):
    x = image()
    inner = Lambda(lambda m, x: m.layer(torch.atan(x.flatten(1))), layer=nn.Linear(256, 3))

    def run(m, x):
        return m.inner(torch.atan(torch.atan(x)))

    proto = exported(quantized(Lambda(run, inner=inner), x), tmp_path, x)
    named = {node.name: node.output[0] for node in proto.graph.node if node.op_type == "Atan"}
    assert named == {name: name for name in ("/atan", "/atan_1", "inner/atan_2")}


def test_exports_are_the_same_bytes(tmp_path):
    x = image(3)
    model = quantized(Net(), x)
    first = export_onnx(model, (x,), tmp_path / "a.onnx").read_bytes()
    assert export_onnx(model, (x,), tmp_path / "b.onnx").read_bytes() == first


# --- what export leaves behind -----------------------------------------------------------------


def same_state(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


def test_training_goes_on_as_if_nothing_had_happened(tmp_path):
    x, target = image(3), torch.randn(2, 5)
    models = [quantized(Net(), x)]
    models.append(copy.deepcopy(models[0]))
    results = []
    for index, model in enumerate(models):
        torch.manual_seed(3)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(4):
            if index == 0 and step == 2:
                before = copy.deepcopy(model.state_dict())
                export_onnx(model, (x,), tmp_path / "model.onnx")
                assert same_state(model.state_dict(), before)
                assert all(module.training for module in model.modules())
            optimizer.zero_grad()
            F.mse_loss(model(x + 0.1 * torch.randn_like(x)), target).backward()
            optimizer.step()
        results.append((model.state_dict(), model.eval()(x)))
    assert same_state(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_model_in_training_exports_its_evaluation(tmp_path):
    x = image(3)
    model = quantized(Net(), x)
    first = export_onnx(model, (x,), tmp_path / "a.onnx").read_bytes()
    assert export_onnx(model.train(), (x,), tmp_path / "b.onnx").read_bytes() == first


def test_before_the_quantize_stage_the_graph_is_plain(tmp_path):
    x = image(3)
    model = Net().eval()
    linger.prepare(model, (x,))
    proto = onnx.load(export_onnx(model, (x,), tmp_path / "model.onnx"))
    assert {node.domain for node in proto.graph.node} == {""}
    assert [v.name for v in proto.graph.input] == ["x"]
    reference = onnx.reference.ReferenceEvaluator(proto)
    torch.testing.assert_close(
        torch.from_numpy(reference.run(None, {"x": x.numpy()})[0]), model(x), rtol=1e-4, atol=1e-5
    )
