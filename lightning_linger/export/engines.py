"""Running an exported file here, to compare it with the model it came from."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.dialects import dialect_of
from lightning_linger.export.runner import OnnxIntegerRunner
from lightning_linger.export.runner.sizes import Resized

Array = NDArray[Any]
Engine = Callable[[Sequence[Array]], list[Array]]


def can_run(dialect: str) -> bool:
    """Whether what runs files of a dialect is installed."""
    if dialect_of(dialect).name == "qdq":
        return importlib.util.find_spec("onnxruntime") is not None
    return True


def engine_of(path: str | os.PathLike[str], dialect: str) -> Engine:
    """Return a function that runs a file on arrays in the order of its inputs.

    A ``linger`` file runs in the integer runner, a ``qdq`` file in onnxruntime on the CPU.

    Raises:
        UnsupportedError: If onnxruntime is needed and not installed.
    """
    if not can_run(dialect):
        msg = f"running {path} needs onnxruntime. Install `lightning-linger[examples]`."
        raise UnsupportedError(msg)
    return _onnxruntime(path) if dialect_of(dialect).name == "qdq" else _runner(path)


def _runner(path: str | os.PathLike[str]) -> Engine:
    runner = OnnxIntegerRunner(path)

    def run(arrays: Sequence[Array]) -> list[Array]:
        return list(runner.run(dict(zip(runner.input_names, arrays, strict=True))).values())

    return run


def _onnxruntime(path: str | os.PathLike[str]) -> Engine:
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(arrays: Sequence[Array]) -> list[Array]:
        for value, array in zip(session.get_inputs(), arrays, strict=True):
            _check_sizes(value.name, value.shape, array)
        found = session.run(None, dict(zip(names, arrays, strict=True)))
        return [np.asarray(array) for array in found]

    return run


def _check_sizes(name: str, wanted: Sequence[Any], array: Array) -> None:
    """Refuse other sizes than a file names, in the words of the export that wrote them."""
    sizes = [size if isinstance(size, int) else None for size in wanted]
    resized = Resized.of({name: sizes}, {name: array})
    if resized.sizes:
        why = "All that follows from it is baked in."
        raise resized.refusal(why)
