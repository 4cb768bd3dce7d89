"""Schemes that other tools made known, each a function that returns a configuration."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.presets.cambricon import cambricon_config
from lightning_linger.presets.catch_spec import calibration_of
from lightning_linger.presets.linger import linger_config
from lightning_linger.presets.nics_fix import nics_fix_config
from lightning_linger.presets.tflite import tflite_config

PRESETS: dict[str, Callable[..., QuantConfig]] = {
    "cambricon": cambricon_config,
    "linger": linger_config,
    "nics_fix": nics_fix_config,
    "tflite": tflite_config,
}


def preset(name: str, **fields: Any) -> QuantConfig:
    """Return the configuration of a scheme.

    Args:
        name: A name of :data:`PRESETS`.
        **fields: Arguments of the scheme under its own names, and fields of :class:`QuantConfig`,
            which replace what the scheme sets.

    Raises:
        ConfigError: If there is no such scheme or field, or a value is not allowed.
    """
    if name not in PRESETS:
        msg = (
            f"unknown preset {name!r}. Allowed: {sorted(PRESETS)}. Similar: "
            f"{near_matches(name, PRESETS)}."
        )
        raise ConfigError(msg)
    return PRESETS[name](**fields)


def read_preset(spec: str | Mapping[str, Any]) -> QuantConfig:
    """Read what YAML holds: a name, or its fields with the name under ``name``.

    Raises:
        ConfigError: See :func:`preset`; or if there is no name.
    """
    if isinstance(spec, str):
        return preset(spec)
    if not isinstance(spec.get("name"), str):
        msg = f"`preset` must be a name, or a mapping with a `name`. Found: {dict(spec)!r}."
        raise ConfigError(msg)
    return preset(**spec)


__all__ = ["PRESETS", "calibration_of", "preset", "read_preset"]
