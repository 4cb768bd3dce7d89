"""The arguments of recurrent functions, in one form for all of them.

A function mode sees `nn.LSTM` and its relatives as one call with all weights in a flat list, on
padded or on packed sequences, and their cells as a call for one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

# Each has a cell too, which is one step of it.
LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")

_PADDED = (
    *("input", "hx", "params", "has_biases", "num_layers", "dropout", "train"),
    *("bidirectional", "batch_first"),
)
_PACKED = (
    *("data", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train"),
    "bidirectional",
)
_CELL = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")


class RecurrentCall(NamedTuple):
    """Bound arguments of a recurrent function.

    Args:
        input: ``[T, B, I]``, or ``[B, T, I]`` with ``batch_first``; ``[N, I]``, the rows of packed
            sequences; ``[B, I]``, the one step of a cell.
        states: ``(h,)`` or ``(h, c)``, ``[layers * directions, B, size]``, of a cell ``[B, size]``.
        weights: In torch's order.
        has_biases: Whether there are biases.
        num_layers: Number of layers.
        dropout: Probability of zeroing, between layers, in training.
        train: Whether dropout is active.
        bidirectional: Whether a second pass runs back in time.
        batch_first: See ``input``.
        batch_sizes: Of packed sequences: how many are longer than ``t``, for each step ``t``.
    """

    input: Any
    states: tuple[Any, ...]
    weights: tuple[Any, ...]
    has_biases: bool = True
    num_layers: int = 1
    dropout: float = 0.0
    train: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    batch_sizes: Any = None

    @property
    def directions(self) -> int:
        """One or two."""
        return 2 if self.bidirectional else 1


@dataclass(frozen=True)
class Direction:
    """The weights of one direction of one layer.

    Args:
        name: Tells it from the others of its call, e.g. ``l1_reverse``.
        layer: Index of the layer.
        reverse: Whether it runs back in time.
        weight_ih: ``[gates * H, I]``.
        weight_hh: ``[gates * H, P]``.
        bias_ih: ``[gates * H]`` or None.
        bias_hh: ``[gates * H]`` or None.
        weight_hr: ``[P, H]``, the projection of an LSTM, or None.
    """

    name: str
    layer: int
    reverse: bool
    weight_ih: Any
    weight_hh: Any
    bias_ih: Any = None
    bias_hh: Any = None
    weight_hr: Any = None


def bind_layer(kind: str, *args: Any, **kwargs: Any) -> RecurrentCall:
    """Bind a call of ``torch.lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``."""
    states_are_sequence = kind == "lstm"
    position = 1 if states_are_sequence else 2
    packed = "batch_sizes" in kwargs or (
        len(args) > position and not isinstance(args[position], list | tuple)
    )
    bound = dict(zip(_PACKED if packed else _PADDED, args, strict=False)) | kwargs
    states = bound["hx"]
    return RecurrentCall(
        input=bound["data" if packed else "input"],
        states=tuple(states) if isinstance(states, list | tuple) else (states,),
        weights=tuple(bound["params"]),
        has_biases=bound["has_biases"],
        num_layers=bound["num_layers"],
        dropout=bound["dropout"],
        train=bound["train"],
        bidirectional=bound["bidirectional"],
        batch_first=bound.get("batch_first", False),
        batch_sizes=bound.get("batch_sizes"),
    )


def bind_cell(*args: Any, **kwargs: Any) -> RecurrentCall:
    """Bind a call of ``torch.lstm_cell`` and its relatives."""
    bound = dict(zip(_CELL, args, strict=False)) | kwargs
    states = bound["hx"]
    biases = [bound.get(name) for name in ("b_ih", "b_hh")]
    has_biases = any(bias is not None for bias in biases)
    return RecurrentCall(
        input=bound["input"],
        states=tuple(states) if isinstance(states, list | tuple) else (states,),
        weights=(bound["w_ih"], bound["w_hh"], *(biases if has_biases else ())),
        has_biases=has_biases,
    )


def directions_of(call: RecurrentCall) -> list[list[Direction]]:
    """Return the weights by layer and direction."""
    passes = call.num_layers * call.directions
    count = len(call.weights) // passes
    plain = 4 if call.has_biases else 2
    found = []
    for index in range(passes):
        layer, reverse = divmod(index, call.directions)
        mine: Sequence[Any] = call.weights[index * count : (index + 1) * count]
        biases = mine[2:4] if call.has_biases else (None, None)
        found.append(
            Direction(
                name=f"l{layer}_reverse" if reverse else f"l{layer}",
                layer=layer,
                reverse=bool(reverse),
                weight_ih=mine[0],
                weight_hh=mine[1],
                bias_ih=biases[0],
                bias_hh=biases[1],
                weight_hr=mine[plain] if count > plain else None,
            )
        )
    return [
        found[layer * call.directions : (layer + 1) * call.directions]
        for layer in range(call.num_layers)
    ]
