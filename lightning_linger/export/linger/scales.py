"""Making neighbours agree about scales: the packer refuses a file where they do not."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import ir

from lightning_linger.export.linger.schema import DOMAIN

_PLATFORM = ("platform", "quant_mode", "platform_quant")
_SECOND_OPERAND = ("QAdd", "QSub", "QMul", "QBmm")


def agree(graph: ir.Graph) -> None:
    """Multiply by a number where a consumer reads codes at another scale than they were made at.

    That is how a factor that is a power of two shows in a model: the codes stay, the scale changes.
    A product with the code 1 says the same in words that the packer knows.
    """
    scales: dict[ir.Value, float] = {}
    ones: dict[tuple[ir.Value, float], ir.Value] = {}
    for node in list(graph):
        for index, name in _read_scales(node).items():
            value, wanted = node.inputs[index], _number(node, name)
            given = None if value is None else scales.get(value)
            if value is None or wanted is None or given is None or given == wanted:
                continue
            key = (value, wanted)
            if key not in ones:
                ones[key] = _times_one(graph, node, value, given, wanted, index)
            node.replace_input_with(index, ones[key])
        _note(node, scales)


def _read_scales(node: ir.Node) -> dict[int, str]:
    """Return the attributes that name the scales of a node's operands, by their place."""
    if node.domain != DOMAIN or node.op_type == "Quant":
        return {}
    if node.op_type == "Dequant":
        return {0: "scale_o"}
    if node.op_type == "QCat":
        return {index: f"scale_x_{index}" for index in range(len(node.inputs))}
    names = {0: "scale_x"}
    return names | {1: "scale_y"} if node.op_type in _SECOND_OPERAND else names


def _note(node: ir.Node, scales: dict[ir.Value, float]) -> None:
    """Note the scale of a node's results; ops without scales keep that of their first operand."""
    if node.domain == DOMAIN and node.op_type == "Dequant":
        return
    name = "scale_x" if node.op_type == "Quant" else "scale_o"
    source = node.inputs[0] if node.inputs else None
    kept = None if source is None else scales.get(source)
    scale = _number(node, name) if node.domain == DOMAIN else kept
    scale = kept if scale is None else scale
    if scale is not None:
        # What further results hold, such as the state of a recurrent layer, has a scale of its own.
        scales[node.outputs[0]] = scale


def _number(node: ir.Node, name: str) -> float | None:
    attribute = node.attributes.get(name)
    return None if attribute is None else attribute.as_float()


def _platform(graph: ir.Graph) -> dict[str, Any]:
    like = next(node for node in graph if "quant_mode" in node.attributes)
    return {
        name: like.attributes[name].as_string() for name in _PLATFORM if name in like.attributes
    }


def _bits(value: ir.Value) -> int:
    return 8 if value.dtype is None else int(value.dtype.itemsize * 8)


def _times_one(
    graph: ir.Graph, before: ir.Node, value: ir.Value, given: float, wanted: float, index: int
) -> ir.Value:
    name = f"{before.name}/factor{index}"
    one = ir.Tensor(np.array(1, np.int8), name=f"{name}/one")
    factor = ir.Value(
        name=one.name, type=ir.TensorType(one.dtype), shape=ir.Shape([]), const_value=one
    )
    graph.initializers[str(factor.name)] = factor
    widths = {"x_bits": _bits(value), "y_bits": 8, "o_bits": _bits(value)}
    at = {"scale_x": given, "scale_y": wanted / given, "scale_o": wanted}
    converted = ir.convenience.convert_attributes(_platform(graph) | widths | at)
    node = ir.Node(DOMAIN, "QMul", [value, factor], converted, name=name, num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = name, value.type
    node.outputs[0].shape = value.shape
    graph.insert_before(before, node)
    return node.outputs[0]
