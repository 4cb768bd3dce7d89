"""Inputs and outputs in codes: a graph without the nodes that enter and leave the grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.dialect import Boundary
from lightning_linger.export.lowering import MOVEMENTS, replace_value

_REAL = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# By name of an input or output: `real = step * (code - zero_point)`.
Grids = dict[str, dict[str, Any]]


def take_codes(graph: ir.Graph, names: list[str], boundary: Boundary) -> Grids:
    """Let the graph's inputs be the codes that it would make of them.

    Args:
        graph: The graph.
        names: What users call the inputs.
        boundary: Of the dialect.

    Returns:
        The grid of every input that was changed; the others hold no real values, or are not read.

    Raises:
        UnsupportedError: If an input is read as real values, or at several scales.
    """
    grids: Grids = {}
    for value, name in zip(graph.inputs, names, strict=True):
        if value.dtype not in _REAL or not (value.uses() or value.is_graph_output()):
            continue
        moved = list(_moved(value))
        readers = [node for v in moved for node, _ in v.uses() if node.outputs[0] not in moved]
        real = [node.name for node in readers if node.op_type != boundary.enter]
        if real or any(v.is_graph_output() for v in moved):
            where = f"node `{real[0]}`" if real else "an output"
            msg = (
                f"the input {name!r} cannot be codes: {where} reads its real values. Quantize what "
                "reads it, or export real inputs."
            )
            raise UnsupportedError(msg)
        if len({_described(node) for node in readers}) > 1:
            at = ", ".join(f"`{node.name}`" for node in readers)
            msg = (
                f"the input {name!r} cannot be codes: it is read at several scales, by {at}. "
                "Export real inputs."
            )
            raise UnsupportedError(msg)
        grids[name] = _grid(readers[0], readers[0].outputs[0], boundary)
        kind = readers[0].outputs[0].type
        for node in readers:
            source = node.inputs[0]
            assert source is not None
            replace_value(graph, node.outputs[0], source)
            graph.remove(node, safe=True)
        for v in moved:
            v.type = kind
    return grids


def give_codes(graph: ir.Graph, names: list[str], boundary: Boundary) -> Grids:
    """Let the graph's outputs be codes.

    Args:
        graph: The graph.
        names: What users call the outputs.
        boundary: Of the dialect.

    Returns:
        The grid of every output that was changed; the others hold no real values.

    Raises:
        UnsupportedError: If an output is computed in real values.
    """
    grids: Grids = {}
    for index, name in enumerate(names):
        value = graph.outputs[index]
        if value.dtype not in _REAL:
            continue
        node = value.producer()
        if node is None or node.op_type != boundary.leave or node.inputs[0] is None:
            made = "an input" if node is None else f"node `{node.name}`"
            msg = (
                f"the output {name!r} cannot be codes: {made} gives real values. Quantize what "
                "makes it, or export real outputs."
            )
            raise UnsupportedError(msg)
        grids[name] = _grid(node, node.inputs[0], boundary)
        graph.outputs[index] = node.inputs[0]
    return grids


def _moved(value: ir.Value) -> Iterator[ir.Value]:
    """Yield a value and what only moves it."""
    yield value
    for node, index in value.uses():
        if node.op_type in MOVEMENTS and node.domain == "" and index == 0:
            yield from _moved(node.outputs[0])


def _grid(node: ir.Node, codes: ir.Value, boundary: Boundary) -> dict[str, Any]:
    step, zero_point = boundary.grid(node)
    dtype = "" if codes.dtype is None else codes.dtype.name.lower()
    return {"step": step, "zero_point": zero_point, "dtype": dtype}


def _described(node: ir.Node) -> str:
    attributes = sorted((name, str(a.value)) for name, a in node.attributes.items())
    constants = [
        None if v is None or v.const_value is None else v.const_value.numpy().tolist()
        for v in node.inputs[1:]
    ]
    return str((attributes, constants))
