"""Both Lightning namespaces: a callback of ours is a `Callback` of every one that is installed."""

from __future__ import annotations

import importlib
from typing import Any

_NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


def _installed() -> list[Any]:
    found = []
    for name in _NAMESPACES:
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            continue
    if not found:
        msg = (
            "lightning-linger's callbacks need Lightning. Install `pytorch-lightning` or `lightning`."
        )
        raise ImportError(msg)
    return found


NAMESPACES = _installed()
_BASES = tuple(namespace.Callback for namespace in NAMESPACES)

Callback: Any = type(
    "Callback", _BASES, {"__doc__": "A callback of every installed Lightning namespace."}
)
MisconfigurationExceptions: tuple[type[Exception], ...] = tuple(
    importlib.import_module(f"{namespace.__name__}.utilities.exceptions").MisconfigurationException
    for namespace in NAMESPACES
)


def misconfiguration(message: str) -> Exception:
    """Return Lightning's own error for a wrong set-up."""
    return MisconfigurationExceptions[0](message)


def is_tensorboard(logger: Any) -> bool:
    """Whether a logger is a TensorBoardLogger of either namespace."""
    return any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__)
