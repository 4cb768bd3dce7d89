import copy
import json
import warnings

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_linger as linger
from lightning_linger.export import OnnxIntegerRunner, export_onnx
from lightning_linger.export.capture import flat_tensors
from tests.models import Lambda

PLATFORMS = ("venusa", "arcs", "venus")
ENGINE_NAMES = {"venusa": "venusA", "arcs": "arcs", "venus": "venus"}


class Net(nn.Module):
    """Residual addition, concatenation, both pools, a mean, clamps and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.conv(x) + x)
        y = torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(x, 2)], 1)
        return self.fc(F.relu6(y.mean((2, 3))))


def quantized(model, *inputs, steps=2, fuse=True, kwargs=None, **fields):
    linger.prepare(model, inputs, kwargs)
    if fuse:
        linger.fuse_bn(model)
    linger.quantize(model, linger.QuantConfig(**fields))
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            model(*inputs, **(kwargs or {}))
    return model.eval()


def conv_model(run, **layers):
    layers = {"conv": nn.Conv2d(4, 4, 3)} | layers
    return Lambda(run, **layers)


def image(channels=4, size=8):
    return torch.randn(2, channels, size, size)


def exported(model, tmp_path, *inputs, kwargs=None):
    """Export, check the file, run it in integers and compare with the model; return the file."""
    path = export_onnx(model, inputs, tmp_path / "model.onnx", "linger", kwargs)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    with linger.integer(model), torch.no_grad():
        expected = flat_tensors(model(*inputs, **(kwargs or {})))
    arrays = [x.numpy() for x in flat_tensors((inputs, kwargs))]
    runner = OnnxIntegerRunner(path)
    found = runner.run(dict(zip(runner.input_names, arrays, strict=True)))
    assert len(found) == len(expected)
    for result, wanted in zip(found.values(), expected, strict=True):
        assert torch.equal(torch.from_numpy(result), wanted)
    return proto


def ops(proto):
    return [node.op_type for node in proto.graph.node]


def attributes(proto, name):
    node = next(node for node in proto.graph.node if node.name == name)
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {key: v.decode() if isinstance(v, bytes) else v for key, v in found.items()}


# --- a whole network --------------------------------------------------------------------------


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


# --- one op at a time -------------------------------------------------------------------------

MANY_STEPS = ["Quant", "QConv2d"]
CASES = {
    "conv1d": (
        lambda m, x: m.layer(x.flatten(2)),
        {"layer": nn.Conv1d(4, 4, 3, padding=1, stride=2)},
        ["Quant", "Reshape", "QConv2d", "Reshape", "Dequant"],
    ),
    "grouped_dilated": (
        lambda m, x: m.layer(x),
        {"layer": nn.Conv2d(4, 4, 3, groups=2, dilation=2, bias=False)},
        ["Quant", "QConv2d", "Dequant"],
    ),
    "conv_transpose2d": (
        lambda m, x: m.layer(x),
        {"layer": nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2)},
        ["Quant", "QConvTranspose2d", "Dequant"],
    ),
    "conv_transpose1d": (
        lambda m, x: m.layer(x.flatten(2)),
        {"layer": nn.ConvTranspose1d(4, 6, 3)},
        ["Quant", "Reshape", "QConvTranspose2d", "Reshape", "Dequant"],
    ),
    "pad": (
        lambda m, x: m.layer(F.pad(m.conv(x), (1, 0, 2, 1), value=0.37)),
        {"layer": nn.Conv2d(4, 4, 3)},
        [*MANY_STEPS, "Pad", "QConv2d", "Dequant"],
    ),
    "add_number": (lambda m, x: m.conv(x) + 0.3, {}, [*MANY_STEPS, "QConv2d", "Dequant"]),
    "number_minus": (lambda m, x: 1 - m.conv(x), {}, [*MANY_STEPS, "QSub", "Dequant"]),
    "times_number": (lambda m, x: m.conv(x) * 0.3, {}, [*MANY_STEPS, "QMul", "Dequant"]),
    "gate": (
        lambda m, x: m.conv(x) * m.conv(x).mean((2, 3), keepdim=True),
        {},
        [*MANY_STEPS, "QConv2d", "QCat", "QAvgPool2d", "Slice", "QMul", "Dequant"],
    ),
    "select": (
        lambda m, x: m.conv(x)[:, -1],
        {},
        [*MANY_STEPS, "Slice", "Reshape", "Dequant"],
    ),
    "chunk": (
        lambda m, x: torch.cat(m.conv(x).chunk(2, 1)[::-1], 1),
        {},
        [*MANY_STEPS, "Slice", "Slice", "QCat", "Dequant"],
    ),
    "linear_over_channels": (
        lambda m, x: m.layer(m.conv(x).permute(0, 2, 3, 1)),
        {"layer": nn.Linear(4, 5)},
        [*MANY_STEPS, "Transpose", "QLinear", "Dequant"],
    ),
    "mean_of_one_dimension": (
        lambda m, x: m.conv(x).mean(1, keepdim=True),
        {},
        [*MANY_STEPS, "Transpose", "Reshape", "QAvgPool2d", "Reshape", "Dequant"],
    ),
    "adaptive": (
        lambda m, x: m.layer(torch.flatten(F.adaptive_avg_pool2d(m.conv(x), 1), 1)),
        {"layer": nn.Linear(4, 5)},
        [*MANY_STEPS, "QCat", "QAvgPool2d", "Slice", "Flatten", "QLinear", "Dequant"],
    ),
    "relu6": (lambda m, x: F.relu6(m.conv(x) * 8), {}, [*MANY_STEPS, "QMul", "Clip", "Dequant"]),
    "hardtanh": (
        lambda m, x: F.hardtanh(m.conv(x), -0.5, 0.7),
        {},
        [*MANY_STEPS, "Clip", "Dequant"],
    ),
    "reused": (
        lambda m, x: m.layer(m.layer(x)),
        {"layer": nn.Conv2d(4, 4, 3)},
        ["Quant", "QConv2d", "QConv2d", "Dequant"],
    ),
    "alike": (
        lambda m, x: m.layer(x) + m.layer(x),
        {"layer": nn.Conv2d(4, 4, 3)},
        ["Quant", "QConv2d", "QConv2d", "QAdd", "Dequant"],
    ),
    "dropout": (
        lambda m, x: F.dropout(m.conv(x), 0.5, m.training),
        {},
        [*MANY_STEPS, "Dequant"],
    ),
    "unused": (
        lambda m, x: (m.layer(x), m.conv(x))[1],
        {"layer": nn.Conv2d(4, 4, 3)},
        [*MANY_STEPS, "Dequant"],
    ),
    "float_between": (
        lambda m, x: m.layer(torch.atan(m.conv(x))),
        {"layer": nn.Conv2d(4, 4, 3)},
        [*MANY_STEPS, "Dequant", "Atan", "Quant", "QConv2d", "Dequant"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_op_equals_the_integer_forward(tmp_path, case):
    run, layers, expected = CASES[case]
    x = image()
    model = quantized(conv_model(run, **copy.deepcopy(layers)), x)
    assert ops(exported(model, tmp_path, x)) == expected


WIDE = {"activation_bits": 16, "output_bits": 16}
NARROW = {"weight_bits": 4, "activation_bits": 4, "output_bits": 4}


@pytest.mark.parametrize("fields", [WIDE, NARROW, {"weight_bits": 5}], ids=str)
def test_widths(tmp_path, fields):
    x = image()
    run = lambda m, x: m.layer(F.max_pool2d(F.relu(m.conv(x)), 2))  # noqa: E731
    model = quantized(conv_model(run, layer=nn.Conv2d(4, 4, 2)), x, **fields)
    proto = exported(model, tmp_path, x)
    # The engine takes the name of a width literally, and saturates at whole bytes.
    assert attributes(proto, "conv/conv2d/0")["w_bits"] == 8
    assert ("Clip" in ops(proto)) == (fields is NARROW)


@pytest.mark.parametrize(
    ("platform", "bits"), [("venusa", 32), ("arcs", None), ("venus", 16), ("venus", None)]
)
def test_wide_results_of_linear_layers(tmp_path, platform, bits):
    x = torch.randn(3, 8)
    model = quantized(
        Lambda(lambda m, x: m.a(x), a=nn.Linear(8, 4)), x, platform=platform, output_bits=bits
    )
    assert attributes(exported(model, tmp_path, x), "a/linear/0")["o_bits"] == (bits or 32)


def test_finer_operand_is_requantized_for_the_platform_that_needs_it(tmp_path):
    x = image()
    run = lambda m, x: torch.cat([m.conv(x), m.layer(x) * 20], 1)  # noqa: E731
    model = conv_model(run, layer=nn.Conv2d(4, 4, 3))
    found = {}
    for platform in PLATFORMS:
        proto = exported(quantized(copy.deepcopy(model), x, platform=platform), tmp_path, x)
        found[platform] = ops(proto).count("Requant")
        cat = attributes(proto, "/cat/0")
        assert (cat["scale_x_0"] == cat["scale_o"]) == (platform == "venusa")
    assert found == {"venusa": 1, "arcs": 0, "venus": 0}


IN_OTHER_WORDS = {
    "one_dimension": (
        lambda m, x: m.layer(F.max_pool1d(F.avg_pool1d(m.line(x.flatten(2)), 2), 3, 2, 1)),
        {"line": nn.Conv1d(4, 6, 3, 2, 2, 2, groups=2), "layer": nn.ConvTranspose1d(6, 4, 3, 2, 1)},
        [*("Quant", "Reshape", "QConv2d", "QAvgPool2d", "MaxPool"), "QConvTranspose2d", "Reshape"],
    ),
    "one_dimension_where_it_works": (
        lambda m, x: m.layer(x.flatten(2)),
        {"layer": nn.Conv1d(4, 6, 1, bias=False)},
        ["Quant", "Reshape", "QConv1d"],
    ),
    "transposed_groups": (
        lambda m, x: m.layer(x),
        {"layer": nn.ConvTranspose2d(4, 8, 3, 2, 1, 1, groups=4)},
        ["Quant", "QConvTranspose2d"],
    ),
    "padded": (
        lambda m, x: m.layer(F.pad(m.conv(x), (2, 0, 1, 1))),
        {"layer": nn.Conv2d(4, 4, 3, padding=(0, 1))},
        [*MANY_STEPS, "QConv2d"],
    ),
    "padded_line": (
        lambda m, x: m.layer(F.pad(x.flatten(2), (2, 0))),
        {"layer": nn.Conv1d(4, 4, 3)},
        ["Quant", "Reshape", "QConv2d", "Reshape"],
    ),
    "batch_norm": (
        lambda m, x: m.bn(F.relu(m.conv(x))),
        {"bn": nn.BatchNorm2d(4)},
        [*MANY_STEPS, "Relu", "QConv2d"],
    ),
    "batch_norm_of_rows": (
        lambda m, x: m.bn(F.relu(m.conv(x)).flatten(2)),
        {"bn": nn.BatchNorm1d(4)},
        [*MANY_STEPS, "Relu", "Reshape", "QConv2d", "Reshape"],
    ),
    "batch_norm_of_features": (
        lambda m, x: m.bn(F.relu(m.conv(x)).flatten(1)),
        {"bn": nn.BatchNorm1d(144)},
        [*MANY_STEPS, "Relu", "Reshape", "QConv2d", "Flatten"],
    ),
    "number_in_front": (
        lambda m, x: -3.3 + m.conv(x).flatten(1),
        {},
        [*MANY_STEPS, "Reshape", "QConv2d", "Reshape"],
    ),
    "number_far_away": (lambda m, x: F.relu(m.conv(x) + 300), {}, [*MANY_STEPS, "QConv2d", "Relu"]),
    "factor_of_rows": (
        lambda m, x: m.conv(x).flatten(2) * m.conv(x).flatten(2).mean(2, keepdim=True),
        {},
        [
            *(*MANY_STEPS, "QConv2d", "Reshape", "QCat", "QAvgPool2d", "Slice"),
            *("Reshape", "Reshape", "QMul", "Reshape"),
        ],
    ),
    "gate_in_front": (
        lambda m, x: F.max_pool2d(m.conv(x), 6) * (m.conv(x) * 4),
        {},
        [*MANY_STEPS, "MaxPool", "QConv2d", "QMul", "QMul"],
    ),
    "one_of_swapped_dimensions": (
        lambda m, x: m.conv(x).transpose(1, 2),
        {},
        [*MANY_STEPS, "Reshape", "Transpose", "Reshape"],
    ),
    "reflect_pad": (
        lambda m, x: m.layer(F.pad(m.conv(x), (1, 1, 1, 1), mode="reflect")),
        {"layer": nn.Conv2d(4, 4, 3)},
        [*MANY_STEPS, *2 * ["Slice", "Slice", "QCat"], "QConv2d"],
    ),
    "one_of_turned_dimensions": (
        lambda m, x: m.conv(x).transpose(1, 3),
        {},
        [*MANY_STEPS, *2 * ["Reshape", "Transpose"], "Reshape"],
    ),
    "a_clamp_that_does_nothing": (
        lambda m, x: F.hardtanh(F.max_pool2d(m.conv(x), 2), -99.0, 99.0),
        {},
        [*MANY_STEPS, "MaxPool"],
    ),
    "one_of_other_dimensions": (
        lambda m, x: m.layer(m.conv(x).squeeze(0)[:1].unsqueeze(0)),
        {"layer": nn.Conv2d(1, 4, 3)},
        [*MANY_STEPS, "Reshape", "Slice", "Reshape", "QConv2d"],
    ),
}  # "one_of" are those of a batch of one


@pytest.mark.parametrize("case", IN_OTHER_WORDS)
def test_what_the_engine_lacks_is_written_with_what_it_has(tmp_path, case):
    run, layers, expected = IN_OTHER_WORDS[case]
    x = image()[:1] if case.startswith("one_of") else image()
    layers = copy.deepcopy(layers)
    if any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in layers.values()):
        for name in ("running_mean", "running_var", "weight", "bias"):
            nn.init.uniform_(getattr(layers["bn"], name).data, 0.5, 1.5)
    model = quantized(conv_model(run, **layers), x)
    assert ops(exported(model, tmp_path, x)) == [*expected, "Dequant"]


def test_numbers_are_added_as_the_sum_rounds(tmp_path):
    """Over all codes, coarser results and numbers beyond the range included."""
    x = torch.arange(-128, 128) / 16
    for number in (0.3, -7.9, 1e-3, 77.0, 1000.0):
        for factor in (1, 2, 8):
            scale = nn.Linear(1, 1, bias=False)
            scale.weight.data.fill_(1.0)

            def run(m, x, number=number, factor=factor):
                return torch.cat([m.scale(x.view(-1, 1)) + number, m.scale(x.view(-1, 1)) * factor])

            exported(quantized(Lambda(run, scale=scale), x), tmp_path, x)


REFUSED = {
    "pads_not_counted": (
        lambda m, x: F.avg_pool2d(m.conv(x), 3, 2, 1, count_include_pad=False),
        {},
        "counts the zeros that it pads",
    ),
    "other_divisor": (
        lambda m, x: F.avg_pool2d(m.conv(x), 2, divisor_override=3),
        {},
        "divides by the size of the window",
    ),
    "dilated_pool": (lambda m, x: F.max_pool2d(m.conv(x), 2, dilation=2), {}, "max pool with dil"),
    "sum_of_shapes": (
        lambda m, x: m.conv(x) + m.conv(x)[:, :1],
        {},
        "adds element by element",
    ),
    "product_of_shapes": (
        lambda m, x: m.conv(x) * m.conv(x)[:, :1],
        {},
        r"product of \[2, 4, 6, 6\] and \[2, 1, 6, 6\]",
    ),
    "large_average": (
        lambda m, x: m.layer(x).mean((1, 2, 3)),
        {"layer": nn.Conv2d(4, 3, 1)},
        "average over 2187 values of 1 channel",
    ),
    "float_result": (lambda m, x: m.conv(x), {"output_bits": None}, "Set output_bits=8"),
    "wide_result": (lambda m, x: m.conv(x), {"output_bits": 16}, "Set output_bits=8"),
    "wide_weight": (lambda m, x: m.conv(x), {"weight_bits": 16}, "Set weight_bits=8"),
    "wide_linear_result": (
        lambda m, x: m.layer(x),
        {"layer": nn.Linear(27, 3), "output_bits": 16},
        "16-bit result because the linear layers of venusA",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_engine_computes_wrongly_is_refused(tmp_path, case):
    run, layers, match = REFUSED[case]
    fields = {name: value for name, value in layers.items() if name.endswith("_bits")}
    layers = {name: copy.deepcopy(v) for name, v in layers.items() if name not in fields}
    x = image(4, 27) if "layer" in layers else image()
    model = quantized(conv_model(run, **layers), x, **fields)
    with pytest.raises(linger.UnsupportedError, match=match):
        export_onnx(model, (x,), tmp_path / "model.onnx", "linger")


def test_codes_of_16_bits_are_not_requantized(tmp_path):
    x = torch.randn(3, 8)
    model = Lambda(lambda m, x: m.b(m.a(x)), a=nn.Linear(8, 4), b=nn.Linear(4, 4))
    overrides = {"a": {"output_bits": 16}}
    linger.prepare(model, (x,))
    linger.quantize(model, linger.QuantConfig(platform="venus"), overrides=overrides)
    model.train()(x)
    with pytest.raises(linger.UnsupportedError, match="change from 16-bit codes"):
        export_onnx(model.eval(), (x,), tmp_path / "model.onnx", "linger")


def test_a_large_pool_names_its_platform(tmp_path):
    x = image(4, 16)
    model = quantized(conv_model(lambda m, x: F.max_pool2d(m.conv(x), 7, 1)), x)
    proto = exported(model, tmp_path, x)
    pool = next(node for node in proto.graph.node if node.op_type == "MaxPool")
    assert pool.domain == "linger"
    assert attributes(proto, pool.name)["platform"] == "venusA"


# --- inputs and outputs -----------------------------------------------------------------------


def test_values_enter_and_leave_integers_once(tmp_path):
    """Nothing is quantized twice, and nothing becomes real between two ops of the engine."""

    def run(m, x):
        y = torch.cat([m.conv(x), m.other(x)], 1)
        return F.max_pool2d(torch.sigmoid(y), 2), y

    model = quantized(conv_model(run, other=nn.Conv2d(4, 4, 3)), image())
    proto = exported(model, tmp_path, image())
    assert ops(proto).count("Quant") == 1
    assert ops(proto).count("Dequant") == 2
    readers = {name for node in proto.graph.node for name in node.input}
    assert not readers & {n.output[0] for n in proto.graph.node if n.op_type == "Dequant"}


def test_outputs_come_in_the_order_of_the_forward(tmp_path):
    x = image()
    run = lambda m, x: {"z": m.conv(x), "a": (m.layer(x), None, 3), "same": x}  # noqa: E731
    model = quantized(conv_model(run, layer=nn.Conv2d(4, 4, 3)), x)
    proto = exported(model, tmp_path, x)
    assert [v.name for v in proto.graph.output] == ["z", "a_0", "same"]


def test_one_value_may_be_returned_twice(tmp_path):
    x = image()

    def run(m, x):
        y = m.conv(x)
        return y, y, y[:, :1]

    proto = exported(quantized(conv_model(run), x), tmp_path, x)
    assert [v.name for v in proto.graph.output] == ["output_0", "output_1", "output_2"]


def test_two_inputs_and_a_keyword(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, left, pair, *, gate=None, twice=False):
            y = self.a(left) + self.b(pair["right"])
            y = y * gate
            return y + y if twice else y

    left, right, gate = image(), image(), torch.rand(2, 4, 1, 1)
    inputs, kwargs = (left, {"right": right}), {"gate": gate, "twice": True}
    proto = exported(quantized(Two(), *inputs, kwargs=kwargs), tmp_path, *inputs, kwargs=kwargs)
    assert [v.name for v in proto.graph.input] == ["left", "pair_right", "gate"]
    assert ops(proto).count("QAdd") == 2


def test_a_branch_goes_the_way_of_the_example(tmp_path):
    def run(m, x):
        y = m.conv(x)
        if y.sum() > x.sum() + 1e6:
            y = y * 2
        return F.relu(y)

    x = image()
    model = quantized(conv_model(run), x)
    with pytest.warns(linger.QuantizationWarning, match=r"test_linger_export\.py:\d+ decides"):
        proto = exported(model, tmp_path, x)
    assert ops(proto) == [*MANY_STEPS, "Relu", "Dequant"]


def test_no_warning_without_a_branch(tmp_path):
    x = image(3)
    model = quantized(Net(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(model, (x,), tmp_path / "model.onnx")


def test_no_warning_about_the_weights_of_recurrent_layers(tmp_path):
    x = torch.randn(1, 4, 3)
    model = Lambda(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(3, 3, batch_first=True))
    linger.prepare(model, (x,))
    linger.calibrate(linger.quantize(model), [(x,)]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(model, (x,), tmp_path / "model.onnx")


# --- what export leaves behind ----------------------------------------------------------------


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


# --- errors -----------------------------------------------------------------------------------


def refused(model, error, match, *inputs, path, **kwargs):
    with pytest.raises(error, match=match):
        export_onnx(model, inputs, path, **kwargs)
    assert not [p for p in path.parent.iterdir() if "onnx" in p.name] if path.parent.is_dir() else 1


def test_errors_name_the_cause(tmp_path):
    x = image(3)
    path = tmp_path / "model.onnx"
    plain = Net()
    refused(plain, linger.NotReadyError, "not prepared", x, path=path)
    linger.prepare(plain, (x,))
    linger.quantize(plain)
    refused(plain, linger.NotReadyError, "`stem/conv2d/0`", x, path=path)
    model = quantized(Net(), x)
    refused(model, linger.ConfigError, "unknown dialect 'lingr'", x, path=path, dialect="lingr")
    refused(model, linger.ConfigError, "does not exist", x, path=tmp_path / "no" / "model.onnx")
    refused(model, linger.ConfigError, "do not fit", path=path)
    with pytest.raises(linger.ConfigError, match="is a folder"):
        export_onnx(model, (x,), tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    x = image(3)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    model = quantized(Net(), x)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(linger.ConfigError, match="No space left"):
        export_onnx(model, (x,), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("run", "layers", "fields", "match"),
    [
        (lambda m, x: m.layer(x[:, :, None]), {"layer": nn.Conv3d(4, 4, 1)}, {}, "3-dimensional"),
        (lambda m, x: F.avg_pool2d(m.conv(x), 4, 4, ceil_mode=True), {}, {}, "ceil_mode"),
        (lambda m, x: m.conv(x), {}, {"granularity": "channel"}, "granularity='tensor'"),
        (lambda m, x: m.conv(x), {}, {"rounding": "half_even"}, "rounds half up"),
        (lambda m, x: m.conv(x), {}, {"platform": "onnxruntime"}, "dialect='qdq'"),
    ],
    ids=["conv3d", "ceil_mode", "per_channel", "rounding", "platform"],
)
def test_what_the_dialect_cannot_say_is_refused(tmp_path, run, layers, fields, match):
    x = image()
    model = quantized(conv_model(run, **copy.deepcopy(layers)), x, **fields)
    refused(model, linger.UnsupportedError, match, x, path=tmp_path / "model.onnx")


def test_one_graph_has_one_platform(tmp_path):
    x = image()
    model = conv_model(lambda m, x: m.layer(m.conv(x)), layer=nn.Conv2d(4, 4, 3))
    linger.prepare(model, (x,))
    linger.quantize(model, overrides={"layer": {"platform": "arcs"}})
    model.train()(x)
    refused(model, linger.UnsupportedError, "one platform", x, path=tmp_path / "model.onnx")


def test_a_forward_that_counts_is_refused(tmp_path):
    def run(m, x):
        m.count += 1
        return m.conv(x) + (m.conv(x) if m.count % 2 else 0.5)

    x = image()
    model = conv_model(run)
    model.count = 0
    quantized(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(model, linger.UnsupportedError, "ran", x, path=tmp_path / "model.onnx")
