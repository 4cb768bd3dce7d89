"""Standard ONNX nodes inside an integer graph, by ONNX's own reference implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from lightning_linger.core.errors import UnsupportedError


def run_plain(
    node: onnx.NodeProto, inputs: list[NDArray[Any] | None], opset_version: int
) -> list[NDArray[Any]]:
    """Run one node of the standard domain.

    Args:
        node: The node.
        inputs: Its inputs, None where an optional one is missing.
        opset_version: Which version of the op is meant.
    """
    nested = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    if any(attribute.type in nested for attribute in node.attribute):
        msg = f"node {node.name!r} ({node.op_type}) holds a graph of its own: not supported here."
        raise UnsupportedError(msg)
    pairs = zip(node.input, inputs, strict=True)
    given = {name: array for name, array in pairs if array is not None}
    graph = onnx.helper.make_graph(
        [node],
        "node",
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in given.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in node.output if name],
    )
    opset = onnx.helper.make_opsetid("", opset_version)
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset]))
    return [np.asarray(result) for result in evaluator.run(None, given)]
