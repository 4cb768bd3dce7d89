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


# --- what other tools write -------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["", "thinker", "linger", "something"])
def test_domains_are_ignored(domain):
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0], domain=domain),
        node("iqAdd", ["t", "t"], ["y"], domain=domain, **{**ADD, "scale_y": 32.0}),
    ]
    found = OnnxIntegerRunner(graph(nodes, "x", "y")).run({"x": CODES})["y"]
    assert found.tolist() == [[-128], [-2], [0], [6], [127]]


def test_axes_may_be_attributes_as_before_and_operands_as_now():
    axes = {"a": np.array([0]), "b": np.array([1, 2])}
    nodes = [
        node("Squeeze", ["x"], ["s"], axes=[0], domain="linger"),
        node("Unsqueeze", ["s"], ["u"], axes=[0, 2]),
        node("Squeeze", ["u", "a"], ["v"]),
        node("Unsqueeze", ["v", "b"], ["w"]),
        node("Squeeze", ["w"], ["y"]),
    ]
    runner = OnnxIntegerRunner(graph(nodes, "x", "y", axes))
    values = runner.trace({"x": CODES})
    shapes = [values[name].shape for name in "suvwy"]
    assert shapes == [(5,), (1, 5, 1), (5, 1), (5, 1, 1, 1), (5,)]
    assert np.array_equal(values["y"], CODES[0])


def test_plain_ops_on_codes_keep_their_type():
    constants = {
        **{"shape": np.array([5, 1]), "starts": np.array([1]), "ends": np.array([4])},
        "axes": np.array([0]),
    }
    pool = {"kernel_shape": [1, 2], "strides": [1, 1], "pads": [0, 0, 0, 1]}
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Reshape", ["r", "shape"], ["column"]),
        node("Slice", ["column", "starts", "ends", "axes"], ["cut"]),
        node("Unsqueeze", ["x", "axes"], ["one"]),
        node("Unsqueeze", ["one", "axes"], ["image"]),
        node("MaxPool", ["image"], ["pooled"], **pool),
        node("Flatten", ["pooled"], ["row"], axis=1),
    ]
    runner = OnnxIntegerRunner(graph(nodes, "x", ["cut", "row"], constants))
    found = runner.run({"x": CODES})
    assert found["cut"].tolist() == [[0], [0], [5]]
    assert found["row"].tolist() == [[-3, 0, 5, 127, 127]]
    assert {array.dtype for array in found.values()} == {np.dtype(np.int8)}


def test_nodes_may_come_in_any_order():
    nodes = [node("Relu", ["a"], ["y"]), node("Neg", ["b"], ["a"]), node("Neg", ["x"], ["b"])]
    model = graph(nodes, "x", "y")
    before = model.SerializeToString()
    assert np.array_equal(OnnxIntegerRunner(model).run({"x": CODES})["y"], np.maximum(CODES, 0))
    assert model.SerializeToString() == before


def test_a_dump_holds_every_tensor(tmp_path):
    nodes = [
        node("Relu", ["x"], ["/act/0"]),
        node("iqAdd", ["/act/0", "x"], ["file"], **ADD),  # a name that numpy takes for its own
        node("Identity", ["file"], ["y"]),
    ]
    runner = OnnxIntegerRunner(graph(nodes, "x", "y"))
    path = tmp_path / "tensors.npz"
    found = runner.run({"x": CODES}, dump=path)
    with np.load(path) as dumped:
        assert set(dumped.files) == {"x", "/act/0", "file", "y"}
        assert np.array_equal(dumped["/act/0"], np.maximum(CODES, 0))
        assert np.array_equal(dumped["y"], found["y"])
    with pytest.raises(linger.ConfigError, match="does not exist"):
        runner.run({"x": CODES}, dump=tmp_path / "none" / "tensors.npz")
    with pytest.raises(linger.ConfigError, match="Missing"):
        runner.run({}, dump=tmp_path / "other.npz")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tensors.npz"]


def test_a_global_average_is_one_over_whole_maps():
    x = np.random.default_rng(0).integers(-128, 128, (1, 3, 4, 8)).astype(np.int8)
    grid = {"scale_x": 16.0, "scale_o": 16.0, "x_bits": 8, "o_bits": 8}
    window = {"kernel_shape": [4, 8], "strides": [4, 8], "pads": [0] * 4, "ceil_mode": 0}
    nodes = [
        node("QGlobalAveragePool2d", ["x"], ["y"], **grid),
        node("QAvgPool2d", ["x"], ["z"], **grid, **window),
    ]
    found = OnnxIntegerRunner(graph(nodes, "x", "yz")).run({"x": x})
    assert np.array_equal(found["y"], found["z"])
    assert np.array_equal(found["y"], (x.astype(int).sum((2, 3), keepdims=True) + 16) >> 5)


# --- bad input --------------------------------------------------------------------------------

POOL = {"kernel_shape": [2, 2], "strides": [1, 1], "pads": [0, 0, 0, 0]}
CONV = {
    **{**POOL, "dilations": [1, 1], "group": 1, "scale_x": 1.0, "scale_w": 1.0, "scale_o": 1.0},
    **{"data_bits": 8, "parameter_bits": 8, "o_bits": 8},
}


@pytest.mark.parametrize(
    ("op_type", "attributes", "match"),
    [
        ("QAdd", ADD | {"scale_x": "4"}, "'scale_x' must be FLOAT. Found: '4'"),
        ("QAdd", ADD | {"scale_o": [4.0]}, "'scale_o' must be FLOAT"),
        ("QAdd", ADD | {"o_bits": 8.5}, "'o_bits' must be INT"),
        ("QAdd", ADD | {"o_bits": 99}, "o_bits must be from 2 to 32. Found: 99"),
        ("QAdd", ADD | {"scale_x": 0.0}, "scale_x must be a power of two"),
        ("QAdd", ADD | {"scale_x": float("nan")}, "scale_x must be a power of two"),
        ("QAdd", ADD | {"scale_x": 2.0**100}, "from 2.-64 to 2.64"),
        ("QAdd", ADD | {"quant_mode": 3}, "'quant_mode' must be STRING"),
        ("Conv2dInt", CONV | {"pads": 1}, "'pads' must be INTS. Found: 1"),
        ("Conv2dInt", CONV | {"pads": [0, 0]}, r"pads must be 4 numbers from 0 on. Found: \[0, 0"),
        ("Conv2dInt", CONV | {"pads": [-1, 0, 0, 0]}, "pads must be 4 numbers"),
        ("Conv2dInt", CONV | {"strides": [0, 1]}, "strides must be 2 numbers from 1 on"),
        ("Conv2dInt", CONV | {"kernel_shape": [2, 3]}, "kernel_shape is .2, 3., and the weight's"),
        ("Conv2dInt", CONV | {"pads": [2**20] * 4}, "more than 268435456 are not run"),
        ("ConvTranspose2dInt", CONV | {"strides": [2**20] * 2}, "more than 268435456 are not run"),
        ("MaxPool", POOL | {"pads": [2**20] * 4}, "more than 268435456 are not run"),
        ("AvgPool2dInt", POOL | {"scale_x": 1.0, "scale_o": 1.0, "ceil_mode": 1}, "ceil_mode=1"),
        ("Expand", {}, "Expand.* more than 268435456 are not run"),
        ("Tile", {}, "Tile.* more than 268435456 are not run"),
        ("ConstantOfShape", {}, "more than 268435456 are not run"),
    ],
)
def test_bad_attributes_are_named(op_type, attributes, match):
    constants = {"w": np.ones((1, 1, 2, 2), np.int8), "large": np.array([1, 1, 2**20, 2**20])}
    x = np.ones((1, 1, 4, 4), np.int8)
    inputs = {"QAdd": ["x", "x"], "MaxPool": ["x"], "ConstantOfShape": ["large"]}
    plain = ["x", "large"] if op_type in ("Expand", "Tile") else ["x", "w"]
    model = graph(
        [node(op_type, inputs.get(op_type, plain), ["y"], **attributes)], "x", "y", constants
    )
    with pytest.raises(linger.UnsupportedError, match=match) as caught:
        OnnxIntegerRunner(model).run({"x": x})
    assert f"node '{op_type}_y'" in str(caught.value)


def test_real_edges_of_codes_are_refused():
    edges = {"low": np.float32(0), "high": np.float32(6)}
    model = graph([node("Clip", ["x", "low", "high"], ["y"])], "x", "y", edges)
    with pytest.raises(linger.UnsupportedError, match="edges of codes have to be codes"):
        OnnxIntegerRunner(model).run({"x": CODES})
    assert OnnxIntegerRunner(model).run({"x": np.float32([7.0])})["y"].tolist() == [6.0]


def test_graphs_that_cannot_be_followed_are_refused():
    cycle = [node("Neg", ["b"], ["a"]), node("Add", ["a", "x"], ["b"]), node("Relu", ["b"], ["y"])]
    with pytest.raises(linger.ConfigError, match=r"node 'Neg_a' .* the graph is a cycle"):
        OnnxIntegerRunner(graph(cycle, "x", "y"))
    with pytest.raises(linger.ConfigError, match="reads 'gone', which nothing makes"):
        OnnxIntegerRunner(graph([node("Relu", ["gone"], ["y"])], "x", "y"))
    with pytest.raises(linger.ConfigError, match="an output reads 'y', which nothing makes"):
        OnnxIntegerRunner(graph([node("Relu", ["x"], ["z"])], "x", "y"))
    with pytest.raises(linger.ConfigError, match="'y' is made more than once"):
        OnnxIntegerRunner(graph([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])], "x", "y"))


def test_damaged_files_are_refused(tmp_path):
    weight = {"w": np.ones((4, 3), np.int8)}
    model = graph([node("Add", ["x", "w"], ["y"])], "x", "y", weight)
    for content in (b"", b"no onnx at all", b"\x08"):
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        with pytest.raises(linger.ConfigError, match=r"model\.onnx"):
            OnnxIntegerRunner(path)
    model.graph.initializer[0].raw_data = b"short"
    with pytest.raises(linger.ConfigError, match="the tensor 'w' cannot be read"):
        OnnxIntegerRunner(model)


def test_a_node_has_to_give_all_its_outputs():
    model = graph([node("Relu", ["x"], ["y", "z"])], "x", ["y", "z"])
    with pytest.raises(linger.UnsupportedError, match="has 2 outputs, and gives 1"):
        OnnxIntegerRunner(model).run({"x": CODES})
