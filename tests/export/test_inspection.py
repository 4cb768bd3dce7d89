"""What a file computes in integers, and where it leaves them."""

import re

import numpy as np
import onnx
import pytest

import lightning_linger as linger
from lightning_linger import cli
from lightning_linger.export.inspection import inspect_model
from tests.export.graphs import INT8, model_of, node

ADD = {"scale_x": 32.0, "scale_y": 32.0, "scale_o": 16.0}
CHIP = {"platform": "arcs"}
CHAIN = [
    node("Quant", ["x"], ["q"], data_bits=8, scale_x=32.0, **CHIP),
    node("QAdd", ["q", "q"], ["a"], **ADD, **CHIP),
    node("Relu", ["a"], ["r"]),
    node("Dequant", ["r"], ["y"], scale_o=16.0),
    node("Sigmoid", ["y"], ["z"]),
]


def test_the_chain_of_a_linger_file():
    found = inspect_model(model_of(CHAIN, "x", "yz"))
    assert (found.dialect, found.platform) == ("linger3", "arcs")
    fine, coarse = "int8 step 0.03125", "int8 step 0.0625"
    assert [(row.op, row.does, row.reads, row.gives) for row in found.chain] == [
        ("Quant", "enters", "", fine),
        ("QAdd", "integer", f"{fine}, {fine}", coarse),
        ("Relu", "moves", coarse, coarse),
        ("Dequant", "leaves", coarse, ""),
        ("Sigmoid", "float", "", ""),
    ]
    assert found.leaves == [f"y ({coarse}): node 'Sigmoid_z' (Sigmoid), the output 'y'"]
    assert found.problems == []
    assert (found.inputs, found.outputs) == (["x float"], ["y float", "z float"])


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        ([*CHAIN[:1], node("Quant", ["q"], ["y"], scale_x=4.0)], "'Quant_y' .* quantizes codes"),
        (
            [
                *CHAIN[:1],
                node("Quant", ["x"], ["p"], data_bits=8, scale_x=32.0),
                node("QAdd", ["q", "p"], ["y"], **ADD),
            ],
            "'Quant_p' .* repeats `Quant_q`",
        ),
        (
            [*CHAIN[:4], node("Quant", ["y"], ["z"], scale_x=16.0)],
            "'Quant_z' .* undoes `Dequ",
        ),
        ([node("QAdd", ["x", "x"], ["y"], **ADD)], "'QAdd_y' .* reads real values, wants int8"),
        (
            [*CHAIN[:1], node("QAdd", ["q", "q"], ["y"], **ADD | {"scale_y": 8.0})],
            r"'QAdd_y' .* reads int8 step 0.03125 as int8 step 0.125",
        ),
        (
            [*CHAIN[:2], node("Dequant", ["a"], ["y"], scale_o=4.0)],
            "'Dequant_y' .* as int8 step 0.2",
        ),
        ([*CHAIN[:2], node("Sigmoid", ["a"], ["y"])], "'Sigmoid_y' .* reads codes .* as real"),
        (
            [*CHAIN[:1], node("Sigmoid", ["x"], ["s"]), node("Dequant", ["s"], ["y"], scale_o=1.0)],
            "'Dequant_y' .* dequantizes what is no code",
        ),
    ],
)
def test_what_contradicts_itself_is_a_problem(nodes, problem):
    found = inspect_model(model_of(nodes, "x", "y"))
    (line,) = dict.fromkeys(found.problems)
    assert re.search(problem, line)


def qdq(middle):
    """A graph in standard ONNX: quantized, an op, quantized again, and real at the end."""
    constants = {"s": np.float32(0.5), "zero": np.uint8(128), "w": np.int8([[1, 2]])}
    constants |= {"ws": np.float32([1.0, 2.0]), "wz": np.int8([0, 0])}
    nodes = [
        node("QuantizeLinear", ["x", "s", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "s", "zero"], ["r"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["v"], axis=1),
        *middle,
        node("QuantizeLinear", ["m", "s", "zero"], ["p"]),
        node("DequantizeLinear", ["p", "s", "zero"], ["y"]),
    ]
    return inspect_model(model_of(nodes, "x", "y", constants))


GRID = "uint8 step 0.5 zero 128"


def test_the_chain_of_a_qdq_file():
    found = qdq([node("Mul", ["r", "v"], ["n"]), node("Relu", ["n"], ["m"])])
    assert (found.dialect, found.platform) == ("qdq", "")
    assert [(row.op, row.does, row.reads, row.gives) for row in found.chain] == [
        ("QuantizeLinear", "enters", "", GRID),
        ("Mul", "integer", GRID, ""),
        ("Relu", "integer", "", GRID),
        ("DequantizeLinear", "leaves", GRID, ""),
    ]
    assert found.leaves == [f"y ({GRID}): the output 'y'"]


def test_an_op_in_real_values_leaves_integers():
    found = qdq([node("ReduceSum", ["r"], ["n"]), node("Sqrt", ["n"], ["m"])])
    does = {row.op: row.does for row in found.chain}
    assert (does["ReduceSum"], does["Sqrt"]) == ("float", "float")
    assert found.leaves[0] == f"r ({GRID}): node 'ReduceSum_n' (ReduceSum)"


UNIT = ["one", "zero"]
CODES = [
    node("QuantizeLinear", ["x", "s", "zero"], ["q"]),
    node("DequantizeLinear", ["q", *UNIT], ["c"]),
]


def on_codes(nodes, outputs="y", **kinds):
    """A graph that takes codes for the numbers that they are."""
    constants = {"s": np.float32(0.5), "t": np.float32(0.25), "one": np.float32(1)}
    constants |= {"zero": np.uint8(128), "count": np.float32(4), "axes": np.int64([1])}
    return inspect_model(model_of([*CODES, *nodes], "x", outputs, constants, **kinds))


AVERAGE = [
    node("ReduceSum", ["c", "axes"], ["sum"]),
    node("Div", ["sum", "count"], ["average"]),
    node("QuantizeLinear", ["average", *UNIT], ["p"]),
]


def test_an_exact_average_is_computed_in_integers():
    found = on_codes([*AVERAGE, node("DequantizeLinear", ["p", "t", "zero"], ["y"])])
    step = "uint8 step 0.25 zero 128"
    assert [(row.op, row.does, row.reads, row.gives) for row in found.chain] == [
        ("QuantizeLinear", "enters", "", GRID),
        ("ReduceSum", "integer", GRID, ""),
        ("Div", "integer", "", step),
        ("DequantizeLinear", "leaves", step, ""),
    ]
    assert found.leaves == [f"y ({step}): the output 'y'"]


def test_the_step_of_codes_is_what_their_reader_says():
    moved = [
        node("Flatten", ["p"], ["f"]),
        node("DequantizeLinear", ["f", "t", "zero"], ["y"]),
    ]
    gives = [row.gives for row in on_codes([*AVERAGE, *moved]).chain]
    assert gives[2:4] == ["uint8 step 0.25 zero 128"] * 2
    pooled = [
        node("AveragePool", ["c"], ["a"], kernel_shape=[2]),
        node("QuantizeLinear", ["a", *UNIT], ["p"]),
        node("DequantizeLinear", ["p", *UNIT], ["r"]),
        node("ArgMax", ["r"], ["y"]),
    ]
    found = on_codes(pooled, y=onnx.TensorProto.INT64)
    assert [(row.op, row.does, row.gives) for row in found.chain] == [
        ("QuantizeLinear", "enters", GRID),
        ("AveragePool", "integer", GRID),
        ("ArgMax", "integer", ""),
    ]
    assert found.leaves == []


@pytest.mark.parametrize(
    ("nodes", "does"),
    [
        # Numbers that are given to the user are real values.
        ([node("Sqrt", ["c"], ["y"])], ["leaves", "float"]),
        # So are numbers that meet real values on the way.
        (
            [
                node("Sqrt", ["c"], ["r"]),
                node("Mul", ["r", "x"], ["m"]),
                node("QuantizeLinear", ["m", *UNIT], ["p"]),
                node("DequantizeLinear", ["p", "t", "zero"], ["y"]),
            ],
            ["leaves", "float", "float", "enters", "leaves"],
        ),
        # One of two readers is enough to leave integers.
        (
            [
                *AVERAGE,
                node("DequantizeLinear", ["p", "t", "zero"], ["y"]),
                node("Exp", ["sum"], ["z"]),
            ],
            ["leaves", "float", "integer", "leaves", "float"],
        ),
    ],
)
def test_numbers_that_stay_real_leave_integers(nodes, does):
    outputs = "yz" if any("z" in found.output for found in nodes) else "y"
    assert [row.does for row in on_codes(nodes, outputs).chain][1:] == does


def test_other_files():
    plain = inspect_model(model_of([node("Relu", ["x"], ["y"])], "x", "y"))
    assert (plain.dialect, plain.platform, plain.leaves) == ("onnx", "", [])
    assert "0 node(s) compute in integers, 1 do not" in str(plain)
    older = model_of([node("iqAdd", ["x", "x"], ["y"], **ADD)], "x", "y", x=INT8, y=INT8)
    assert inspect_model(older).dialect == "linger1"
    assert inspect_model(older).platform == "venus"


def test_the_command_prints_it(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    onnx.save(model_of(CHAIN, "x", "z"), path)
    assert cli.main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dialect: linger3 for arcs\n")
    assert "QAdd_a" in printed
    assert "leaves integers:\n  y (int8 step 0.0625): node 'Sigmoid_z' (Sigmoid)" in printed
    assert printed.endswith("problems:\n  none\n")
    for content in (None, b"", b"no onnx"):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        assert cli.main(["inspect", str(path)]) == 2
        assert capsys.readouterr().err.startswith("lightning-linger: error: ")


def test_several_platforms_and_wrong_types_are_refused():
    other = node("QAdd", ["a", "a"], ["y"], **ADD, platform="venus")
    with pytest.raises(linger.UnsupportedError, match="several platforms"):
        inspect_model(model_of([*CHAIN[:2], other], "x", "y"))
    wrong = node("QAdd", ["x", "x"], ["y"], **ADD | {"scale_o": "1"})
    with pytest.raises(linger.UnsupportedError, match="'scale_o' must be FLOAT"):
        inspect_model(model_of([wrong], "x", "y"))
