"""Recorded ops become the nodes of a dialect, one value per result."""

import collections
import json

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from onnxscript import ir

from lightning_linger.export.capture import Captured
from lightning_linger.export.captured_nodes import ARGUMENTS, CAPTURE_DOMAIN
from lightning_linger.export.dialect import Dialect
from lightning_linger.export.lowering import lower
from lightning_linger.export.qdq import WRITES, boundary, qdq_dialect


def value(name, dtype):
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([3]))


def recorded():
    """A graph of one op with two results: a node reads both, and one is an output itself."""
    x = value("x", ir.DataType.INT8)
    results = [value(name, ir.DataType.FLOAT) for name in ("first", "second")]
    arguments = {ARGUMENTS: json.dumps({"x": 1, "scale": 0.5, "platform": "#0"})}
    attributes = ir.convenience.convert_attributes(arguments)
    op = ir.Node(CAPTURE_DOMAIN, "dequantize", [x], attributes, outputs=results, name="op")
    difference = value("difference", ir.DataType.FLOAT)
    sub = ir.Node("", "Sub", results, outputs=[difference], name="sub")
    graph = ir.Graph(
        [x], [difference, results[1]], nodes=[op, sub], opset_imports={"": 21}, name="graph"
    )
    model = ir.Model(graph, ir_version=10)
    return Captured(model, {"0": "site"}, collections.Counter(), ["x"], ["difference", "second"])


def dialect_of(translation):
    return Dialect(
        name="test",
        table={"dequantize": translation},
        opset_version=21,
        ir_version=10,
        domains={},
        check=lambda sites: None,
        finish=lambda graph: None,
        boundary=boundary.BOUNDARY,
    )


def two(builder, call):
    assert [result.name for result in call.results] == ["first", "second"]
    assert call.result is call.results[0]
    real = builder.node("Cast", [call.x], {"to": 1}, suffix="cast")
    return [builder.node("Neg", [real]), builder.node("Abs", [real], suffix="second")]


def write_two(w):
    real = w.real(w.call.x, w.call.scale, "x")
    return [w.node("Neg", [real], [3]), w.node("Abs", [real], [3], suffix="second")]


def run(captured, x):
    proto = ir.to_proto(captured.model)
    onnx.checker.check_model(proto, full_check=True)
    return ReferenceEvaluator(proto).run(None, {"x": x})


def test_translation_with_two_results():
    captured = recorded()
    lowered = lower(captured, dialect_of(two))
    assert lowered.steps == {"site/dequantize": {"scale": 0.5}}
    assert [node.op_type for node in captured.model.graph] == ["Cast", "Neg", "Abs", "Sub"]
    difference, second = run(captured, np.array([1, -2, 3], np.int8))
    np.testing.assert_array_equal(second, np.array([1, 2, 3], np.float32))
    np.testing.assert_array_equal(difference, np.array([-2, 0, -6], np.float32))


def test_qdq_translation_with_two_results(monkeypatch):
    monkeypatch.setitem(WRITES, "dequantize", write_two)
    captured = recorded()
    lower(captured, qdq_dialect("test", signed=True))
    difference, second = run(captured, np.array([1, -2, 3], np.int8))
    np.testing.assert_array_equal(second, np.array([0.5, 1, 1.5], np.float32))
    np.testing.assert_array_equal(difference, np.array([-1, 0, -3], np.float32))


def test_every_result_needs_a_value():
    with pytest.raises(ValueError, match="shorter"):
        lower(recorded(), dialect_of(lambda builder, call: two(builder, call)[0]))
