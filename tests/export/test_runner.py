import numpy as np
import onnx
import pytest

import lightning_linger as linger
from lightning_linger.export import OnnxIntegerRunner


def graph(nodes, inputs, outputs, constants=()):
    made = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in inputs],
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in dict(constants).items()],
    )
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)])


def node(op_type, inputs, outputs, **attributes):
    return onnx.helper.make_node(op_type, inputs, outputs, f"{op_type}_{outputs[0]}", **attributes)


CODES = np.array([[-128, -3, 0, 5, 127]], np.int8)
ADD = {"scale_x": 32.0, "scale_y": 16.0, "scale_o": 16.0}


@pytest.mark.parametrize("name", ["iqAdd", "QAdd"])
def test_both_generations_of_names_and_no_quant(name):
    model = graph([node(name, ["x", "y"], ["z"], **ADD)], "xy", "z")
    found = OnnxIntegerRunner(model).run({"x": CODES, "y": CODES})["z"]
    # Each operand is rounded and saturated first, half up.
    assert found.tolist() == [[-128, -4, 0, 8, 127]]
    assert found.dtype == np.int8


def test_real_values_are_quantized_by_the_first_op():
    model = graph([node("iqAdd", ["x", "y"], ["z"], **ADD)], "xy", "z")
    runner = OnnxIntegerRunner(model)
    real = {"x": CODES / np.float32(32), "y": CODES / np.float32(16)}
    expected = runner.run({"x": CODES, "y": CODES})["z"]
    assert np.array_equal(runner.run(real)["z"], expected)


def test_quant_accepts_codes_and_real_values():
    nodes = [node("Quant", ["x"], ["q"], data_bits=8, scale_x=4.0), node("Relu", ["q"], ["y"])]
    runner = OnnxIntegerRunner(graph(nodes, "x", "y"))
    assert np.array_equal(runner.run({"x": CODES / np.float32(4)})["y"], np.maximum(CODES, 0))
    assert np.array_equal(runner.run({"x": CODES})["y"], np.maximum(CODES, 0))


@pytest.mark.parametrize(("bits", "dtype"), [(16, np.int16), (32, np.int32)])
def test_widening_shifts_without_saturation(bits, dtype):
    attributes = {"data_bits": 8, "o_bits": bits, "scale_x": 1.0, "scale_o": 1024.0}
    runner = OnnxIntegerRunner(graph([node("Requant", ["x"], ["y"], **attributes)], "x", "y"))
    found = runner.run({"x": CODES})["y"]
    assert found.dtype == dtype
    assert np.array_equal(found, np.left_shift(CODES.astype(dtype), 10))


def test_uneven_pads_and_a_wide_accumulator():
    x = np.random.default_rng(0).integers(-128, 128, (1, 3, 5, 6)).astype(np.int8)
    weight = np.random.default_rng(1).integers(-128, 128, (4, 3, 2, 3)).astype(np.int8)
    attributes = {
        **{"kernel_shape": [2, 3], "strides": [1, 1], "dilations": [1, 1], "group": 1},
        **{"pads": [0, 1, 1, 0], "data_bits": 8, "parameter_bits": 8, "o_bits": 8},
        **{"scale_x": 16.0, "scale_w": 64.0, "scale_o": 1.0},
    }
    model = graph([node("Conv2dInt", ["x", "w"], ["y"], **attributes)], "x", "y", {"w": weight})
    found = OnnxIntegerRunner(model).run({"x": x})["y"]
    padded = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (0, 1), (1, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2, 3), (2, 3))
    acc = np.einsum("nchwij,ocij->nohw", windows, weight.astype(np.int64))
    assert np.array_equal(found, np.clip((acc + 512) >> 10, -128, 127))


def test_plain_nodes_run_on_codes():
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0]),
        node("Dequant", ["t"], ["y"], scale_o=2.0),
    ]
    found = OnnxIntegerRunner(graph(nodes, "x", "y")).run({"x": CODES})["y"]
    assert np.array_equal(found, CODES.T / np.float32(2))


def test_platform_comes_from_the_nodes():
    bare = graph([node("Relu", ["x"], ["y"])], "x", "y")
    assert OnnxIntegerRunner(bare).platform == "venus"
    named = graph([node("QAdd", ["x", "y"], ["z"], platform="venusA", **ADD)], "xy", "z")
    assert OnnxIntegerRunner(named).platform == "venusA"
    mixed = [
        node("QAdd", ["x", "y"], ["z"], platform="venusA", **ADD),
        node("QAdd", ["z", "y"], ["w"], platform="arcs", **ADD),
    ]
    with pytest.raises(linger.UnsupportedError, match="several platforms"):
        OnnxIntegerRunner(graph(mixed, "xy", "w"))
    with pytest.raises(linger.UnsupportedError, match="'saturn'"):
        OnnxIntegerRunner(graph([node("Relu", ["x"], ["y"], platform="saturn")], "x", "y"))


def test_a_model_may_be_a_path_or_bytes(tmp_path):
    model = graph([node("Relu", ["x"], ["y"])], "x", "y")
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    for given in (model, path, str(path), path.read_bytes()):
        assert OnnxIntegerRunner(given).input_names == ["x"]
    with pytest.raises(linger.ConfigError, match="missing"):
        OnnxIntegerRunner(tmp_path / "missing.onnx")


def test_errors_name_the_node():
    unknown = onnx.helper.make_node("FancyInt", ["x"], ["y"], "fancy", domain="thinker")
    with pytest.raises(linger.UnsupportedError, match=r"'fancy' \(FancyInt\)"):
        OnnxIntegerRunner(graph([unknown], "x", "y")).run({"x": CODES})
    with pytest.raises(linger.UnsupportedError, match=r"Nonsense_y.*Nonsense"):
        OnnxIntegerRunner(graph([node("Nonsense", ["x"], ["y"])], "x", "y")).run({"x": CODES})
    uneven = node("QAdd", ["x", "x"], ["y"], scale_x=3.0, scale_y=1.0, scale_o=1.0)
    with pytest.raises(linger.UnsupportedError, match=r"QAdd_y.*power of two"):
        OnnxIntegerRunner(graph([uneven], "x", "y")).run({"x": CODES})
    lacking = node("QAdd", ["x", "x"], ["y"], scale_x=1.0)
    with pytest.raises(linger.UnsupportedError, match="lacks the attribute"):
        OnnxIntegerRunner(graph([lacking], "x", "y")).run({"x": CODES})
    runner = OnnxIntegerRunner(graph([node("Relu", ["x"], ["y"])], "x", "y"))
    with pytest.raises(linger.ConfigError, match=r"Missing: \['x'\]; unknown: \['z'\]"):
        runner.run({"z": CODES})
