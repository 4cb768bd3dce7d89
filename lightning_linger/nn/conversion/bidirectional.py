"""A bidirectional layer as two of one direction each, and back: only names change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_linger.core.errors import ConfigError
from lightning_linger.nn.conversion.state_dicts import StateDict, dotted, replaced, tensor_at
from lightning_linger.nn.conversion.torch_names import (
    distinct,
    names_at,
    refuse_bidirectional,
    refuse_deeper,
)


def split_bidirectional(
    state_dict: Mapping[str, Any],
    prefix: str = "",
    *,
    forward: str | None = None,
    backward: str | None = None,
) -> StateDict:
    """Return a state dict of a bidirectional ``nn.LSTM`` as one of two unidirectional ones.

    Nothing but names changes. Works for layers with and without projection and bias, and for
    ``nn.GRU``, as long as they have one layer. The second of the two reads its input reversed, and
    its output has to be reversed again.

    Args:
        state_dict: Of the layer or of a model that holds it; it stays as it is.
        prefix: Dotted path of the layer in the model.
        forward: Dotted path of the forward layer in the model; ``forward_lstmp`` within ``prefix``
            if None.
        backward: Dotted path of the backward layer in the model; ``backward_lstmp`` within
            ``prefix`` if None.

    Raises:
        ConfigError: If the layer is not bidirectional, has more than one layer or two directions
            of different sizes, or if the result would overwrite another entry.
    """
    head = dotted(prefix)
    heads = _two_heads(head, forward, backward)
    names = names_at(state_dict, head)
    refuse_deeper(names, head)
    moves: dict[str, str] = {}
    for suffix, new_head in zip(("", "_reverse"), heads, strict=True):
        for name in distinct(names):
            moves[f"{head}{name}{suffix}"] = new_head + name
    _check_twins(state_dict, head, names, (head, ""), (head, "_reverse"))
    return replaced(state_dict, moves, {new: state_dict[old] for old, new in moves.items()})


def join_bidirectional(
    state_dict: Mapping[str, Any],
    prefix: str = "",
    *,
    forward: str | None = None,
    backward: str | None = None,
) -> StateDict:
    """Return a state dict of two unidirectional ``nn.LSTM`` as one of a bidirectional one.

    The inverse of `split_bidirectional`, with the same arguments.

    Args:
        state_dict: Of the layer or of a model that holds it; it stays as it is.
        prefix: Dotted path that the bidirectional layer gets.
        forward: Dotted path of the forward layer; ``forward_lstmp`` within ``prefix`` if None.
        backward: Dotted path of the backward layer; ``backward_lstmp`` within ``prefix`` if None.

    Raises:
        ConfigError: If one of the two is missing or has more than one layer or direction, if their
            sizes differ, or if the result would overwrite another entry.
    """
    head = dotted(prefix)
    heads = _two_heads(head, forward, backward)
    names: list[str] = []
    for old_head in heads:
        found = names_at(state_dict, old_head)
        refuse_deeper(found, old_head)
        refuse_bidirectional(found, old_head)
        names += found
    moves: dict[str, str] = {}
    for suffix, old_head in zip(("", "_reverse"), heads, strict=True):
        for name in distinct(names):
            moves[old_head + name] = f"{head}{name}{suffix}"
    _check_twins(state_dict, head, names, (heads[0], ""), (heads[1], ""))
    return replaced(state_dict, moves, {new: state_dict[old] for old, new in moves.items()})


def _two_heads(head: str, forward: str | None, backward: str | None) -> tuple[str, str]:
    heads = (
        f"{head}forward_lstmp." if forward is None else dotted(forward),
        f"{head}backward_lstmp." if backward is None else dotted(backward),
    )
    if heads[0] == heads[1]:
        msg = f"`forward` and `backward` must differ, got {heads[0][:-1]!r} twice."
        raise ConfigError(msg)
    return heads


def _check_twins(
    state: Mapping[str, Any],
    head: str,
    names: Iterable[str],
    one: tuple[str, str],
    other: tuple[str, str],
) -> None:
    what = f"the bidirectional nn.LSTM at {head[:-1]!r}"
    for name in distinct(names):
        keys = [f"{place}{name}{suffix}" for place, suffix in (one, other)]
        shapes = [tuple(tensor_at(state, key, what).shape) for key in keys]
        if shapes[0] != shapes[1]:
            msg = (
                f"{keys[1]!r} has shape {shapes[1]} and {keys[0]!r} has {shapes[0]}. The two "
                f"directions of {what} need the same sizes."
            )
            raise ConfigError(msg)
