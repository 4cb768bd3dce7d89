"""Conversion between the layouts in which checkpoints hold LSTMs with projection.

==================== =====================================================================
layout               what holds it
==================== =====================================================================
asr                  `LSTMP` of pytorch-asr-extension
lstmp                `lightning_linger.nn.LSTMP`
torch                ``nn.LSTM(..., proj_size=...)``, which linger calls FastLSTMP
asr-ublstmp          `UBLSTMP` of pytorch-asr-extension
ublstmp              `lightning_linger.nn.UBLSTMP`
fast-ublstmp         two ``nn.LSTM`` as submodules ``forward_lstmp`` and ``backward_lstmp``
lstmp-pair           two `LSTMP` next to each other, the second named like the first with a 2
torch-bidirectional  ``nn.LSTM(..., proj_size=..., bidirectional=True)``
==================== =====================================================================

The first three hold one direction, the others two. Names, shapes and gate orders are those of
section 4 of linger's manual, and for ``asr-ublstmp`` of pytorch-asr-extension itself.

A converter takes a state dict and returns a new one. Only the tensors of the layer change; tensors
whose values stay the same share memory with the input, as those of a state dict do with the model.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.errors import ConfigError, near_matches

StateDict = dict[str, Any]

_GATES = 4


@dataclass(frozen=True)
class _Format:
    """How one direction is stored.

    Args:
        names: Of the tensors, by what they are in ``nn.LSTM``.
        order: Where the gates i, f, g, o stand; each order here is its own inverse.
        bias_rows: Leading axes of a bias.
    """

    names: Mapping[str, str]
    order: tuple[int, int, int, int] = (0, 1, 2, 3)
    bias_rows: tuple[int, ...] = ()


_ASR = _Format(
    {
        "weight_ih": "weight_x",
        "weight_hh": "weight_r",
        "bias_ih": "weight_bias",
        "weight_hr": "weight_p",
    },
    order=(0, 1, 3, 2),
    bias_rows=(1,),
)
_LSTMP = _Format(
    {
        "weight_ih": "input_linearity.weight",
        "bias_ih": "input_linearity.bias",
        "weight_hh": "state_linearity.weight",
        "weight_hr": "state_projection.weight",
    }
)
_TORCH = _Format(
    {
        "weight_ih": "weight_ih_l0",
        "weight_hh": "weight_hh_l0",
        "bias_ih": "bias_ih_l0",
        "bias_hh": "bias_hh_l0",
        "weight_hr": "weight_hr_l0",
    }
)


@dataclass(frozen=True)
class _Place:
    """Where one direction of a layer is stored.

    Args:
        format: Of its tensors.
        child: Dotted path of the submodule that holds it.
        suffix: At the end of each name.
        sibling: At the end of the name of the layer.
    """

    format: _Format
    child: str = ""
    suffix: str = ""
    sibling: str = ""

    def keys(self, prefix: str) -> dict[str, str]:
        """Return the keys of the layer at ``prefix``, by what they are in ``nn.LSTM``."""
        head = f"{prefix[:-1]}{self.sibling}." if self.sibling else prefix
        return {role: self._name(head, name) for role, name in self.format.names.items()}

    def _name(self, head: str, name: str) -> str:
        return f"{head}{self.child}{name}{self.suffix}"


_LAYOUTS: dict[str, tuple[_Place, ...]] = {
    "asr": (_Place(_ASR),),
    "lstmp": (_Place(_LSTMP),),
    "torch": (_Place(_TORCH),),
    "asr-ublstmp": (_Place(_ASR, suffix="_fwd"), _Place(_ASR, suffix="_bwd")),
    "ublstmp": (_Place(_LSTMP, "forward_lstmp."), _Place(_LSTMP, "backward_lstmp.")),
    "fast-ublstmp": (_Place(_TORCH, "forward_lstmp."), _Place(_TORCH, "backward_lstmp.")),
    "lstmp-pair": (_Place(_LSTMP), _Place(_LSTMP, sibling="2")),
    "torch-bidirectional": (_Place(_TORCH), _Place(_TORCH, suffix="_reverse")),
}
LAYOUTS: tuple[str, ...] = tuple(_LAYOUTS)


@dataclass(frozen=True)
class _Direction:
    """One direction in the terms of ``nn.LSTM``; ``bias_hh`` is None where there is one bias."""

    weight_ih: Tensor
    weight_hh: Tensor
    weight_hr: Tensor
    bias_ih: Tensor
    bias_hh: Tensor | None = None


def check_layout(layout: str) -> None:
    """Raise a `ConfigError` unless ``layout`` is a name in `LAYOUTS`."""
    if layout not in _LAYOUTS:
        msg = f"unknown layout {layout!r}. The layouts are {', '.join(LAYOUTS)}."
        raise ConfigError(msg)


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
    places, target_places = _places(source), _places(target)
    if len(places) != len(target_places):
        fitting = [name for name in LAYOUTS if len(_LAYOUTS[name]) == len(places)]
        msg = (
            f"cannot convert {source!r} to {target!r}: one has {len(places)} direction(s), the "
            f"other {len(target_places)}. {source!r} converts to {', '.join(fitting)}."
        )
        raise ConfigError(msg)
    if prefix is not None:
        prefixes = [_dotted(prefix)]
    else:
        prefixes = [_dotted(path) for path in find_layers(state_dict, source)]
        if not prefixes:
            raise ConfigError(_nothing_found(state_dict, source))
    result = _copied(state_dict)
    for head in prefixes:
        result = _convert_layer(result, source, target, head)
    return result


def find_layers(state_dict: Mapping[str, Any], layout: str) -> list[str]:
    """Return the dotted paths of all layers of a layout, recognised by their projections.

    ``lstmp`` and ``torch`` also find each direction of ``ublstmp``, ``lstmp-pair`` and
    ``fast-ublstmp``.

    Args:
        state_dict: Of the layer or of a model that holds it.
        layout: A name in `LAYOUTS`.

    Raises:
        ConfigError: If the layout is unknown.
    """
    places = _places(layout)
    marker = places[0].keys("")["weight_hr"]
    found = []
    for key in state_dict:
        if key != marker and not key.endswith("." + marker):
            continue
        prefix = key[: -len(marker)]
        complete = all(place.keys(prefix)["weight_hr"] in state_dict for place in places)
        if complete and not (layout == "torch" and f"{key}_reverse" in state_dict):
            found.append(prefix[:-1])
    return found


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
    head = _dotted(prefix)
    heads = _two_heads(head, forward, backward)
    names = _names_at(state_dict, head)
    _refuse_deeper(names, head)
    moves: dict[str, str] = {}
    for suffix, new_head in zip(("", "_reverse"), heads, strict=True):
        for name in _distinct(names):
            moves[f"{head}{name}{suffix}"] = new_head + name
    _check_twins(state_dict, head, names, (head, ""), (head, "_reverse"))
    return _replaced(state_dict, moves, {new: state_dict[old] for old, new in moves.items()})


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
    head = _dotted(prefix)
    heads = _two_heads(head, forward, backward)
    names: list[str] = []
    for old_head in heads:
        found = _names_at(state_dict, old_head)
        _refuse_deeper(found, old_head)
        _refuse_bidirectional(found, old_head)
        names += found
    moves: dict[str, str] = {}
    for suffix, old_head in zip(("", "_reverse"), heads, strict=True):
        for name in _distinct(names):
            moves[old_head + name] = f"{head}{name}{suffix}"
    _check_twins(state_dict, head, names, (heads[0], ""), (heads[1], ""))
    return _replaced(state_dict, moves, {new: state_dict[old] for old, new in moves.items()})


def _places(layout: str) -> tuple[_Place, ...]:
    check_layout(layout)
    return _LAYOUTS[layout]


def _dotted(path: str) -> str:
    return path if not path or path.endswith(".") else path + "."


def _convert_layer(state: StateDict, source: str, target: str, prefix: str) -> StateDict:
    for layout in (source, target):
        if not prefix and any(place.sibling for place in _LAYOUTS[layout]):
            msg = (
                f"layout {layout!r} names its second layer after its first, so it needs the name "
                "of a layer. Pass the prefix, and the state dict of the model around it."
            )
            raise ConfigError(msg)
    old: list[str] = []
    new: StateDict = {}
    for place, target_place in zip(_LAYOUTS[source], _LAYOUTS[target], strict=True):
        keys = place.keys(prefix)
        if not any(key in state for key in keys.values()):
            raise ConfigError(_nothing_found(state, source, prefix))
        if place.format is _TORCH:
            head = prefix + place.child
            names = _names_at(state, head)
            _refuse_deeper(names, head)
            if source != "torch-bidirectional":
                _refuse_bidirectional(names, head)
        old += keys.values()
        direction = _read(state, place.format, keys, source)
        new |= _write(direction, target_place.format, target_place.keys(prefix))
    return _replaced(state, old, new)


def _read(
    state: Mapping[str, Any], layout: _Format, keys: Mapping[str, str], name: str
) -> _Direction:
    what = f"layout {name!r}"
    found = {role: _tensor(state, key, what, _REMEDIES.get(role)) for role, key in keys.items()}
    for role, key in keys.items():
        rank = 1 + len(layout.bias_rows) if role.startswith("bias") else 2
        if found[role].dim() != rank:
            got = tuple(found[role].shape)
            msg = f"{key!r} has shape {got}; {what} has {rank} axes there. {_OTHER}"
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
                + _OTHER
            )
            raise ConfigError(msg)
    return _Direction(
        **{
            role: tensor if role == "weight_hr" else _reordered(_flat(role, tensor), layout.order)
            for role, tensor in found.items()
        }
    )


_OTHER = "Pass the layout that the checkpoint has, or the prefix of an LSTM with projection."
_REMEDIES = {
    "weight_hr": "An LSTM without projection has no counterpart.",
    "bias_ih": "For a layer without bias, add zeros.",
    "bias_hh": "For a layer without bias, add zeros.",
}


def _write(direction: _Direction, layout: _Format, keys: Mapping[str, str]) -> StateDict:
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


def _copied(state: Mapping[str, Any]) -> StateDict:
    """Return a shallow copy that keeps the versions a module writes next to its state."""
    copy: StateDict = OrderedDict(state) if isinstance(state, OrderedDict) else dict(state)
    if isinstance(state, OrderedDict):
        vars(copy).update(vars(state))
    return copy


def _replaced(state: Mapping[str, Any], old: Collection[str], new: StateDict) -> StateDict:
    """Return a copy with new entries where the first of the old ones was."""
    gone = set(old)
    for key in new:
        if key in state and key not in gone:
            msg = (
                f"the result would overwrite {key!r}, which belongs to something else. Rename that "
                "entry, or convert under another prefix."
            )
            raise ConfigError(msg)
    result = _copied(state)
    result.clear()
    pending = new
    for key, value in state.items():
        if key in gone:
            result.update(pending)
            pending = {}
        else:
            result[key] = value
    return result


_TORCH_NAME = re.compile(r"(?:weight_(?:ih|hh|hr)|bias_(?:ih|hh))_l\d+(?:_reverse)?")


def _names_at(state: Mapping[str, Any], head: str) -> list[str]:
    """Return the names of the tensors of an ``nn.LSTM`` at a path."""
    names = (key[len(head) :] for key in state if key.startswith(head))
    return [name for name in names if _TORCH_NAME.fullmatch(name)]


def _distinct(names: Iterable[str]) -> list[str]:
    """Return names without their direction, in their order; at least one is always expected."""
    return list(dict.fromkeys(name.removesuffix("_reverse") for name in names)) or ["weight_ih_l0"]


def _refuse_deeper(names: list[str], head: str) -> None:
    deeper = [name for name in names if "_l0" not in name]
    if deeper:
        msg = (
            f"the nn.LSTM at {head[:-1]!r} has more than one layer ({head + deeper[0]!r}). Only a "
            "single layer converts; rebuild it from nn.LSTM of one layer each."
        )
        raise ConfigError(msg)


def _refuse_bidirectional(names: list[str], head: str) -> None:
    if any(name.endswith("_reverse") for name in names):
        msg = (
            f"the nn.LSTM at {head[:-1]!r} is bidirectional, where one direction is expected. Use "
            "the layout 'torch-bidirectional', or `split_bidirectional`."
        )
        raise ConfigError(msg)


def _two_heads(head: str, forward: str | None, backward: str | None) -> tuple[str, str]:
    heads = (
        f"{head}forward_lstmp." if forward is None else _dotted(forward),
        f"{head}backward_lstmp." if backward is None else _dotted(backward),
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
    for name in _distinct(names):
        keys = [f"{place}{name}{suffix}" for place, suffix in (one, other)]
        shapes = [tuple(_tensor(state, key, what).shape) for key in keys]
        if shapes[0] != shapes[1]:
            msg = (
                f"{keys[1]!r} has shape {shapes[1]} and {keys[0]!r} has {shapes[0]}. The two "
                f"directions of {what} need the same sizes."
            )
            raise ConfigError(msg)


def _tensor(state: Mapping[str, Any], key: str, what: str, remedy: str | None = None) -> Tensor:
    if key not in state:
        remedy = remedy or "Pass the prefix of such a layer, or the layout that it has."
        near = near_matches(key, state)
        msg = f"the state dict has no {key!r}, which {what} needs. {remedy} Near: {near}."
        raise ConfigError(msg)
    tensor = state[key]
    if not isinstance(tensor, Tensor):
        msg = f"{key!r} is a {type(tensor).__name__}; {what} needs a tensor. {_OTHER}"
        raise ConfigError(msg)
    return tensor.detach()


def _nothing_found(state: Mapping[str, Any], layout: str, prefix: str | None = None) -> str:
    key = _LAYOUTS[layout][0].keys(prefix or "")["weight_hr"]
    where = "" if prefix is None else f" at {prefix[:-1]!r}"
    found = [
        f"{name} at {', '.join(map(repr, paths))}"
        for name in LAYOUTS
        if (paths := find_layers(state, name)[:3])
    ]
    hint = f"There is {'; '.join(found)}." if found else f"Near: {near_matches(key, state)}."
    return f"the state dict has no layer in layout {layout!r}{where}: no {key!r}. {hint}"
