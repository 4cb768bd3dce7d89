"""Small graphs of the dialect, and ways to damage them."""

from __future__ import annotations

import copy

import numpy as np
import onnx

FLOAT, INT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8


def node(op_type, inputs, outputs, **attributes):
    return onnx.helper.make_node(op_type, inputs, outputs, f"{op_type}_{outputs[0]}", **attributes)


def model_of(nodes, inputs, outputs, constants=(), **kinds):
    """A model; ``kinds`` are element types of inputs and outputs, FLOAT unless given."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [value(name, kinds.get(name, FLOAT), None) for name in inputs],
        [value(name, kinds.get(name, FLOAT), None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in dict(constants).items()],
    )
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("linger", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets)


def ops(model):
    return [found.op_type for found in model.graph.node]


def without(model, *op_types):
    """The model without the nodes of these types: what read them reads their operand."""
    damaged = copy.deepcopy(model)
    gone = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type in op_types}
    kept = [n for n in damaged.graph.node if n.op_type not in op_types]
    outputs = {value.name for value in model.graph.output}
    for found in kept:
        found.input[:] = [_followed(name, gone) for name in found.input]
    for old, new in gone.items():
        if old in outputs:  # outputs keep their names
            for found in kept:
                for names in (found.input, found.output):
                    names[:] = [old if name == _followed(new, gone) else name for name in names]
    del damaged.graph.node[:]
    damaged.graph.node.extend(kept)
    return damaged


def _followed(name, gone):
    while name in gone:
        name = gone[name]
    return name


def with_pairs(model, grids):
    """The model with a Dequant and a Quant in front of everything that reads codes.

    Args:
        model: The model.
        grids: Attributes of the Quant, by the codes that are read.
    """
    damaged = copy.deepcopy(model)
    nodes = []
    for index, found in enumerate(damaged.graph.node):
        for place, name in enumerate(found.input):
            if name in grids and found.op_type != "Dequant":
                real, again = f"{name}/real{index}", f"{name}/codes{index}"
                scale = grids[name]["scale_x"]
                nodes.append(
                    onnx.helper.make_node(
                        "Dequant", [name], [real], real, domain="linger", scale_o=scale
                    )
                )
                nodes.append(
                    onnx.helper.make_node(
                        "Quant", [real], [again], again, domain="linger", **grids[name]
                    )
                )
                found.input[place] = again
        nodes.append(found)
    del damaged.graph.node[:]
    damaged.graph.node.extend(nodes)
    return damaged


def constant(*numbers, dtype=np.int64):
    return np.array(numbers, dtype)
