"""Standard ONNX nodes inside an integer graph, by ONNX's own reference implementation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.reading import label_of
from lightning_linger.export.runner.step import refuse_huge


def run_plain(
    node: onnx.NodeProto, inputs: list[NDArray[Any] | None], opset_version: int
) -> list[NDArray[Any]]:
    """Run one node as that of the standard domain, whatever its own domain is.

    Args:
        node: The node.
        inputs: Its inputs, None where an optional one is missing.
        opset_version: Which version of the op is meant.
    """
    nested = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    if any(attribute.type in nested for attribute in node.attribute):
        msg = f"{label_of(node)} holds a graph of its own: not supported here."
        raise UnsupportedError(msg)
    if not onnx.defs.has(node.op_type):
        msg = f"{label_of(node)}: no op of this name is known."
        raise UnsupportedError(msg)
    refuse_huge(label_of(node), _elements(node, inputs))
    plain = onnx.NodeProto()
    plain.CopyFrom(node)
    plain.domain = ""
    pairs = zip(node.input, inputs, strict=True)
    given = {name: array for name, array in pairs if array is not None}
    graph = onnx.helper.make_graph(
        [plain],
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


def _elements(node: onnx.NodeProto, inputs: list[NDArray[Any] | None]) -> int:
    """Return how many numbers the node makes, where its operands say so and not their sizes."""
    given = [np.zeros(0) if array is None else array for array in inputs]
    count = _GROWING.get(node.op_type)
    return 0 if count is None or not given else count(given)


def _product(numbers: Iterable[Any]) -> int:
    return math.prod(int(number) for number in numbers)


def _sizes(x: NDArray[Any], pads: NDArray[Any]) -> int:
    before, after = np.array_split(pads.reshape(-1), 2)
    added = zip(before, after, strict=True)
    return _product(size + sum(map(int, p)) for size, p in zip(x.shape, added, strict=False))


# What ops make of few numbers, by the numbers.
_GROWING: dict[str, Callable[[list[NDArray[Any]]], int]] = {
    "ConstantOfShape": lambda x: _product(x[0].reshape(-1)),
    "Expand": lambda x: _product(x[1].reshape(-1)) * max(x[0].size, 1),
    "OneHot": lambda x: x[0].size * _product(x[1].reshape(-1)),
    "Pad": lambda x: _sizes(x[0], x[1]),
    "Range": lambda x: int(abs((x[1] - x[0]) / x[2])),
    "Resize": lambda x: max(
        x[0].size * math.ceil(math.prod(map(float, x[2].reshape(-1)))) if len(x) > 2 else 0,
        _product(x[3].reshape(-1)) if len(x) > 3 else 0,
    ),
    "Tile": lambda x: x[0].size * _product(x[1].reshape(-1)),
}
