"""Files that were damaged at random: an error of the library or a result, and no hang."""

import random
import signal
from contextlib import contextmanager

import numpy as np
import onnx
import pytest

from lightning_linger import LingerError
from lightning_linger.export import OnnxIntegerRunner
from lightning_linger.export.inspection import inspect_model
from lightning_linger.export.repair import repair
from tests.export.graphs import model_of, node

SECONDS = 30
QUICK, THOROUGH = range(500), range(500, 12000)
INPUTS = {
    "x": np.linspace(-2, 2, 2 * 3 * 6 * 6, dtype=np.float32).reshape(2, 3, 6, 6),
    "i": np.array([[0, 3, 1]]),
}


def healthy():
    """A graph with an op of each family, most of them by their older names."""
    rng = np.random.default_rng(0)

    def codes(*shape, dtype=np.int8):
        return rng.integers(-9, 9, shape).astype(dtype)

    chip = {"platform": "arcs", "quant_mode": "floor_add"}
    bits = {"data_bits": 8, "o_bits": 8}
    layer = {**bits, "parameter_bits": 8, "scale_x": 32.0, "scale_w": 16.0, "scale_o": 32.0}
    window = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 0, 0]}
    conv = {**window, "kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]}
    conv |= {"dilations": [1, 1], "group": 1}
    grid, pair = {"scale_x": 32.0, "scale_o": 32.0}, {"scale_x": 32.0, "scale_y": 32.0}
    nodes = [
        node("Quant", ["x"], ["q"], data_bits=8, scale_x=32.0, **chip),
        node("Conv2dInt", ["q", "w", "b"], ["c"], **conv, **layer, **chip),
        node("Relu", ["c"], ["r"]),
        node("iqAdd", ["r", "r"], ["a"], **pair, scale_o=16.0, **chip),
        node("iqMul", ["r", "c"], ["m"], **pair, scale_o=16.0, **chip),
        node("iqCat", ["a", "m"], ["k"], scale_x_0=16.0, scale_x_1=16.0, scale_o=16.0, dim=1),
        node("MaxPool", ["k"], ["p"], **window),
        node("AvgPool2dInt", ["k"], ["v"], **window, ceil_mode=0, scale_x=16.0, scale_o=16.0),
        node("ConvTranspose2dInt", ["p", "w2", "b2"], ["t"], **conv, **{**layer, "scale_x": 16.0}),
        node("Dequant", ["v"], ["d"], scale_o=16.0),
        node("Tanh", ["d"], ["e"]),
        node("Quant", ["e"], ["f"], data_bits=8, scale_x=32.0, **chip),
        node("Reshape", ["f", "rows"], ["g"]),
        node("LinearInt", ["g", "lw", "lb"], ["h"], **layer, **chip),
        node("SoftmaxInt", ["h"], ["s"], **bits, scale_x=32.0, scale_o=128.0, axis=-1, **chip),
        node("LayerNormInt", ["h", "nw", "nb"], ["n"], **layer, **chip),
        node("iqSigmoid", ["n"], ["z"], **grid, **chip),
        node("Transpose", ["z"], ["y1"], perm=[0, 2, 1]),
        node("BmmInt", ["s", "y1"], ["y2"], **pair, **bits, scale_o=32.0, **chip),
        node("Gather", ["table", "i"], ["o"], scale_w=32.0, scale_o=32.0, parameter_bits=8),
        node(
            "LSTMInt",
            ["o", "wi", "wh", "bi", "bh"],
            ["l"],
            **{"input_size": 5, "hidden_size": 4, "batch_first": 0, "go_forward": 1},
            **{"scale_i": 32.0, "scale_h": 64.0, "scale_iw": 16.0, "scale_hw": 16.0},
            **{**bits, "parameter_bits": 8, "scale_o": 64.0, **chip},
        ),
        node("Expand", ["l", "more"], ["u"]),
        node("Pad", ["u", "edges"], ["j"]),
        node("Slice", ["j", "starts", "ends"], ["y3"]),
        node("Requant", ["t"], ["y4"], **bits, scale_x=32.0, scale_o=16.0, **chip),
        node("iqMax", ["s", "h"], ["e1"], **pair, scale_o=16.0, **chip),
        node("iqClamp", ["e1"], ["e2"], scale_x=16.0, scale_o=8.0, min=-2.0, max=3.0, **chip),
        node("iqPad", ["e2", "edges"], ["e3"], mode="constant"),
        node("iqVar", ["e3"], ["e4"], scale_x=8.0, scale_o=8.0, dim=1, unbiased=1, **chip),
        node("iqSum", ["e4"], ["y5"], scale_x=8.0, scale_o=4.0, dims=[-1], **chip),
        node(
            "QGRU",
            ["o", "gi", "gh", "bg", "bg"],
            ["y6"],
            **{"input_size": 5, "hidden_size": 4, "batch_first": 0, "go_forward": 0},
            **{"scale_x": 32.0, "scale_h": 64.0, "scale_iw": 16.0, "scale_hw": 16.0},
            **{"x_bits": 8, "w_bits": 8, "o_bits": 8, "scale_o": 64.0, **chip},
        ),
    ]
    constants = {
        **{"w": codes(4, 3, 3, 3), "b": codes(4, dtype=np.int32)},
        **{"w2": codes(8, 2, 3, 3), "b2": codes(2, dtype=np.int32)},
        **{"lw": codes(6, 9), "lb": codes(6, dtype=np.int32), "rows": np.array([2, 8, 9])},
        **{"nw": codes(6), "nb": codes(6, dtype=np.int32), "table": codes(4, 5)},
        **{"wi": codes(16, 5), "wh": codes(16, 4)},
        **{"bi": codes(16, dtype=np.int32), "bh": codes(16, dtype=np.int32)},
        **{"more": np.array([2, 3, 4]), "edges": np.array([0, 1, 0, 0, 0, 2])},
        **{"starts": np.array([0, 1]), "ends": np.array([1, 3])},
        **{"gi": codes(12, 5), "gh": codes(12, 4), "bg": codes(12, dtype=np.int32)},
    }
    outputs = ["y2", "y3", "y4", "y5", "y6"]
    return model_of(nodes, "xi", outputs, constants, i=onnx.TensorProto.INT64)


HEALTHY = healthy()


# --- damage -----------------------------------------------------------------------------------


NUMBERS = [0, 1, -1, 2, 7, 255, -(2**31), 2**31 - 1, 2**40, 2**62]
REALS = [0.0, -1.0, 3.0, 2.0**-140, 2.0**120, float("inf"), float("nan")]
NAMES = ["", "x", "nowhere", "y2", "\u00e9"]


def mutate_bytes(model, rng):
    content = bytearray(model.SerializeToString())
    for _ in range(rng.choice([1, 4, 40])):
        place = rng.randrange(len(content))
        how = rng.randrange(3)
        if how == 0:
            content[place] = rng.randrange(256)
        elif how == 1:
            del content[place : place + rng.choice([1, 8, 200])]
        else:
            content[place:place] = rng.randbytes(rng.choice([1, 8]))
        if not content:
            break
    return bytes(content[: rng.randrange(len(content))] if rng.random() < 0.2 else content)


def change_nodes(graph, rng):
    how, at = rng.randrange(6), rng.randrange(len(graph.node))
    found = graph.node[at]
    if how == 0:
        del graph.node[at]
    elif how == 1:
        graph.node.add().CopyFrom(found)
    elif how == 2:
        found.op_type = rng.choice([n.op_type for n in graph.node] + ["If", "Loop", "Nothing", ""])
    elif how == 3:
        values = [name for n in graph.node for name in n.output]
        names = found.input if found.input and rng.random() < 0.7 else found.output
        if names:
            names[rng.randrange(len(names))] = rng.choice(values + NAMES)
    elif how == 4:
        del found.input[rng.randrange(len(found.input) + 1) :]
    else:
        found.output.append(rng.choice(NAMES))


def change_attributes(graph, rng):
    found = rng.choice([n for n in graph.node if n.attribute] or list(graph.node))
    if not found.attribute:
        return
    place = rng.randrange(len(found.attribute))
    name = found.attribute[place].name
    del found.attribute[place]
    value = rng.choice(
        [
            None,
            rng.choice(NUMBERS),
            rng.choice(REALS),
            rng.choice(NAMES),
            [rng.choice(NUMBERS) for _ in range(rng.randrange(1, 5))],
            onnx.numpy_helper.from_array(np.zeros(3)),
            onnx.helper.make_graph([], "inner", [], []),
        ]
    )
    if value is not None:
        found.attribute.append(onnx.helper.make_attribute(name, value))
    if rng.random() < 0.1 and found.attribute:
        found.attribute[0].type = rng.randrange(15)


def change_constants(graph, rng):
    tensor = rng.choice(list(graph.initializer))
    how = rng.randrange(5)
    if how == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
    elif how == 1:
        tensor.dims[:] = reversed(tensor.dims)
    elif how == 2:
        tensor.data_type = rng.randrange(25)
    elif how == 3:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    else:
        try:
            array = onnx.numpy_helper.to_array(tensor)
        except ValueError:  # was damaged before
            return
        array = np.array(array.reshape(-1)[: rng.randrange(array.size + 1)])
        if array.size:
            info = np.iinfo(array.dtype)
            wanted = rng.choice([n for n in NUMBERS if info.min <= n <= info.max])
            array[rng.randrange(array.size)] = wanted
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def change_ends(graph, rng):
    value = rng.choice([*graph.input, *graph.output])
    how = rng.randrange(3)
    if how == 0:
        value.name = rng.choice(NAMES)
    elif how == 1:
        value.type.tensor_type.elem_type = rng.randrange(25)
    else:
        value.type.CopyFrom(onnx.helper.make_sequence_type_proto(value.type))


CHANGES = [change_nodes, change_attributes, change_attributes, change_constants, change_ends]


def damaged(seed):
    rng = random.Random(seed)
    if rng.random() < 0.25:
        return mutate_bytes(HEALTHY, rng)
    model = onnx.ModelProto()
    model.CopyFrom(HEALTHY)
    for _ in range(rng.choice([1, 1, 2, 5])):
        if model.graph.node:
            rng.choice(CHANGES)(model.graph, rng)
    return model.SerializeToString()


# --- the tests --------------------------------------------------------------------------------


@contextmanager
def time_limit(seconds):
    def stop(*_):
        pytest.fail(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(model):
    runner = OnnxIntegerRunner(model)
    inputs = {name: INPUTS.get(name, INPUTS["x"]) for name in runner.input_names}
    return runner.run(inputs)


TOOLS = {"inspect": lambda model: str(inspect_model(model)), "repair": repair, "run": run}


def outcome(tool, content):
    try:
        tool(content)
    except LingerError:
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "seeds", [QUICK, pytest.param(THOROUGH, marks=pytest.mark.slow)], ids=["quick", "thorough"]
)
def test_damage_is_an_error_of_the_library_or_no_harm(tool, seeds):
    assert outcome(TOOLS[tool], HEALTHY.SerializeToString())
    survived = 0
    for seed in seeds:
        with time_limit(SECONDS):
            try:
                survived += outcome(TOOLS[tool], damaged(seed))
            except Exception as error:
                msg = f"seed {seed}: {error!r}"
                raise AssertionError(msg) from error
    # The damage is neither so small that nothing notices, nor so large that nothing is read.
    assert 0.05 < survived / len(seeds) < 0.95


@pytest.mark.filterwarnings("ignore")
def test_what_is_repaired_is_repaired():
    changed = 0
    for seed in QUICK:
        try:
            repaired = repair(damaged(seed))
        except LingerError:
            continue
        changed += bool(repaired.changes)
        assert repair(repaired.model).changes == [], f"seed {seed}"
    assert changed
