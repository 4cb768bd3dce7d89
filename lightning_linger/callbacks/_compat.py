"""Both Lightning namespaces: a callback of ours is a `Callback` of every one that is installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


def _installed() -> list[Any]:
    found = [name for name in _NAMESPACES if _exists(name)]
    if not found:
        msg = "lightning_linger.callbacks needs `pytorch-lightning` or `lightning`. Install one."
        raise ImportError(msg)
    return [importlib.import_module(name) for name in found]


def _exists(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


NAMESPACES = _installed()
_BASES = tuple(namespace.Callback for namespace in NAMESPACES)

Callback: Any = type(
    "Callback", _BASES, {"__doc__": "A callback of every installed Lightning namespace."}
)
_EXCEPTIONS: tuple[type[Exception], ...] = tuple(
    importlib.import_module(f"{namespace.__name__}.utilities.exceptions").MisconfigurationException
    for namespace in NAMESPACES
)
MisconfigurationException: Any = type(
    "MisconfigurationException", _EXCEPTIONS, {"__doc__": "Lightning's, of every namespace."}
)


def misconfiguration(message: str) -> Exception:
    """Return Lightning's own error for a wrong set-up."""
    error: Exception = MisconfigurationException(message)
    return error


def is_tensorboard(logger: Any) -> bool:
    """Whether a logger is a TensorBoardLogger of either namespace."""
    return any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__)
