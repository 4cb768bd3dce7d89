"""The layouts, as data: where each holds which tensor of an LSTM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_linger.core.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """How one direction is stored.

    Args:
        names: Of the tensors, by what they are in ``nn.LSTM``.
        order: Where the gates i, f, g, o stand; each order here is its own inverse.
        bias_rows: Leading axes of a bias.
    """

    names: Mapping[str, str]
    order: tuple[int, int, int, int] = (0, 1, 2, 3)
    bias_rows: tuple[int, ...] = ()


_ASR = Format(
    {
        "weight_ih": "weight_x",
        "weight_hh": "weight_r",
        "bias_ih": "weight_bias",
        "weight_hr": "weight_p",
    },
    order=(0, 1, 3, 2),
    bias_rows=(1,),
)
_LSTMP = Format(
    {
        "weight_ih": "input_linearity.weight",
        "bias_ih": "input_linearity.bias",
        "weight_hh": "state_linearity.weight",
        "weight_hr": "state_projection.weight",
    }
)
TORCH = Format(
    {
        "weight_ih": "weight_ih_l0",
        "weight_hh": "weight_hh_l0",
        "bias_ih": "bias_ih_l0",
        "bias_hh": "bias_hh_l0",
        "weight_hr": "weight_hr_l0",
    }
)


@dataclass(frozen=True)
class Place:
    """Where one direction of a layer is stored.

    Args:
        format: Of its tensors.
        child: Dotted path of the submodule that holds it.
        suffix: At the end of each name.
        sibling: At the end of the name of the layer.
    """

    format: Format
    child: str = ""
    suffix: str = ""
    sibling: str = ""

    def keys(self, prefix: str) -> dict[str, str]:
        """Return the keys of the layer at ``prefix``, by what they are in ``nn.LSTM``."""
        head = f"{prefix[:-1]}{self.sibling}." if self.sibling else prefix
        return {role: self._name(head, name) for role, name in self.format.names.items()}

    def _name(self, head: str, name: str) -> str:
        return f"{head}{self.child}{name}{self.suffix}"


_PLACES: dict[str, tuple[Place, ...]] = {
    "asr": (Place(_ASR),),
    "lstmp": (Place(_LSTMP),),
    "torch": (Place(TORCH),),
    "asr-ublstmp": (Place(_ASR, suffix="_fwd"), Place(_ASR, suffix="_bwd")),
    "ublstmp": (Place(_LSTMP, "forward_lstmp."), Place(_LSTMP, "backward_lstmp.")),
    "fast-ublstmp": (Place(TORCH, "forward_lstmp."), Place(TORCH, "backward_lstmp.")),
    "lstmp-pair": (Place(_LSTMP), Place(_LSTMP, sibling="2")),
    "torch-bidirectional": (Place(TORCH), Place(TORCH, suffix="_reverse")),
}
LAYOUTS: tuple[str, ...] = tuple(_PLACES)


def check_layout(layout: str) -> None:
    """Raise a `ConfigError` unless ``layout`` is a name in `LAYOUTS`."""
    if layout not in _PLACES:
        msg = f"unknown layout {layout!r}. The layouts are {', '.join(LAYOUTS)}."
        raise ConfigError(msg)


def places_of(layout: str) -> tuple[Place, ...]:
    """Return where a layout stores each direction; an unknown one is a `ConfigError`."""
    check_layout(layout)
    return _PLACES[layout]


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
    places = places_of(layout)
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
