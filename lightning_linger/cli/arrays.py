"""Samples from files of numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_linger.core.errors import ConfigError


def read_arrays(paths: list[Path], names: list[str]) -> dict[str, NDArray[Any]]:
    """Read the samples of each input.

    Args:
        paths: An .npz with arrays named like inputs, or an .npy per input, or both.
        names: Of the inputs, in order.

    Raises:
        ConfigError: If a file cannot be read, or there is no array, or no single one, for an input.
    """
    found: dict[str, NDArray[Any]] = {}
    plain: list[NDArray[Any]] = []
    for path in paths:
        loaded = _read(path)
        if isinstance(loaded, Mapping):
            found |= {name: loaded[name] for name in loaded if name in names}
        else:
            plain.append(loaded)
    rest = [name for name in names if name not in found]
    if len(plain) != len(rest):
        msg = (
            f"the inputs are {names}; --data holds {sorted(found)} by name and "
            f"{len(plain)} arrays without. Name the arrays of an .npz like the inputs, or pass "
            "an .npy for each."
        )
        raise ConfigError(msg)
    return found | dict(zip(rest, plain, strict=True))


def _read(path: Path) -> NDArray[Any] | dict[str, NDArray[Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return dict(loaded)
    except OSError as error:
        msg = f"cannot read {str(path)!r}: {error.strerror or error}."
        raise ConfigError(msg) from error
    # What a broken file raises depends on where it is broken.
    except Exception as error:
        msg = f"{str(path)!r} holds no plain arrays: {error} Save them with numpy.save or savez."
        raise ConfigError(msg) from error
