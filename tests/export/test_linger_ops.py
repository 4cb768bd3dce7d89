"""One op at a time, as the engines are told of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_linger as linger
from lightning_linger.export import export_onnx
from lightning_linger.export.inspection import inspect_model
from tests.export.linger_models import (
    MANY_STEPS,
    PLATFORMS,
    attributes,
    conv_model,
    exported,
    image,
    ops,
    quantized,
)
from tests.models import Lambda

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

    def run(m, x):
        return m.layer(F.max_pool2d(F.relu(m.conv(x)), 2))

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
    def concatenated(m, x):
        return torch.cat([m.conv(x), m.layer(x) * 20], 1)

    x = image()
    model = conv_model(concatenated, layer=nn.Conv2d(4, 4, 3))
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


@pytest.mark.parametrize("platform", ["venusa", "arcs"])
def test_stacked_cell_states_are_joined_at_their_own_scale(platform, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(1, 5, 6)
    rnn = nn.LSTM(6, 4, num_layers=2, batch_first=True, bidirectional=True)
    model = Lambda(lambda m, x: m.rnn(m.fc(x)), fc=nn.Linear(6, 6), rnn=rnn)
    model = quantized(model, x, platform=platform)
    proto = exported(model, tmp_path, x)
    assert inspect_model(tmp_path / "model.onnx").problems == []
    (join,) = [
        node.name
        for node in proto.graph.node
        if node.op_type == "QCat" and attributes(proto, node.name)["o_bits"] == 32
    ]
    found = attributes(proto, join)
    assert {found[f"scale_x_{index}"] for index in range(4)} == {2.0**15} == {found["scale_o"]}
    assert "QMul" not in ops(proto)
