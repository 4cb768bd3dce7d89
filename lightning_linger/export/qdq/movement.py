"""Values that are moved between the operators."""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from lightning_linger.export.dialect import dtype_of
from lightning_linger.export.lowering import replace_value
from lightning_linger.export.qdq.writer import (
    CODES,
    FLOAT,
    Storage,
    array_of,
    is_stored,
    mark,
    width_of,
)

# What onnxruntime moves as bytes and floats only.
_NARROW = ("DepthToSpace", "Pad", "SpaceToDepth")
_WIDE_CODES = (ir.DataType.INT16, ir.DataType.UINT16)


def finish(graph: ir.Graph, storages: dict[int, Storage]) -> None:
    """Let what moves codes around move stored codes."""
    for node in list(graph):
        if not any(value is not None and is_stored(value) for value in node.inputs):
            continue
        if any(is_stored(output) for output in node.outputs) or _is_end(node):
            continue
        if node.op_type == "Pad":
            _pad_with_stored(node, graph, storages)
        if node.op_type in _NARROW and dtype_of(node.outputs[0]) in _WIDE_CODES:
            _in_floats(graph, node, storages[16].dtype)
        for output in node.outputs:
            mark(output)
            if output.dtype in CODES:
                output.dtype = storages[width_of(output)].dtype
        if node.op_type == "Cast" and node.outputs[0].dtype in CODES:
            node.attributes["to"] = ir.AttrInt64("to", int(dtype_of(node.outputs[0])))


def _is_end(node: ir.Node) -> bool:
    return node.op_type in ("DequantizeLinear", "ConvInteger", "MatMulInteger")


def _pad_with_stored(node: ir.Node, graph: ir.Graph, storages: dict[int, Storage]) -> None:
    """Pad with the stored form of the code, where a missing constant means the code 0."""
    mode = node.attributes.get("mode")
    source, output = node.inputs[0], node.outputs[0]
    if source is None or source.dtype not in CODES or (mode and mode.as_string() != "constant"):
        return
    storage = storages[width_of(source)]
    given = node.inputs[2] if len(node.inputs) > 2 else None
    code = storage.store(np.zeros((), np.int8) if given is None else array_of(given))
    if storage.bits == 16:
        code = code.astype(np.float32)
    name = f"{output.name}/value"
    tensor = ir.Tensor(code, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([]), const_value=tensor
    )
    graph.initializers[name] = value
    node.resize_inputs(max(3, len(node.inputs)))
    node.replace_input_with(2, value)


def _in_floats(graph: ir.Graph, node: ir.Node, stored: ir.DataType) -> None:
    """Move 16-bit codes as floats, which hold them exactly."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None  # that is what made it a movement of codes
    real, back = _like(source, FLOAT, "real"), _like(output, stored, "stored")
    graph.insert_before(node, _cast(source, real))
    node.replace_input_with(0, real)
    replace_value(graph, output, mark(back))
    graph.insert_after(node, _cast(output, back))
    output.dtype = FLOAT


def _like(value: ir.Value, dtype: ir.DataType, suffix: str) -> ir.Value:
    return ir.Value(name=f"{value.name}/{suffix}", type=ir.TensorType(dtype), shape=value.shape)


def _cast(value: ir.Value, result: ir.Value) -> ir.Node:
    attributes = [ir.AttrInt64("to", int(dtype_of(result)))]
    return ir.Node("", "Cast", [value], attributes, outputs=[result], name=result.name)
