"""Writing what lies between the integer ops the way the engine's packer reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import ir

from lightning_linger.export.dialect import shape_of
from lightning_linger.export.linger.rearrange import rearrange
from lightning_linger.export.linger.scales import agree
from lightning_linger.export.linger.schema import DOMAIN
from lightning_linger.export.lowering import MOVEMENTS, merge_duplicates, replace_value

_INTEGERS = (ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32)


# Ops that leave the values in their order.
_SAME_ORDER = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


def tidy(graph: ir.Graph) -> None:
    """Merge what several consumers asked for alike, simplify movements, and agree about scales."""
    for node in list(graph):
        if node.op_type == "Quant" and node.domain == DOMAIN:
            _quantize_early(graph, node)
    merge_duplicates(graph, {"Quant": DOMAIN, "Dequant": DOMAIN, "Requant": DOMAIN})
    rearrange(graph)
    for node in list(graph):
        rewrite = _REWRITES.get(node.op_type) if node.domain == "" else None
        if rewrite is not None and node.inputs[0] is not None and node.inputs[0].dtype in _INTEGERS:
            rewrite(graph, node)
    agree(graph)


def _quantize_early(graph: ir.Graph, quant: ir.Node) -> None:
    """Quantize a graph input before it is moved: the engine takes and moves integers."""
    moves: list[ir.Node] = []
    value = quant.inputs[0]
    while value is not None and not value.is_graph_input():
        move = value.producer()
        alone = len(value.uses()) == 1 and not value.is_graph_output()
        if move is None or move.domain != "" or move.op_type not in MOVEMENTS or not alone:
            return
        moves.append(move)
        value = move.inputs[0]
    if not moves or value is None:
        return
    early = ir.Node(
        DOMAIN, "Quant", [value], list(quant.attributes.values()), name=quant.name, num_outputs=1
    )
    code_type = quant.outputs[0].type
    early.outputs[0].name, early.outputs[0].type = quant.outputs[0].name, code_type
    early.outputs[0].shape = value.shape
    graph.insert_before(moves[-1], early)
    moves[-1].replace_input_with(0, early.outputs[0])
    for move in moves:
        move.outputs[0].type = code_type
    replace_value(graph, quant.outputs[0], moves[0].outputs[0])
    graph.remove(quant, safe=True)


def _split(graph: ir.Graph, node: ir.Node) -> None:
    """Write a split as slices, which the engine has."""
    source = node.inputs[0]
    given = node.attributes.get("axis")
    axis = given.as_int() if given is not None else 0
    start = 0
    for index, part in enumerate(node.outputs):
        length = shape_of(part)[axis]
        name = f"{node.name}_{index}"
        bounds = _bounds(graph, name, [start], [start + length], [axis])
        cut = ir.Node("", "Slice", [source, *bounds], name=name, num_outputs=1)
        cut.outputs[0].name, cut.outputs[0].type = part.name, part.type
        cut.outputs[0].shape = part.shape
        graph.insert_before(node, cut)
        replace_value(graph, part, cut.outputs[0])
        start += length
    graph.remove(node, safe=True)


def _reshape(graph: ir.Graph, node: ir.Node) -> None:
    """Drop what one reshape behind another undoes, and write flattening as Flatten."""
    node.attributes.pop("allowzero", None)
    source = node.inputs[0]
    earlier = source.producer() if source is not None else None
    while earlier is not None and earlier.domain == "" and earlier.op_type in _SAME_ORDER:
        source = earlier.inputs[0]
        earlier = source.producer() if source is not None else None
    if source is not None:
        node.replace_input_with(0, source)
    before, after = _ends(node)
    if source is not None and before == after and not node.outputs[0].is_graph_output():
        replace_value(graph, node.outputs[0], source)
        graph.remove(node, safe=True)
        return
    if len(before) > 2 and len(after) == 2 and after[0] == before[0]:
        _replace(graph, node, "Flatten", [node.inputs[0]], {"axis": 1})


def _slice(graph: ir.Graph, node: ir.Node) -> None:
    """Write a slice with bounds inside the tensor."""
    before, after = _ends(node)
    starts, axes = _numbers(node, 1), _numbers(node, 3)
    steps = _numbers(node, 4) or [1] * len(starts or [])
    if starts is None or axes is None or any(step != 1 for step in steps):
        return
    axes = [axis % len(before) for axis in axes]
    sizes = [before[axis] for axis in axes]
    first = [min(max(s + n if s < 0 else s, 0), n) for s, n in zip(starts, sizes, strict=True)]
    last = [s + after[axis] for s, axis in zip(first, axes, strict=True)]
    bounds = _bounds(graph, str(node.name), first, last, axes)
    _replace(graph, node, "Slice", [node.inputs[0], *bounds], {})


def _gather(graph: ir.Graph, node: ir.Node) -> None:
    """Write the choice of one index as a slice and a squeeze: no lookup in a table."""
    index = node.inputs[1].const_value if node.inputs[1] is not None else None
    if index is None or index.numpy().ndim:
        return
    before, _ = _ends(node)
    axis_attribute = node.attributes.get("axis")
    axis = (axis_attribute.as_int() if axis_attribute is not None else 0) % len(before)
    position = int(index.numpy()) % before[axis]
    bounds = _bounds(graph, str(node.name), [position], [position + 1], [axis])
    kept = [1 if i == axis else size for i, size in enumerate(before)]
    cut = _insert(graph, node, "Slice", [node.inputs[0], *bounds], {}, kept, "slice")
    _replace(graph, node, "Reshape", [cut, _sizes(graph, node)], {})


def _resize(graph: ir.Graph, node: ir.Node) -> None:
    """Write what keeps the order of the values as a reshape.

    The packer reads the axes of Squeeze and Unsqueeze from an attribute that ONNX has given up, and
    has no Identity.
    """
    _replace(graph, node, "Reshape", [node.inputs[0], _sizes(graph, node)], {})


def _transpose(graph: ir.Graph, node: ir.Node) -> None:
    """Write a transpose that only moves dimensions of 1 as a reshape.

    The packer does so too, and names what it adds like the node, which is a value's name here.
    """
    before, _ = _ends(node)
    moved = [axis for axis in node.attributes["perm"].as_ints() if before[axis] != 1]
    if moved == sorted(moved):
        _resize(graph, node)


_REWRITES = {
    "Gather": _gather,
    "Identity": _resize,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _resize,
    "Transpose": _transpose,
    "Unsqueeze": _resize,
}


def _ends(node: ir.Node) -> tuple[list[int], list[int]]:
    source = node.inputs[0]
    return ([] if source is None else shape_of(source)), shape_of(node.outputs[0])


def _numbers(node: ir.Node, index: int) -> list[int] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


def _bounds(
    graph: ir.Graph, owner: str, starts: list[int], ends: list[int], axes: list[int]
) -> list[ir.Value]:
    named = {"starts": starts, "ends": ends, "axes": axes}
    return [_constant(graph, f"{owner}/{name}", numbers) for name, numbers in named.items()]


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    tensor = ir.Tensor(np.array(numbers, np.int64), name=name)
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape([len(numbers)])
    value = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
    graph.initializers[name] = value
    return value


def _sizes(graph: ir.Graph, node: ir.Node, sizes: list[int] | None = None) -> ir.Value:
    """Return the target of a reshape, that of the node's result unless other sizes are given."""
    numbers = shape_of(node.outputs[0]) if sizes is None else sizes
    suffix = "_".join(str(number) for number in numbers)
    return _constant(graph, f"{node.name}/shape_{suffix}", numbers)


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: list[Any],
    attributes: dict[str, Any],
    shape: list[int],
    suffix: str,
) -> ir.Value:
    """Add a node in front of another, named after it, and return its output."""
    converted = ir.convenience.convert_attributes(attributes)
    name = f"{before.name}_{suffix}"
    node = ir.Node("", op_type, inputs, converted, name=name, num_outputs=1)
    node.outputs[0].name, node.outputs[0].shape = name, ir.Shape(shape)
    node.outputs[0].type = before.outputs[0].type
    graph.insert_before(before, node)
    return node.outputs[0]


def _replace(
    graph: ir.Graph, node: ir.Node, op_type: str, inputs: list[Any], attributes: dict[str, Any]
) -> None:
    converted = ir.convenience.convert_attributes(attributes)
    new = ir.Node("", op_type, inputs, converted, name=node.name, num_outputs=1)
    old, result = node.outputs[0], new.outputs[0]
    result.name, result.type, result.shape = old.name, old.type, old.shape
    graph.insert_before(node, new)
    replace_value(graph, old, result)
    graph.remove(node, safe=True)
