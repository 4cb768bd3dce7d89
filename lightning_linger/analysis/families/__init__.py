"""How each op of the model is read, one file per family."""

from __future__ import annotations

from types import ModuleType

from lightning_linger.analysis.families import (
    convolutions,
    curves,
    moves,
    pairs,
    pools,
    products,
    recurrent,
)
from lightning_linger.analysis.walk import Reader

_FAMILIES: tuple[ModuleType, ...] = (
    convolutions,
    curves,
    moves,
    pairs,
    pools,
    products,
    recurrent,
)

READERS: dict[str, Reader] = {
    kind: reader for family in _FAMILIES for kind, reader in family.READERS.items()
}
