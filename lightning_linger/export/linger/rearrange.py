"""Writing torch's movements of codes with what the engine moves right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnxscript import ir

from lightning_linger.export.dialect import shape_of
from lightning_linger.export.linger.moves import Mover, refuse
from lightning_linger.export.lowering import replace_value

_INTEGERS = (ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32)


def rearrange(graph: ir.Graph) -> None:
    """Write the movements of codes in a graph with what the engine has.

    Raises:
        UnsupportedError: If one cannot be written so.
    """
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        if rule is None or source is None or source.dtype not in _INTEGERS:
            continue
        if source.const_value is not None:  # a table
            continue
        mover = Mover(graph, node)
        moved = rule(mover, node)
        if moved is source and node.outputs[0].is_graph_output():
            moved = mover.copy(source)
        if moved is not None:
            _take_over(graph, node, moved)


def _take_over(graph: ir.Graph, node: ir.Node, moved: ir.Value) -> None:
    output = node.outputs[0]
    name = output.name
    replace_value(graph, output, moved)
    graph.remove(node, safe=True)
    if moved.is_graph_output():
        moved.name = name


# --- the movements ----------------------------------------------------------------------------


def _transpose(m: Mover, node: ir.Node) -> ir.Value | None:
    source = _source(node)
    given = node.attributes.get("perm")
    rank = len(shape_of(source))
    return m.transpose(source, tuple(given.as_ints() if given else reversed(range(rank))))


def _slice(m: Mover, node: ir.Node) -> ir.Value | None:
    x = _source(node)
    starts, ends = _constant(node, 1), _constant(node, 2)
    if starts is None or ends is None:
        refuse(node, "a slice with computed bounds", "a graph has fixed sizes", "Use numbers")
    axes = _constant(node, 3) if len(node.inputs) > 3 else np.arange(len(starts))
    steps = _constant(node, 4) if len(node.inputs) > 4 else np.ones(len(starts), np.int64)
    assert axes is not None
    assert steps is not None
    if len(axes) == 1 and steps[0] == 1:
        return None
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        along = int(axis) % len(shape_of(x))
        span = slice(int(start), int(end), int(step))
        x = m.take(x, along, range(*span.indices(shape_of(x)[along])))
    return x


def _gather(m: Mover, node: ir.Node) -> ir.Value | None:
    x, index = _source(node), _constant(node, 1)
    if index is None:
        refuse(node, "a lookup in activations", "the engine looks up constants", "Use fixed places")
    if not index.ndim:
        return None
    given = node.attributes.get("axis")
    shape = shape_of(x)
    axis = (given.as_int() if given is not None else 0) % len(shape)
    places = [int(place) % shape[axis] for place in index.reshape(-1)]
    return m.reshape(m.take(x, axis, places), shape_of(node.outputs[0]))


def _gather_nd(m: Mover, node: ir.Node) -> ir.Value | None:
    x, index = _source(node), _constant(node, 1)
    batch = node.attributes.get("batch_dims")
    if index is None or index.shape[-1] != 1 or (batch is not None and batch.as_int()):
        refuse(node, "a choice of single values", "the engine moves runs", "Use one list of places")
    places = [int(place) % shape_of(x)[0] for place in index.reshape(-1)]
    return m.reshape(m.take(x, 0, places), shape_of(node.outputs[0]))


def _gather_elements(m: Mover, node: ir.Node) -> ir.Value | None:
    x, index = _source(node), _constant(node, 1)
    if index is None:
        refuse(node, "a lookup in activations", "the engine looks up constants", "Use fixed places")
    shape = shape_of(x)
    given = node.attributes.get("axis")
    axis = (given.as_int() if given is not None else 0) % len(shape)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    cut = numbers[tuple(slice(n) for n in (*index.shape[:axis], None, *index.shape[axis + 1 :]))]
    chosen = np.take_along_axis(cut, index % shape[axis], axis)
    line = np.moveaxis(index, axis, -1).reshape(-1, index.shape[axis])
    if (line == line[0]).all():  # the same places everywhere
        for other, size in enumerate(index.shape):
            if other != axis:
                x = m.slice(x, other, 0, size)
        return m.take(x, axis, [int(place) % shape[axis] for place in line[0]])
    flat = m.reshape(x, [math.prod(shape)])
    return m.reshape(m.take(flat, 0, chosen.reshape(-1).tolist()), list(index.shape))


def _expand(m: Mover, node: ir.Node) -> ir.Value | None:
    x, target = _source(node), shape_of(node.outputs[0])
    shape = shape_of(x)
    shape = [*[1] * (len(target) - len(shape)), *shape]
    x = m.reshape(x, shape)
    for axis, (size, wanted) in enumerate(zip(shape, target, strict=True)):
        if size != wanted:
            x = m.tile(x, axis, wanted)
    return x


def _tile(m: Mover, node: ir.Node) -> ir.Value | None:
    x, target = _source(node), shape_of(node.outputs[0])
    for axis, (size, wanted) in enumerate(zip(shape_of(x), target, strict=True)):
        if size != wanted:
            x = m.tile(x, axis, wanted // size)
    return x


def _concat(m: Mover, node: ir.Node) -> ir.Value | None:
    parts = [value for value in node.inputs if value is not None]
    return m.cat(parts, node.attributes["axis"].as_int() % len(shape_of(parts[0])))


def _depth_to_space(m: Mover, node: ir.Node) -> ir.Value | None:
    n, c, h, w = shape_of(_source(node))
    block = node.attributes["blocksize"].as_int()
    given = node.attributes.get("mode")
    depth = c // block**2
    if given is not None and given.as_string() == "CRD":
        sizes, perm = [n, depth, block, block, h, w], (0, 1, 4, 2, 5, 3)
    else:
        sizes, perm = [n, block, block, depth, h, w], (0, 3, 4, 1, 5, 2)
    x = m.transpose(m.reshape(_source(node), sizes), perm)
    return m.reshape(x, [n, depth, h * block, w * block])


def _space_to_depth(m: Mover, node: ir.Node) -> ir.Value | None:
    n, c, h, w = shape_of(_source(node))
    block = node.attributes["blocksize"].as_int()
    sizes = [n, c, h // block, block, w // block, block]
    x = m.transpose(m.reshape(_source(node), sizes), (0, 3, 5, 1, 2, 4))
    return m.reshape(x, [n, c * block**2, h // block, w // block])


_RULES: dict[str, Callable[[Mover, ir.Node], ir.Value | None]] = {
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Tile": _tile,
    "Transpose": _transpose,
}


def _source(node: ir.Node) -> ir.Value:
    source = node.inputs[0]
    assert source is not None  # that is what made it a movement of codes
    return source


def _constant(node: ir.Node, index: int) -> Any:
    value = node.inputs[index]
    return None if value is None or value.const_value is None else value.const_value.numpy()
