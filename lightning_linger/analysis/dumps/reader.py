"""Reading a dump back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_linger.analysis.dumps.folders import DUMP_FILE, FORMAT, OP_FILE, array_name
from lightning_linger.analysis.dumps.values import DTYPES, Level
from lightning_linger.core.errors import ConfigError

_HEADER = re.compile(
    r"Tensor : Type = (?P<type>\w+) : Shape = \[(?P<shape>[^\]]*)\] : Stride = \[[^\]]*\]"
    r" : Dumped = (?P<dumped>\d+)"
    r"(?: : Scale = (?P<scale>\S+) : Zero point = (?P<zero_point>-?\d+) : Bits = (?P<bits>\d+))?"
)
_FOLDER = re.compile(r"(?P<number>\d+)_(?P<op>.+)")


@dataclass(frozen=True)
class DumpedTensor:
    """A tensor of a dump.

    Args:
        type: Name of its type, e.g. ``Float``.
        shape: Its shape.
        values: What was dumped: by level the first values, a 0-dim sum, or the tensor itself; None
            if nothing was.
        scale: The step of its grid, None for one that is not quantized.
        zero_point: The code of zero.
        bits: Width of the codes.
    """

    type: str
    shape: tuple[int, ...]
    values: Tensor | None
    scale: float | None = None
    zero_point: int | None = None
    bits: int | None = None


class DumpedValue:
    """An argument or a result, read when it is asked for.

    Args:
        folder: The folder of its op.
        name: Its file name without the ending.
        level: The level of the dump.
    """

    def __init__(self, folder: Path, name: str, level: Level) -> None:
        self.folder = folder
        self.name = name
        self.level = level

    @cached_property
    def _read(self) -> tuple[list[str], list[DumpedTensor]]:
        lines = _text(self.folder / f"{self.name}.txt").splitlines()
        layout: list[str] = []
        tensors: list[DumpedTensor] = []
        arrays = position = 0
        while position < len(lines):
            line = lines[position]
            position += 1
            header = _HEADER.fullmatch(line)
            if header is None:
                layout.append(line)
                continue
            count = int(header["dumped"])
            position += count
            # An empty tensor has an array; one that cannot be shown has none.
            path = self.folder / array_name(self.name, arrays)
            shown = count > 0 or (path.exists() and 0 in _shape(header))
            tensors.append(self._tensor(header, path if shown else None))
            arrays += shown
            layout.append("Tensor")
        return layout, tensors

    @property
    def layout(self) -> list[str]:
        """The text without what it says about tensors: scalars, and what holds what."""
        return self._read[0]

    @property
    def tensors(self) -> list[DumpedTensor]:
        """The tensors in the value, in order."""
        return self._read[1]

    @property
    def tensor(self) -> Tensor:
        """The values of the only tensor.

        Raises:
            ConfigError: If the value is not one tensor whose values were dumped.
        """
        found = self.tensors
        if len(found) != 1 or found[0].values is None:
            msg = f"{str(self.folder / self.name)!r} is not one tensor. Use `tensors`."
            raise ConfigError(msg)
        return found[0].values

    def _tensor(self, header: re.Match[str], path: Path | None) -> DumpedTensor:
        shape = _shape(header)
        values = None
        if path is not None:
            try:
                values = torch.from_numpy(np.load(path, allow_pickle=False))
            except (OSError, ValueError) as error:
                msg = f"{str(path)!r} cannot be read: {error}. The dump is not complete."
                raise ConfigError(msg) from error
            if self.level != 1:
                values = values.to(DTYPES.get(header["type"], values.dtype))
        if header["scale"] is None:
            return DumpedTensor(header["type"], shape, values)
        return DumpedTensor(
            header["type"],
            shape,
            values,
            float(header["scale"]),
            int(header["zero_point"]),
            int(header["bits"]),
        )


def _shape(header: re.Match[str]) -> tuple[int, ...]:
    return tuple(int(size) for size in header["shape"].split(",") if size.strip())


@dataclass(frozen=True)
class DumpedOp:
    """One op of a dump.

    Args:
        path: Its folder within the dump, e.g. ``1_conv2d/2_add``.
        number: When it ran, among the ops of the same folder, from 1.
        op: Its name.
        info: What else is known: ``module``, ``site``, ``system``, ``location``.
        values: Its arguments and its result by file name, e.g. ``arg_input`` and ``result``.
        children: The ops that it called, in order.
    """

    path: str
    number: int
    op: str
    info: Mapping[str, Any]
    values: Mapping[str, DumpedValue]
    children: tuple[DumpedOp, ...]

    def walk(self) -> Iterator[DumpedOp]:
        """Iterate over the op and all it called."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Dump:
    """A dump.

    Args:
        folder: Where it is.
        level: What was written of tensors.
        ops: The ops the program called, in order.
        failed_references: How many references failed.
    """

    folder: Path
    level: Level
    ops: tuple[DumpedOp, ...]
    failed_references: int

    def walk(self) -> Iterator[DumpedOp]:
        """Iterate over all ops, each before those it called."""
        for op in self.ops:
            yield from op.walk()

    def __getitem__(self, path: str) -> DumpedOp:
        """Return the op of a path such as ``1_conv2d/2_add``.

        Raises:
            KeyError: If there is none.
        """
        for op in self.walk():
            if op.path == path:
                return op
        raise KeyError(path)


def read_dump(path: str | os.PathLike[str]) -> Dump:
    """Read the dump in a folder; values are read when they are asked for.

    Raises:
        ConfigError: If the folder is no dump, or the dump has not ended.
    """
    folder = Path(path)
    text = _text(folder / DUMP_FILE)
    try:
        summary = json.loads(text)
        level, failed = summary["level"], summary["failed_references"]
        known = summary["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{str(folder / DUMP_FILE)!r} is damaged."
        raise ConfigError(msg) from error
    if not known:
        msg = f"{str(folder)!r} was written by another version. Read it with that one."
        raise ConfigError(msg)
    return Dump(folder, level, _read_ops(folder, folder, level), failed)


def _read_ops(root: Path, folder: Path, level: Level) -> tuple[DumpedOp, ...]:
    ops = []
    for child in folder.iterdir():
        found = _FOLDER.fullmatch(child.name) if child.is_dir() else None
        if found is None:
            continue
        info_file = child / OP_FILE
        # A parent that did not match the pattern has nothing written of its own.
        info = json.loads(_text(info_file)) if info_file.exists() else {}
        names = sorted(path.stem for path in child.glob("*.txt"))
        ops.append(
            DumpedOp(
                path=child.relative_to(root).as_posix(),
                number=int(found["number"]),
                op=found["op"],
                info=info,
                values={name: DumpedValue(child, name, level) for name in names},
                children=_read_ops(root, child, level),
            )
        )
    return tuple(sorted(ops, key=lambda op: op.number))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        msg = (
            f"{str(path.parent)!r} is no dump, or one that has not ended: {path.name!r} cannot be "
            f"read ({error.strerror or error})."
        )
        raise ConfigError(msg) from error
