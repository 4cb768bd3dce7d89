"""The older generation of names: the same graph, spelled anew."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnxscript import ir
from torch import nn

import lightning_linger as linger
from lightning_linger.export import OnnxIntegerRunner, export_onnx
from lightning_linger.export.generations import ALIASES, ATTRIBUTE_ALIASES, LINGER1
from lightning_linger.export.linger import OLDER_SCHEMAS, SCHEMAS
from lightning_linger.export.linger.older import respell
from lightning_linger.export.runner.interpreter import KERNELS
from lightning_linger.export.runner.step import kind_of
from tests.models import Lambda


def quantized(model, *inputs, **fields):
    linger.prepare(model, inputs)
    linger.quantize(model, linger.QuantConfig(**fields))
    return linger.calibrate(model, [inputs]).eval()


def attributes(node):
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {key: v.decode() if isinstance(v, bytes) else v for key, v in found.items()}


def by_type(proto):
    return {node.op_type: attributes(node) for node in proto.graph.node}


def network():
    torch.manual_seed(0)

    def run(m, x):
        y = F.relu(m.conv(x))
        y = torch.cat([F.max_pool2d(y + m.conv(x), 2), F.avg_pool2d(y * y, 2)], 1)
        return m.fc(y.flatten(2)).softmax(-1)

    layers = {"conv": nn.Conv2d(3, 4, 3, padding=1), "fc": nn.Linear(16, 5)}
    return Lambda(run, **layers)


OLDER_OPS = [
    *("Quant", "Conv2dInt", "Relu", "Conv2dInt", "iqAdd", "MaxPool", "iqMul", "AvgPool2dInt"),
    *("iqCat", "Reshape", "LinearInt", "SoftmaxInt", "Dequant"),
]


@pytest.mark.parametrize("platform", ["venus", "arcs"])
def test_both_generations_hold_the_same_integers(tmp_path, platform):
    x = torch.randn(1, 3, 8, 8)
    model = quantized(network(), x, platform=platform)
    newer = export_onnx(model, (x,), tmp_path / "3.onnx", "linger3")
    older = export_onnx(model, (x,), tmp_path / "1.onnx", "linger1")
    proto = onnx.load(older)
    assert sorted(node.op_type for node in proto.graph.node) == sorted(OLDER_OPS)
    assert {o.domain for o in proto.opset_import} == {"", "thinker"}
    assert {node.domain for node in proto.graph.node} == {"", "thinker"}
    metadata = {p.key.partition(".")[2]: p.value for p in proto.metadata_props}
    assert metadata["dialect"] == "linger1"
    # Nodes and values are named after sites and modules.
    modules = dict(model.named_modules())
    for node in proto.graph.node:
        module, _, op = node.name.partition("/")
        assert op
        assert module.partition("@")[0] in modules
        assert node.output[0] in (node.name, "output")
    runners = [OnnxIntegerRunner(path) for path in (newer, older)]
    assert {runner.platform for runner in runners} == {platform}
    with torch.no_grad(), linger.integer(model):
        expected = model(x).numpy()
    for runner in runners:
        (found,) = runner.run({"input_0": x.numpy()}).values()
        assert np.array_equal(found, expected)

    found = by_type(proto)
    chip = {"platform", "quant_mode"} if platform == "arcs" else set()
    for op_type, named in found.items():
        if op_type not in ("Relu", "MaxPool", "Reshape", "Dequant"):
            assert named["platform_quant"] == "luna_quant"
            assert named.keys() & {"platform", "quant_mode"} == chip
        assert not named.keys() & {"x_bits", "w_bits", "y_bits"}
    grid = {"data_bits", "parameter_bits", "o_bits", "scale_x", "scale_w", "scale_o"}
    geometry = {"kernel_shape", "pads", "strides", "dilations", "group"}
    assert found["LinearInt"].keys() == grid | {"platform_quant"} | chip
    assert found["Conv2dInt"].keys() == grid | geometry | {"platform_quant"} | chip
    assert found["iqAdd"].keys() == {"scale_x", "scale_y", "scale_o", "platform_quant"} | chip
    assert found["iqCat"]["dim"] == 1
    assert found["Quant"].keys() == {"data_bits", "scale_x", "platform_quant"} | chip
    assert found["Dequant"].keys() == {"scale_o"}
    assert ("dim" in found["SoftmaxInt"]) == (platform == "venus")
    # The newer generation is what it was.
    assert "QConv2d" in by_type(onnx.load(newer))

    recorded = {v.name: v.type for v in proto.graph.value_info}
    del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    for value in inferred.graph.value_info:
        assert recorded[value.name] == value.type
    assert len(inferred.graph.value_info) == len(OLDER_OPS) - 1


def older_of(newer):
    model = ir.serde.deserialize_model(newer)
    respell(model.graph)
    model.graph.opset_imports["thinker"] = 1
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


SEQUENCES = {
    "lstm": (
        lambda m, x: m.rnn(x)[0].transpose(1, 2) @ m.fc(x),
        {"rnn": nn.LSTM(8, 6, batch_first=True), "fc": nn.Linear(8, 8)},
        {"LSTMInt", "LinearInt", "BmmInt"},
    ),
    "norm": (
        lambda m, x: torch.sigmoid(m.norm(m.fc(x))) / (m.fc(x).abs() + 1),
        {"norm": nn.LayerNorm(8), "fc": nn.Linear(8, 8)},
        {"LayerNormInt", "iqSigmoid", "iqDiv", "iqMul"},
    ),
    "wide": (
        lambda m, x: m.fc(x),
        {"fc": nn.Linear(8, 8)},
        {"LinearInt"},
    ),
}


@pytest.mark.parametrize("case", SEQUENCES)
def test_ops_of_sequences(tmp_path, case):
    run, layers, expected = SEQUENCES[case]
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8)
    fields = {"output_bits": None} if case == "wide" else {}
    model = quantized(Lambda(run, **layers), x, platform="arcs", **fields)
    newer = onnx.load(export_onnx(model, (x,), tmp_path / "model.onnx"))
    older = older_of(newer)
    assert expected <= {node.op_type for node in older.graph.node}
    wanted = OnnxIntegerRunner(newer).run({"input_0": x.numpy()})
    found = OnnxIntegerRunner(older).run({"input_0": x.numpy()})
    for name, array in wanted.items():
        assert np.array_equal(found[name], array)
    if case == "lstm":
        named = by_type(older)["LSTMInt"]
        assert "scale_i" in named
        assert not named.keys() & {"scale_x", "scale_c", "has_hidden"}


def graph_of(node):
    made = onnx.helper.make_graph(
        [node],
        "graph",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT8, [2]) for n in node.input],
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT8, [2]) for n in node.output],
    )
    opsets = [onnx.helper.make_opsetid(domain, 1) for domain in ("linger", "thinker")]
    return ir.serde.deserialize_model(onnx.helper.make_model(made, opset_imports=opsets)).graph


SCALES = {"scale_x": 1.0, "scale_y": 1.0, "scale_o": 1.0}


@pytest.mark.parametrize(
    ("op_type", "given", "match"),
    [
        ("QGelu", {}, "no name for QGelu"),
        ("QAdd", {**SCALES, "o_bits": 16}, r"iqAdd .* no attribute for o_bits=16"),
        ("QCat", {"axis": 0, "scale_x_0": 1.0, "x_0_bits": 16}, r"iqCat .* x_0_bits=16"),
        ("QAvgPool2d", {"count_include_pad": 0}, "count_include_pad=0: it stands for 1"),
    ],
)
def test_what_the_older_generation_cannot_say_is_refused(op_type, given, match):
    inputs = ["x", "y"] if "scale_y" in given else ["x"]
    node = onnx.helper.make_node(op_type, inputs, ["z"], "net/op/0", domain="linger", **given)
    with pytest.raises(linger.UnsupportedError, match=match) as caught:
        respell(graph_of(node))
    assert "`net/op/0`" in str(caught.value)
    assert "dialect='linger'" in str(caught.value)


def test_narrow_codes_and_nodes_of_others_stay():
    narrow = {**SCALES, "x_bits": 4, "y_bits": 4, "o_bits": 4}
    graph = graph_of(onnx.helper.make_node("QAdd", ["x", "y"], ["z"], domain="linger", **narrow))
    respell(graph)
    assert set(graph[0].attributes) == set(SCALES)
    graph = graph_of(onnx.helper.make_node("QAdd", ["x", "y"], ["z"], domain="mine", **narrow))
    respell(graph)
    assert (graph[0].domain, graph[0].op_type, len(graph[0].attributes)) == ("mine", "QAdd", 6)


def test_an_export_that_is_refused_writes_nothing(tmp_path):
    x = torch.randn(2, 8)
    model = quantized(Lambda(lambda m, x: F.gelu(m.fc(x)), fc=nn.Linear(8, 8)), x)
    path = tmp_path / "model.onnx"
    with pytest.raises(linger.UnsupportedError, match="`/gelu/0`: the 'linger1' dialect"):
        export_onnx(model, (x,), path, "linger1")
    assert not list(tmp_path.iterdir())


def test_every_name_has_a_schema_and_a_kernel():
    newer = {schema.name: schema for schema in SCHEMAS}
    assert set(LINGER1) <= set(newer)
    assert {schema.name for schema in OLDER_SCHEMAS} == {s.op_type for s in LINGER1.values()}
    for schema in OLDER_SCHEMAS:
        assert onnx.defs.has(schema.name, "thinker")
        assert ALIASES.get(schema.name, schema.name) in KERNELS
    for op_type, spelling in LINGER1.items():
        known = set(newer[op_type].attributes)
        stars = {name for name in spelling.implied if "*" in name}
        assert set(spelling.renamed) | set(spelling.implied) - stars <= known


def test_the_runner_knows_the_kind_of_every_attribute():
    for schema in (*SCHEMAS, *OLDER_SCHEMAS):
        for name, attribute in schema.attributes.items():
            if name not in ("castor_mode", "mode", "dropout"):
                kind = kind_of(ATTRIBUTE_ALIASES.get(name, name))
                assert kind == attribute.type.name


def test_attributes_that_only_older_exporters_add_pass_the_checker():
    names = ["data_bits", "parameter_bits", "o_bits", "group"]
    lists = {name: [1, 1] for name in ("kernel_shape", "strides", "dilations")} | {"pads": [0] * 4}
    node = onnx.helper.make_node(
        "Conv2dInt",
        ["x", "w"],
        ["y"],
        domain="thinker",
        platform_quant="luna_quant",
        castor_mode="luna",
        **dict.fromkeys(names, 8) | {"group": 1} | lists,
        **dict.fromkeys(["scale_x", "scale_w", "scale_o"], 1.0),
    )
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "graph",
        [tensor("x", onnx.TensorProto.INT8, [1, 2, 4, 4])],
        [tensor("y", onnx.TensorProto.INT8, [1, 3, 4, 4])],
        [onnx.numpy_helper.from_array(np.ones((3, 2, 1, 1), np.int8), "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("thinker", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    onnx.checker.check_model(model, full_check=True)
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(onnx.helper.make_model(graph, opset_imports=opsets), True)
