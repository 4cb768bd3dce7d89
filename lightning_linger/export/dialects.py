"""The dialects by name."""

from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.export.dialect import Dialect
from lightning_linger.export.linger import LINGER, LINGER1
from lightning_linger.export.qdq import QDQ, qdq_dialect

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


def variant_of(
    dialect: Dialect, opset_version: int | None, signed: bool, int4_weights: bool
) -> Dialect:
    """Return a dialect as the options ask for it.

    Raises:
        ConfigError: If the dialect has no such option.
    """
    asked = {"signed": signed, "int4_weights": int4_weights}
    options = [name for name, wanted in asked.items() if wanted]
    options += [] if opset_version is None else ["opset_version"]
    if not options:
        return dialect
    if dialect is not QDQ:
        msg = (
            f"{', '.join(f'`{name}`' for name in options)}: only the 'qdq' dialect has a choice. "
            f"What a {dialect.name!r} file holds is what its packer reads. Leave it out."
        )
        raise ConfigError(msg)
    chosen = dialect.opset_version if opset_version is None else opset_version
    return qdq_dialect(signed=signed, int4_weights=int4_weights, opset_version=chosen)
