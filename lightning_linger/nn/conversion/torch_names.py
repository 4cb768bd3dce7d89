"""How ``nn.LSTM`` names its tensors, and which of its forms have one layer and direction."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_linger.core.errors import ConfigError

_TORCH_NAME = re.compile(r"(?:weight_(?:ih|hh|hr)|bias_(?:ih|hh))_l\d+(?:_reverse)?")


def names_at(state: Mapping[str, Any], head: str) -> list[str]:
    """Return the names of the tensors of an ``nn.LSTM`` at a path."""
    names = (key[len(head) :] for key in state if key.startswith(head))
    return [name for name in names if _TORCH_NAME.fullmatch(name)]


def distinct(names: Iterable[str]) -> list[str]:
    """Return names without their direction, in their order; at least one is always expected."""
    return list(dict.fromkeys(name.removesuffix("_reverse") for name in names)) or ["weight_ih_l0"]


def refuse_deeper(names: list[str], head: str) -> None:
    """Raise a `ConfigError` for an ``nn.LSTM`` of several layers.

    Args:
        names: Of its tensors.
        head: Its dotted path, with a dot at the end.
    """
    deeper = [name for name in names if "_l0" not in name]
    if deeper:
        msg = (
            f"the nn.LSTM at {head[:-1]!r} has more than one layer ({head + deeper[0]!r}). Only a "
            "single layer converts; rebuild it from nn.LSTM of one layer each."
        )
        raise ConfigError(msg)


def refuse_bidirectional(names: list[str], head: str) -> None:
    """Raise a `ConfigError` for an ``nn.LSTM`` of two directions.

    Args:
        names: Of its tensors.
        head: Its dotted path, with a dot at the end.
    """
    if any(name.endswith("_reverse") for name in names):
        msg = (
            f"the nn.LSTM at {head[:-1]!r} is bidirectional, where one direction is expected. Use "
            "the layout 'torch-bidirectional', or `split_bidirectional`."
        )
        raise ConfigError(msg)
