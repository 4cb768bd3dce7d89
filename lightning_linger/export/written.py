"""Writing a checked model: one file, or one for the graph and one for its weights."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnxscript import ir

from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.export.external import external_tensors, gather_data, name_data
from lightning_linger.export.files import write_atomically

# A protobuf message may have 2 GB; the graph takes its part.
LARGEST_SINGLE_FILE = 2**31 - 2**26

# Smaller tensors (scales, shapes) stay in the graph.
_SMALLEST_EXTERNAL = 1024


def write_model(model: ir.Model, target: Path, external_data: bool | None) -> None:
    """Check a model and write it, whole or not at all.

    The weights' own file is called after what it holds. It is complete before the graph that names
    it takes the place of an earlier one, and the earlier one's is removed only then: at any moment
    the graph at the target has its weights.

    Args:
        model: The model.
        target: The file of the graph.
        external_data: Whether weights have a file of their own; None decides by their size.

    Raises:
        UnsupportedError: If the graph is not valid ONNX.
        ConfigError: If the file system refuses.
    """
    weights = sum(tensor.nbytes for tensor in _tensors(model))
    if external_data is None:
        external_data = weights > LARGEST_SINGLE_FILE
    earlier = data_files(target)
    if external_data:
        written = [_write_two(model, target)]
    else:
        proto = ir.serde.serialize_model(model)
        _check(proto)
        write_atomically(target, proto.SerializeToString())
        written = []
    _remove(earlier, written)


def write_proto(model: onnx.ModelProto, folder: Path, target: Path) -> None:
    """Write a model as it is, whole or not at all, and a copy of what it keeps in other files.

    The copy is one file, called after what it holds (see :func:`write_model`).

    Args:
        model: The model; its tensors are changed to lie in the copy.
        folder: Where its files lie now.
        target: The file of the graph.

    Raises:
        ConfigError: If the data of a tensor cannot be read, or the file system refuses.
    """
    earlier, written = data_files(target), []
    if next(external_tensors(model), None) is not None:
        with _staging(target) as staging:
            copy, graph = staging / "data", staging / target.name
            data = _data_file(target, gather_data(model, folder, copy))
            name_data(model, data.name)
            graph.write_bytes(model.SerializeToString())
            _place([(copy, data), (graph, target)])
            written.append(data)
    else:
        write_atomically(target, model.SerializeToString())
    _remove(earlier, written)


def data_files(target: Path) -> list[Path]:
    """Return the files of weights that were written for a path."""
    pattern = re.compile(re.escape(target.name) + r"\.[0-9a-f]{16}\.data")
    return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]


def _write_two(model: ir.Model, target: Path) -> Path:
    digest = hashlib.sha256()
    for tensor in _tensors(model):
        digest.update(tensor.tobytes())
    data = _data_file(target, digest.hexdigest())
    with _staging(target) as staging:
        graph = staging / target.name
        ir.save(model, graph, external_data=data.name, size_threshold_bytes=_SMALLEST_EXTERNAL)
        _check(str(graph))
        _place([(staging / data.name, data), (graph, target)])
    return data


def _data_file(target: Path, digest: str) -> Path:
    return target.with_name(f"{target.name}.{digest[:16]}.data")


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Give a folder in which to prepare files for the target's."""
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        folder.mkdir()
        yield folder
    except OSError as error:
        msg = f"cannot write {str(target)!r}: {error}."
        raise ConfigError(msg) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _place(moves: Sequence[tuple[Path, Path]]) -> None:
    """Move files that are complete, one after the other."""
    there = [(source, place) for source, place in moves if source.exists()]
    for source, _ in there:
        _flush(source)
    for source, place in there:
        os.replace(source, place)


def _remove(earlier: Sequence[Path], written: Sequence[Path]) -> None:
    for path in earlier:
        if path not in written:
            path.unlink(missing_ok=True)


def _tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    values = [model.graph.initializers[name] for name in sorted(model.graph.initializers)]
    return [value.const_value for value in values if value.const_value is not None]


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _check(model: onnx.ModelProto | str) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        msg = f"the graph is not valid ONNX: {error} Nothing was written; please report it."
        raise UnsupportedError(msg) from error
