"""State dicts: taking tensors out, and a copy with others in their place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lightning_linger.core.errors import ConfigError, near_matches

StateDict = dict[str, Any]

OTHER_LAYOUT = "Pass the layout that the checkpoint has, or the prefix of an LSTM with projection."


def dotted(path: str) -> str:
    """Return a path as the keys below it begin; the empty one stays."""
    return path if not path or path.endswith(".") else path + "."


def copied(state: Mapping[str, Any]) -> StateDict:
    """Return a shallow copy that keeps the versions a module writes next to its state."""
    copy: StateDict = OrderedDict(state) if isinstance(state, OrderedDict) else dict(state)
    if isinstance(state, OrderedDict):
        vars(copy).update(vars(state))
    return copy


def replaced(state: Mapping[str, Any], old: Collection[str], new: StateDict) -> StateDict:
    """Return a copy with new entries where the first of the old ones was."""
    gone = set(old)
    for key in new:
        if key in state and key not in gone:
            msg = (
                f"the result would overwrite {key!r}, which belongs to something else. Rename that "
                "entry, or convert under another prefix."
            )
            raise ConfigError(msg)
    result = copied(state)
    result.clear()
    pending = new
    for key, value in state.items():
        if key in gone:
            result.update(pending)
            pending = {}
        else:
            result[key] = value
    return result


def tensor_at(state: Mapping[str, Any], key: str, what: str, remedy: str | None = None) -> Tensor:
    """Return a tensor of a state dict, detached.

    Args:
        state: The state dict.
        key: Of the tensor.
        what: What needs it, for messages.
        remedy: What to do if it is missing; None for the usual.

    Raises:
        ConfigError: If it is missing, or no tensor.
    """
    if key not in state:
        remedy = remedy or "Pass the prefix of such a layer, or the layout that it has."
        near = near_matches(key, state)
        msg = f"the state dict has no {key!r}, which {what} needs. {remedy} Near: {near}."
        raise ConfigError(msg)
    tensor = state[key]
    if not isinstance(tensor, Tensor):
        msg = f"{key!r} is a {type(tensor).__name__}; {what} needs a tensor. {OTHER_LAYOUT}"
        raise ConfigError(msg)
    return tensor.detach()
