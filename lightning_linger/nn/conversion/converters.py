"""Layers of one layout in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.nn.conversion.layouts import LAYOUTS, TORCH, Format, find_layers, places_of
from lightning_linger.nn.conversion.state_dicts import (
    OTHER_LAYOUT,
    StateDict,
    copied,
    dotted,
    replaced,
    tensor_at,
)
from lightning_linger.nn.conversion.torch_names import names_at, refuse_bidirectional, refuse_deeper

_GATES = 4
_REMEDIES = {
    "weight_hr": "An LSTM without projection has no counterpart.",
    "bias_ih": "For a layer without bias, add zeros.",
    "bias_hh": "For a layer without bias, add zeros.",
}


@dataclass(frozen=True)
class _Direction:
    """One direction in the terms of ``nn.LSTM``; ``bias_hh`` is None where there is one bias."""

    weight_ih: Tensor
    weight_hh: Tensor
    weight_hr: Tensor
    bias_ih: Tensor
    bias_hh: Tensor | None = None


def convert(
    state_dict: Mapping[str, Any], source: str, target: str, prefix: str | None = None
) -> StateDict:
    """Return a state dict with layers of one layout in another.

    Two biases become one by addition, in their dtype; one bias becomes itself and zeros.

    Args:
        state_dict: Of the layer or of a model that holds it; it stays as it is.
        source: A name in `LAYOUTS`.
        target: A name in `LAYOUTS` with as many directions.
        prefix: Dotted path of the layer in the model, ``""`` if the state dict is the layer's own.
            None converts every layer of the layout.

    Raises:
        ConfigError: If a layout is unknown or the two do not fit, if there is no such layer, if one
            of its tensors is missing, has another shape or number of gates, or if the result would
            overwrite another entry.
    """
    places, target_places = places_of(source), places_of(target)
    if len(places) != len(target_places):
        fitting = [name for name in LAYOUTS if len(places_of(name)) == len(places)]
        msg = (
            f"cannot convert {source!r} to {target!r}: one has {len(places)} direction(s), the "
            f"other {len(target_places)}. {source!r} converts to {', '.join(fitting)}."
        )
        raise ConfigError(msg)
    if prefix is not None:
        prefixes = [dotted(prefix)]
    else:
        prefixes = [dotted(path) for path in find_layers(state_dict, source)]
        if not prefixes:
            raise ConfigError(_nothing_found(state_dict, source))
    result = copied(state_dict)
    for head in prefixes:
        result = _convert_layer(result, source, target, head)
    return result


def asr_to_lstmp(state_dict: Mapping[str, Any], prefix: str | None = None) -> StateDict:
    """Return a state dict of pytorch-asr-extension's `LSTMP` as one of `LSTMP`.

    Gates i, f, o, g become i, f, g, o, and the bias loses its leading axis. Exact.

    Args:
        state_dict: See `convert`.
        prefix: See `convert`.

    Raises:
        ConfigError: See `convert`.
    """
    return convert(state_dict, "asr", "lstmp", prefix)


def lstmp_to_asr(state_dict: Mapping[str, Any], prefix: str | None = None) -> StateDict:
    """Return a state dict of `LSTMP` as one of pytorch-asr-extension's `LSTMP`. Exact.

    Args:
        state_dict: See `convert`.
        prefix: See `convert`.

    Raises:
        ConfigError: See `convert`.
    """
    return convert(state_dict, "lstmp", "asr", prefix)


def torch_to_lstmp(state_dict: Mapping[str, Any], prefix: str | None = None) -> StateDict:
    """Return a state dict of ``nn.LSTM(..., proj_size=...)`` as one of `LSTMP`.

    The sum of the two biases becomes the bias, exact up to the rounding of that sum.

    Args:
        state_dict: See `convert`.
        prefix: See `convert`.

    Raises:
        ConfigError: See `convert`.
    """
    return convert(state_dict, "torch", "lstmp", prefix)


def lstmp_to_torch(state_dict: Mapping[str, Any], prefix: str | None = None) -> StateDict:
    """Return a state dict of `LSTMP` as one of ``nn.LSTM(..., proj_size=...)``.

    The bias becomes ``bias_ih_l0``, and ``bias_hh_l0`` is zero. Exact.

    Args:
        state_dict: See `convert`.
        prefix: See `convert`.

    Raises:
        ConfigError: See `convert`.
    """
    return convert(state_dict, "lstmp", "torch", prefix)


def ublstmp_to_fast(state_dict: Mapping[str, Any], prefix: str | None = None) -> StateDict:
    """Return a state dict of `UBLSTMP` as one of linger's FastUBLSTMP, two ``nn.LSTM``. Exact.

    Args:
        state_dict: See `convert`.
        prefix: See `convert`.

    Raises:
        ConfigError: See `convert`.
    """
    return convert(state_dict, "ublstmp", "fast-ublstmp", prefix)


def fast_to_ublstmp(state_dict: Mapping[str, Any], prefix: str | None = None) -> StateDict:
    """Return a state dict of linger's FastUBLSTMP as one of `UBLSTMP`.

    Biases are summed as in `torch_to_lstmp`.

    Args:
        state_dict: See `convert`.
        prefix: See `convert`.

    Raises:
        ConfigError: See `convert`.
    """
    return convert(state_dict, "fast-ublstmp", "ublstmp", prefix)


def _convert_layer(state: StateDict, source: str, target: str, prefix: str) -> StateDict:
    for layout in (source, target):
        if not prefix and any(place.sibling for place in places_of(layout)):
            msg = (
                f"layout {layout!r} names its second layer after its first, so it needs the name "
                "of a layer. Pass the prefix, and the state dict of the model around it."
            )
            raise ConfigError(msg)
    old: list[str] = []
    new: StateDict = {}
    for place, target_place in zip(places_of(source), places_of(target), strict=True):
        keys = place.keys(prefix)
        if not any(key in state for key in keys.values()):
            raise ConfigError(_nothing_found(state, source, prefix))
        if place.format is TORCH:
            head = prefix + place.child
            names = names_at(state, head)
            refuse_deeper(names, head)
            if source != "torch-bidirectional":
                refuse_bidirectional(names, head)
        old += keys.values()
        direction = _read(state, place.format, keys, source)
        new |= _write(direction, target_place.format, target_place.keys(prefix))
    return replaced(state, old, new)


def _read(
    state: Mapping[str, Any], layout: Format, keys: Mapping[str, str], name: str
) -> _Direction:
    what = f"layout {name!r}"
    found = {role: tensor_at(state, key, what, _REMEDIES.get(role)) for role, key in keys.items()}
    for role, key in keys.items():
        rank = 1 + len(layout.bias_rows) if role.startswith("bias") else 2
        if found[role].dim() != rank:
            got = tuple(found[role].shape)
            msg = f"{key!r} has shape {got}; {what} has {rank} axes there. {OTHER_LAYOUT}"
            raise ConfigError(msg)
    hidden, cell = found["weight_hr"].shape
    rows = _GATES * cell
    wanted: dict[str, tuple[int, ...]] = {
        "weight_ih": (rows, found["weight_ih"].shape[1]),
        "weight_hh": (rows, hidden),
        "weight_hr": (hidden, cell),
        "bias_ih": (*layout.bias_rows, rows),
        "bias_hh": (*layout.bias_rows, rows),
    }
    for role, key in keys.items():
        if tuple(found[role].shape) != wanted[role]:
            msg = (
                f"{key!r} has shape {tuple(found[role].shape)}; {what} has {wanted[role]} there: "
                f"{_GATES} gates of {cell} cells each, by the shape of {keys['weight_hr']!r}. "
                + OTHER_LAYOUT
            )
            raise ConfigError(msg)
    return _Direction(
        **{
            role: tensor if role == "weight_hr" else _reordered(_flat(role, tensor), layout.order)
            for role, tensor in found.items()
        }
    )


def _write(direction: _Direction, layout: Format, keys: Mapping[str, str]) -> StateDict:
    bias, second = direction.bias_ih, direction.bias_hh
    if "bias_hh" not in keys:
        bias = bias if second is None else bias + second
    elif second is None:
        second = torch.zeros_like(bias)
    tensors = {
        "weight_ih": direction.weight_ih,
        "weight_hh": direction.weight_hh,
        "weight_hr": direction.weight_hr,
        "bias_ih": bias,
        "bias_hh": second,
    }
    written: StateDict = {}
    for role, key in keys.items():
        tensor = tensors[role]
        assert tensor is not None
        if role != "weight_hr":
            tensor = _reordered(tensor, layout.order)
        if role.startswith("bias"):
            tensor = tensor.reshape(*layout.bias_rows, -1)
        written[key] = tensor
    return written


def _flat(role: str, tensor: Tensor) -> Tensor:
    return tensor.reshape(-1) if role.startswith("bias") else tensor


def _reordered(tensor: Tensor, order: tuple[int, int, int, int]) -> Tensor:
    if order == tuple(range(_GATES)):
        return tensor
    gates = tensor.chunk(_GATES, 0)
    return torch.cat([gates[place] for place in order])


def _nothing_found(state: Mapping[str, Any], layout: str, prefix: str | None = None) -> str:
    key = places_of(layout)[0].keys(prefix or "")["weight_hr"]
    where = "" if prefix is None else f" at {prefix[:-1]!r}"
    found = [
        f"{name} at {', '.join(map(repr, paths))}"
        for name in LAYOUTS
        if (paths := find_layers(state, name)[:3])
    ]
    hint = f"There is {'; '.join(found)}." if found else f"Near: {near_matches(key, state)}."
    return f"the state dict has no layer in layout {layout!r}{where}: no {key!r}. {hint}"
