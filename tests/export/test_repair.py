"""Where a file enters and leaves integers is derived anew."""

import copy

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_linger as linger
from lightning_linger.export import OnnxIntegerRunner, export_onnx
from lightning_linger.export.flow import Codes
from lightning_linger.export.repair import repair, repair_file
from tests.export.graphs import INT8, model_of, node, ops, with_pairs, without
from tests.models import Lambda

X = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
CHIP = {"platform": "venusA", "quant_mode": "floor_add"}


@pytest.fixture(scope="module", params=["linger", "linger1"])
def healthy(request, tmp_path_factory):
    """A network with an op in real values in the middle, and two outputs."""
    torch.manual_seed(0)

    def run(m, x):
        y = F.max_pool2d(F.relu(m.conv(x)), 2)
        z = m.other(torch.atan(y)) + m.other(y)
        return m.fc(z.flatten(1)), y

    layers = {"conv": nn.Conv2d(3, 4, 3, padding=1), "other": nn.Conv2d(4, 4, 1)}
    model = linger.prepare(Lambda(run, **layers, fc=nn.Linear(64, 5)), (torch.from_numpy(X),))
    linger.quantize(model, linger.QuantConfig(platform="venusa"))
    linger.calibrate(model, [(torch.from_numpy(X),)]).eval()
    folder = tmp_path_factory.mktemp("repair")
    return onnx.load(export_onnx(model, (torch.from_numpy(X),), folder / "m.onnx", request.param))


def results(model):
    return list(OnnxIntegerRunner(model).run({"input_0": X}).values())


def described(model):
    """The nodes with the values they read, whatever the order."""
    nodes = []
    for found in model.graph.node:
        plain = copy.deepcopy(found)
        plain.ClearField("attribute")
        plain.attribute.extend(sorted(found.attribute, key=lambda attribute: attribute.name))
        nodes.append(plain.SerializeToString())
    return sorted(nodes)


def grids(model):
    """What Quant would say, by the codes that every node makes."""
    domain = next(n.domain for n in model.graph.node if n.domain)
    words = CHIP if domain == "linger" else {**CHIP, "platform_quant": "luna_quant"}
    found = {}
    for made in model.graph.node:
        scale = next((a.f for a in made.attribute if a.name == "scale_o"), None)
        if made.op_type == "Quant":
            scale = next(a.f for a in made.attribute if a.name == "scale_x")
        if made.op_type in ("Relu", "MaxPool", "Flatten", "Reshape"):
            scale = found.get(made.input[0], {}).get("scale_x")
        if scale is not None and made.op_type != "Dequant":
            found[made.output[0]] = {**words, "data_bits": 8, "scale_x": scale, "zero_point": 0}
    return found


def test_a_healthy_file_stays_as_it_is(healthy):
    repaired = repair(healthy)
    assert repaired.changes == []
    assert repaired.model is healthy


def check(damaged, healthy, names=True):
    before = damaged.SerializeToString()
    repaired = repair(damaged)
    assert damaged.SerializeToString() == before
    assert repaired.changes
    if names:
        assert described(repaired.model) == described(healthy)
    assert sorted(ops(repaired.model)) == sorted(ops(healthy))
    onnx.checker.check_model(repaired.model, full_check=True)
    for found, wanted in zip(results(repaired.model), results(healthy), strict=True):
        assert np.array_equal(found, wanted)
    assert [v.name for v in repaired.model.graph.output] == [v.name for v in healthy.graph.output]
    kinds = {v.name: v.type for v in healthy.graph.value_info}
    if names:
        assert {v.name: v.type for v in repaired.model.graph.value_info} == kinds
    assert repair(repaired.model).changes == []
    return repaired.changes


def test_pairs_in_the_middle_are_taken_out(healthy):
    damaged = with_pairs(healthy, grids(healthy))
    assert ops(damaged).count("Quant") > 8
    changes = check(damaged, healthy)
    assert all(change.startswith("removed") for change in changes)


def test_what_is_missing_is_put_in(healthy):
    damaged = without(healthy, "Quant", "Dequant")
    assert not {"Quant", "Dequant"} & set(ops(damaged))
    changes = check(damaged, healthy, names=False)
    assert sum(change.startswith("inserted Quant") for change in changes) == 2
    assert sum(change.startswith("inserted Dequant") for change in changes) == 2


def test_wrong_scales_of_dequants_are_corrected(healthy):
    damaged = copy.deepcopy(healthy)
    for found in damaged.graph.node:
        if found.op_type == "Dequant":
            found.attribute[0].f *= 4
    changes = check(damaged, healthy)
    assert all(change.startswith("corrected Dequant") for change in changes)
    assert len(changes) == 2


def test_copies_and_second_quants_are_taken_out(healthy):
    damaged = copy.deepcopy(healthy)
    nodes = []
    for found in damaged.graph.node:
        nodes.append(found)
        if found.op_type == "Quant":
            again = copy.deepcopy(found)
            again.name, again.output[0] = f"{found.name}/again", f"{found.output[0]}/again"
            nodes += [again, node("Identity", list(again.output), [f"{found.output[0]}/copy"])]
        elif found.domain and found.op_type != "Dequant":
            found.input[0] = (
                f"{found.input[0]}/copy"
                if any(f"{found.input[0]}/copy" in other.output for other in nodes)
                else found.input[0]
            )
    del damaged.graph.node[:]
    damaged.graph.node.extend(nodes)
    check(damaged, healthy)


ADD = {"scale_x": 32.0, "scale_y": 32.0, "scale_o": 16.0}
IN, OUT = {"data_bits": 8, "scale_x": 32.0}, {"scale_o": 16.0}


def repaired_ops(nodes, inputs, outputs, constants=(), **kinds):
    repaired = repair(model_of(nodes, inputs, outputs, constants, **kinds))
    return ops(repaired.model), repaired


def test_a_pair_of_two_scales_is_a_requantization():
    nodes = [
        node("iqAdd", ["x", "x"], ["a"], **ADD),
        node("Dequant", ["a"], ["r"], **OUT),
        node("Quant", ["r"], ["q"], data_bits=8, scale_x=4.0, platform_quant="luna_quant"),
        node("iqAdd", ["q", "q"], ["y"], scale_x=4.0, scale_y=4.0, scale_o=4.0),
    ]
    model = model_of(nodes, "x", "y", x=INT8, y=INT8)
    repaired = repair(model)
    assert ops(repaired.model) == ["iqAdd", "Requant", "iqAdd"]
    codes = np.arange(-128, 128).astype(np.int8)
    wanted = OnnxIntegerRunner(model).run({"x": codes})["y"]
    assert np.array_equal(OnnxIntegerRunner(repaired.model).run({"x": codes})["y"], wanted)
    requant = repaired.model.graph.node[1]
    named = {a.name: onnx.helper.get_attribute_value(a) for a in requant.attribute}
    assert named == {
        **{"platform_quant": b"luna_quant", "data_bits": 8, "scale_x": 16.0},
        **{"o_bits": 8, "scale_o": 4.0},
    }


def test_outputs_keep_the_type_that_is_declared():
    nodes = [node("iqAdd", ["x", "x"], ["y"], **ADD)]
    found, repaired = repaired_ops(nodes, "x", "y", y=INT8)
    assert found == ["Quant", "iqAdd"]
    found, repaired = repaired_ops(nodes, "x", "y", x=INT8)
    assert found == ["iqAdd", "Dequant"]
    assert repaired.model.graph.node[0].output == ["y/codes"]
    assert repaired.model.graph.output[0].name == "y"
    found, repaired = repaired_ops(nodes, "x", "y", x=INT8, y=INT8)
    assert found == ["iqAdd"]
    assert not repaired.changes


def test_one_quant_serves_all_that_read_at_its_scale():
    nodes = [
        node("iqAdd", ["x", "x"], ["a"], **ADD),
        node("iqMul", ["x", "a"], ["y"], scale_x=32.0, scale_y=16.0, scale_o=16.0),
        node("iqAdd", ["x", "x"], ["z"], **{**ADD, "scale_x": 64.0, "scale_y": 64.0}),
    ]
    found, _ = repaired_ops(nodes, "x", "yz", y=INT8, z=INT8)
    assert found == ["Quant", "iqAdd", "iqMul", "Quant", "iqAdd"]


def test_what_nobody_reads_is_taken_out():
    nodes = [
        node("iqAdd", ["x", "x"], ["y"], **ADD),
        node("Quant", ["z"], ["q"], **IN),
        node("Dequant", ["q"], ["r"], scale_o=32.0),
        node("Relu", ["z"], ["w"]),
    ]
    found, repaired = repaired_ops(nodes, "xz", "yw", x=INT8, y=INT8)
    assert found == ["iqAdd", "Relu"]
    assert repaired.changes == ["removed Dequant `Dequant_r`", "removed Quant `Quant_q`"]


@pytest.mark.parametrize(
    ("move", "constants"),
    [
        (node("Relu", ["r"], ["m"]), {}),
        (node("Reshape", ["r", "shape"], ["m"]), {"shape": np.array([-1])}),
        (node("Concat", ["r", "r"], ["m"], axis=0), {}),
        (node("Pad", ["r", "pads"], ["m"]), {"pads": np.array([1, 1])}),
        (node("Clip", ["r", "low"], ["m"]), {"low": np.int8(3)}),
    ],
    ids=lambda value: getattr(value, "op_type", ""),
)
def test_what_keeps_codes_is_not_left(move, constants):
    nodes = [
        node("iqAdd", ["x", "x"], ["a"], **ADD),
        node("Dequant", ["a"], ["r"], **OUT),
        move,
        node("Quant", ["m"], ["q"], **{**IN, "scale_x": 16.0}),
        node("iqAdd", ["q", "q"], ["y"], **{**ADD, "scale_x": 16.0, "scale_y": 16.0}),
    ]
    found, _ = repaired_ops(nodes, "x", "y", constants, x=INT8, y=INT8)
    assert found == ["iqAdd", move.op_type, "iqAdd"]


@pytest.mark.parametrize(
    ("between", "constants"),
    [
        (node("Sigmoid", ["a"], ["m"]), {}),
        (node("Clip", ["a", "low"], ["m"]), {"low": np.float32(0.5)}),
        (
            node("Pad", ["a", "pads", "low"], ["m"]),
            {"pads": np.array([1, 1]), "low": np.float32(1)},
        ),
        (node("Concat", ["a", "x"], ["m"], axis=0), {}),
    ],
    ids=lambda value: getattr(value, "op_type", ""),
)
def test_what_needs_real_values_gets_them(between, constants):
    nodes = [
        node("iqAdd", ["x", "x"], ["a"], **ADD),
        between,
        node("iqAdd", ["m", "m"], ["y"], **ADD),
    ]
    found, _ = repaired_ops(nodes, "x", "y", constants, y=INT8)
    assert found == ["Quant", "iqAdd", "Dequant", between.op_type, "Quant", "iqAdd"]


def test_constants_and_places_are_left_alone():
    nodes = [
        node("Constant", [], ["k"], value=onnx.numpy_helper.from_array(np.int8([2]))),
        node("iqMul", ["x", "k"], ["a"], **ADD),
        node("ArgMax", ["a"], ["i"], axis=0, keepdims=0),
        node("Gather", ["table", "i"], ["y"], scale_w=16.0, scale_o=16.0, parameter_bits=8),
    ]
    table = {"table": np.int8([[1], [2]])}
    found, repaired = repaired_ops(nodes, "x", "y", table, x=INT8)
    assert found == ["Constant", "iqMul", "ArgMax", "Gather", "Dequant"]
    assert Codes(8, 16.0).element_type == INT8
    assert "step 0.0625" in repaired.changes[0]


@pytest.mark.parametrize(
    ("nodes", "kinds", "error", "match"),
    [
        ([node("Relu", ["x"], ["y"])], {}, linger.UnsupportedError, "no op of the linger dialect"),
        (
            [node("iqAdd", ["x", "x"], ["a"], **ADD), node("Relu", ["x"], ["y"])],
            {},
            None,
            "",
        ),
        (
            [node("Relu", ["z"], ["y"]), node("iqAdd", ["x", "x"], ["a"], **ADD)],
            {"z": INT8},
            linger.UnsupportedError,
            "output 'y' is codes, and nothing says their scale",
        ),
        (
            [node("Quant", ["x"], ["y"], data_bits=8)],
            {},
            linger.UnsupportedError,
            "Quant_y.* lacks its scale",
        ),
        (
            [node("Requant", ["x"], ["y"], data_bits=8, scale_x=1.0)],
            {},
            linger.UnsupportedError,
            "Requant_y.* lacks the attribute 'scale_o'",
        ),
        (
            [node("iqAdd", ["x", "x"], ["y"], **ADD | {"scale_x": "one"})],
            {},
            linger.UnsupportedError,
            "iqAdd_y.* 'scale_x' must be FLOAT",
        ),
        (
            [node("iqAdd", ["x", "x"], ["y"], **ADD | {"scale_x": -1.0})],
            {},
            linger.UnsupportedError,
            "scale_x must be a positive number",
        ),
        (
            [node("Quant", ["z"], ["y"], data_bits=8, scale_x=1.0)],
            {"z": onnx.TensorProto.INT16},
            linger.UnsupportedError,
            "Quant_y.* reads the codes 'z', and nothing says their scale",
        ),
        ([node("iqAdd", ["x", "y"], ["y"], **ADD)], {}, linger.ConfigError, "the graph is a cycle"),
    ],
)
def test_bad_files_are_refused(nodes, kinds, error, match):
    model = model_of(nodes, "xz", "y", **kinds)
    if error is None:
        repair(model)
        return
    with pytest.raises(error, match=match):
        repair(model)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    source, target = tmp_path / "model.onnx", tmp_path / "repaired.onnx"
    onnx.save(model_of([node("iqAdd", ["x", "x"], ["y"], **ADD)], "x", "y"), source)
    before = source.read_bytes()
    repaired = repair_file(source, target)
    assert onnx.load(target) == repaired.model
    assert source.read_bytes() == before
    source.write_bytes(before[: len(before) // 2])
    target.unlink()
    with pytest.raises(linger.LingerError):
        repair_file(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    with pytest.raises(linger.ConfigError, match="does not exist"):
        repair_file(source, tmp_path / "none" / "model.onnx")
