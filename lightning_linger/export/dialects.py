"""The dialects by name."""

from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.export.dialect import Dialect
from lightning_linger.export.linger import LINGER, LINGER1
from lightning_linger.export.qdq import QDQ

DIALECTS: dict[str, Dialect] = {
    **{dialect.name: dialect for dialect in (LINGER, LINGER1, QDQ)},
    "linger3": LINGER,
}


def dialect_of(name: str) -> Dialect:
    """Return a dialect by name.

    Raises:
        ConfigError: If there is no such dialect; names the ones that exist.
    """
    if name not in DIALECTS:
        msg = (
            f"unknown dialect {name!r}. Allowed: {sorted(DIALECTS)}. Similar: "
            f"{near_matches(name, DIALECTS)}."
        )
        raise ConfigError(msg)
    return DIALECTS[name]
