"""Tensors that a file keeps in files of their own, beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from lightning_linger.core.errors import ConfigError
from lightning_linger.export.reading import array_of

# Where tensors start in a file of data, so that it can be mapped into memory.
_ALIGNMENT = 64


def external_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield the tensors of the main graph that are kept in other files."""
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    for tensor in (
        *model.graph.initializer,
        *(part for t in model.graph.sparse_initializer for part in (t.values, t.indices)),
        *(attribute.t for attribute in attributes if attribute.HasField("t")),
        *(tensor for attribute in attributes for tensor in attribute.tensors),
    ):
        if uses_external_data(tensor):
            yield tensor


def without_external_tensors(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that is given its external initializers, for checks that read no data."""
    given = onnx.ModelProto()
    given.CopyFrom(model)
    graph = given.graph
    named = {value.name for value in graph.input}
    for tensor in [t for t in graph.initializer if uses_external_data(t)]:
        graph.initializer.remove(tensor)
        if tensor.name not in named:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return given


def gather_data(model: onnx.ModelProto, folder: Path, data: Path) -> str:
    """Copy what tensors keep in other files into one new file, one tensor after the other.

    The tensors of the model say afterwards where in the new file they lie; the name of that file is
    left to :func:`name_data`.

    Args:
        model: The model, whose tensors are changed.
        folder: Where the files lie now.
        data: The file to write.

    Returns:
        The digest of the new file.

    Raises:
        ConfigError: If a file is missing, too short or outside of the folder; names the tensor.
        OSError: If the new file cannot be written.
    """
    digest, offset = hashlib.sha256(), 0
    with data.open("xb") as file:
        for tensor in external_tensors(model):
            content = _content_of(tensor, folder)
            padding = b"\0" * (-offset % _ALIGNMENT)
            for part in (padding, content):
                file.write(part)
                digest.update(part)
            offset += len(padding)
            del tensor.external_data[:]
            for key, value in (("offset", offset), ("length", len(content))):
                tensor.external_data.add(key=key, value=str(value))
            offset += len(content)
    return digest.hexdigest()


def name_data(model: onnx.ModelProto, name: str) -> None:
    """Let the tensors of a model lie in a file of this name, beside the model's own."""
    for tensor in external_tensors(model):
        tensor.external_data.add(key="location", value=name)


def _content_of(tensor: onnx.TensorProto, folder: Path) -> bytes:
    loaded = onnx.TensorProto()
    loaded.CopyFrom(tensor)
    try:
        load_external_data_for_tensor(loaded, str(folder))
    except Exception as error:
        msg = f"the data of the tensor {tensor.name!r} cannot be read: {error}"
        raise ConfigError(msg) from error
    array_of(loaded)  # as many numbers as its shape says
    return bytes(loaded.raw_data)
