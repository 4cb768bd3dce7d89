"""Reading ONNX files that others made: what is damaged is refused before any work is done."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto
from onnx.external_data_helper import uses_external_data

from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.export.generations import FIRST_PLATFORM, PLATFORM

Array = NDArray[Any]
Source = str | os.PathLike[str] | bytes | onnx.ModelProto


def read_model(source: Source, *, weights: bool = True) -> onnx.ModelProto:
    """Return a model whose graph can be followed from its inputs to its outputs.

    Args:
        source: Path of a file, its bytes, or a loaded model, which is not changed.
        weights: Whether to load what a file keeps in files beside it.

    Raises:
        ConfigError: If there is no such file, or it holds no ONNX model, or one whose values are
            not made in any order: a cycle, a value that nothing makes, or one that is made twice.
    """
    model = source if isinstance(source, onnx.ModelProto) else _parse(source, weights)
    if not model.graph.output:
        msg = f"{_shown(source)} holds no ONNX graph with outputs."
        raise ConfigError(msg)
    if not all(map(_is_text, _names(model.graph))):
        msg = f"{_shown(source)} is damaged: a name in it is no text."
        raise ConfigError(msg)
    nodes = _in_order(model.graph, source)
    if nodes != list(model.graph.node):
        sorted_model = onnx.ModelProto()
        sorted_model.CopyFrom(model)
        del sorted_model.graph.node[:]
        sorted_model.graph.node.extend(nodes)
        return sorted_model
    return model


def constants_of(graph: onnx.GraphProto) -> dict[str, Array]:
    """Return the initializers by name.

    Raises:
        ConfigError: If one does not hold what its shape says.
    """
    return {tensor.name: array_of(tensor) for tensor in graph.initializer}


def constant_types(graph: onnx.GraphProto) -> dict[str, np.dtype[Any]]:
    """Return the element types of the initializers by name, wherever their numbers are.

    Raises:
        ConfigError: If one in the graph itself does not hold what its shape says.
    """
    return {
        tensor.name: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        if uses_external_data(tensor)
        else array_of(tensor).dtype
        for tensor in graph.initializer
    }


def array_of(tensor: onnx.TensorProto) -> Array:
    """Return the numbers of a tensor.

    Raises:
        ConfigError: If it does not hold what its shape says.
    """
    try:
        return onnx.numpy_helper.to_array(tensor)
    except Exception as error:
        msg = f"the tensor {tensor.name!r} cannot be read: {error}"
        raise ConfigError(msg) from error


def input_names(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the inputs; older exporters list the initializers among them."""
    constants = {tensor.name for tensor in graph.initializer}
    return [value.name for value in graph.input if value.name not in constants]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Return the attributes by name, with text as str."""
    result: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        result[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return result


def platform_of(graph: onnx.GraphProto) -> str:
    """Return the engine's name of the target that the nodes name, its first one if none does.

    Raises:
        UnsupportedError: If the nodes name several.
    """
    found = {
        attribute.s.decode(errors="replace"): node.name
        for node in graph.node
        for attribute in node.attribute
        if attribute.name == PLATFORM and attribute.type == AttributeProto.STRING
    }
    if len(found) > 1:
        msg = f"the nodes name several platforms, by example: {found}. A graph has one."
        raise UnsupportedError(msg)
    return next(iter(found), FIRST_PLATFORM)


def label_of(node: onnx.NodeProto) -> str:
    """Return how messages call a node."""
    return f"node {node.name!r} ({node.op_type})"


def _parse(source: str | os.PathLike[str] | bytes, weights: bool) -> onnx.ModelProto:
    try:
        if isinstance(source, bytes):
            return onnx.load_from_string(source)
        return onnx.load(os.fspath(source), load_external_data=weights)
    except Exception as error:
        msg = f"cannot read an ONNX model from {_shown(source)}: {error}"
        raise ConfigError(msg) from error


def _shown(source: Source) -> str:
    if isinstance(source, onnx.ModelProto):
        return "the model"
    return "bytes" if isinstance(source, bytes) else repr(os.fspath(source))


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        yield value.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _is_text(name: object) -> bool:
    # What is no UTF-8 comes as bytes.
    return isinstance(name, str)


def _in_order(graph: onnx.GraphProto, source: Source) -> list[onnx.NodeProto]:
    """Return the nodes such that every value is made before it is read."""
    given = [*input_names(graph), *(tensor.name for tensor in graph.initializer)]
    made = Counter([*given, *(name for node in graph.node for name in node.output if name)])
    twice = next((name for name, count in made.items() if count > 1), None)
    if twice is not None:
        msg = f"{_shown(source)}: the value {twice!r} is made more than once."
        raise ConfigError(msg)
    for reader, wanted in (
        *((label_of(node), name) for node in graph.node for name in node.input if name),
        *(("an output", value.name) for value in graph.output),
    ):
        if wanted not in made:
            msg = f"{_shown(source)}: {reader} reads {wanted!r}, which nothing makes."
            raise ConfigError(msg)
    names = set(given)
    if _is_sorted(graph, names):
        return list(graph.node)
    readers: dict[str, list[int]] = {}
    missing = [0] * len(graph.node)
    for index, node in enumerate(graph.node):
        for name in set(node.input) - names - {""}:
            readers.setdefault(name, []).append(index)
            missing[index] += 1
    order = [index for index, count in enumerate(missing) if not count]
    for index in order:  # which grows
        for name in graph.node[index].output:
            for reader_index in readers.get(name, ()):
                missing[reader_index] -= 1
                if not missing[reader_index]:
                    order.append(reader_index)
    if len(order) < len(graph.node):
        stuck = graph.node[min(set(range(len(graph.node))) - set(order))]
        msg = f"{_shown(source)}: {label_of(stuck)} waits for its own result: the graph is a cycle."
        raise ConfigError(msg)
    return [graph.node[index] for index in order]


def _is_sorted(graph: onnx.GraphProto, given: set[str]) -> bool:
    known = set(given)
    for node in graph.node:
        if any(name and name not in known for name in node.input):
            return False
        known.update(node.output)
    return True
