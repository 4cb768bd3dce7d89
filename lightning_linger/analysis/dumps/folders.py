"""Folders of a dump: one per op, numbered in execution order, never one that exists."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_linger.analysis.dumps.values import Description
from lightning_linger.core.distributed import process_rank
from lightning_linger.core.errors import ConfigError

OP_FILE = "op.json"
DUMP_FILE = "dump.json"
FORMAT = 1


def create_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder of a dump.

    In a run of several processes each has one of its own, ``path_rank0`` and so on. Where there is
    one of this name already, a number is added: ``path1``, ``path2``, ...

    Raises:
        ConfigError: If the file system refuses.
    """
    wanted = Path(path)
    if wanted.name in ("", ".."):
        msg = f"cannot dump into {str(path)!r}: pass the path of a folder that can be made."
        raise ConfigError(msg)
    rank = process_rank()
    number = 0
    while True:
        name = f"{wanted.name}{number or ''}" + (f"_rank{rank}" if rank is not None else "")
        folder = wanted.with_name(name)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if folder.parent.is_dir():
                number += 1
                continue
            msg = f"cannot dump into {str(wanted)!r}: {str(folder.parent)!r} is a file."
            raise ConfigError(msg) from None
        except OSError as error:
            msg = f"cannot dump into {str(wanted)!r}: {error.strerror or error}."
            raise ConfigError(msg) from error
        return folder


class OpFolder:
    """The folder of one op, made when something is written into it.

    Args:
        parent: The op that called this one, None for a call of the program itself.
        path: Its folder.
        info: What is known about the op.
        wanted: Whether it is to be written.
    """

    def __init__(
        self, parent: OpFolder | None, path: Path, info: Mapping[str, Any], wanted: bool = True
    ) -> None:
        self.parent = parent
        self.path = path
        self.info = dict(info)
        self.wanted = wanted
        self._children = 0
        self._made = parent is None

    def child(self, op: str, info: Mapping[str, Any], wanted: bool) -> OpFolder:
        """Return the folder of the next op that this one calls."""
        self._children += 1
        path = self.path / f"{self._children}_{op}"
        return OpFolder(self, path, {"op": op, **info}, wanted)

    def write(self, name: str, description: Description | None) -> None:
        """Write a value: its text, and an array for each tensor in it."""
        if not self.wanted or description is None:
            return
        self._make()
        (self.path / f"{name}.txt").write_text("\n".join(description.lines) + "\n")
        for index, array in enumerate(description.arrays):
            np.save(self.path / array_name(name, index), array, allow_pickle=False)

    def close(self) -> None:
        """Write what is known about the op, as the last file of it."""
        if self.wanted:
            self._make()
            (self.path / OP_FILE).write_text(json.dumps(self.info, indent=1) + "\n")

    def _make(self) -> None:
        if self._made:
            return
        if self.parent is not None:
            self.parent._make()
        self.path.mkdir()
        self._made = True


def array_name(name: str, index: int) -> str:
    """Return the file name of the ``index``-th tensor of a value."""
    return f"{name}.npy" if index == 0 else f"{name}.{index}.npy"
