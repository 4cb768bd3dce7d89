"""The arguments of CATCH's ``quantize_dynamic_mlu``, read into those of ``linger.calibrate``."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.core.images import FirstConv
from lightning_linger.presets.cambricon import BITS, bits_of, cambricon_config, require_choice

_OF_THE_RUN = ("iteration", "firstconv", "mean", "std")
_OF_THE_SCHEME = ("use_avg", "data_scale", "per_channel", "method")
KEYS = (*_OF_THE_RUN, *_OF_THE_SCHEME)
FLOAT = "float16"


def calibration_of(
    qconfig_spec: Mapping[str, Any] | None = None,
    dtype: str = "int8",
    mixed_layer: Mapping[str, str] | None = None,
    mapping: Sequence[Any] | Mapping[Any, Any] | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments of :func:`lightning_linger.calibrate` for those of CATCH.

    Args:
        qconfig_spec: Any of ``iteration``, ``use_avg``, ``data_scale``, ``firstconv``, ``mean``,
            ``std``, ``per_channel`` and ``method``. What is not given is off, ``firstconv`` too,
            and ``iteration`` is all batches.
        dtype: ``int8`` or ``int16``.
        mixed_layer: Another dtype for some modules, by their dotted paths with commas between;
            ``float16`` leaves them in float.
        mapping: The types to quantize (the keys of a dictionary), None for all layers.

    Raises:
        ConfigError: If a key is unknown or a value not allowed; names it.
    """
    for name, given in (("qconfig_spec", qconfig_spec), ("mixed_layer", mixed_layer)):
        if not isinstance(given, Mapping | None):
            msg = f"`{name}` is a dictionary. Found: {given!r}."
            raise ConfigError(msg)
    if isinstance(mapping, str) or not isinstance(mapping, Mapping | Sequence | None):
        msg = (
            f"`mapping` is a list of types, or a dictionary with them as keys. Found: {mapping!r}."
        )
        raise ConfigError(msg)
    scheme = dict(qconfig_spec or {})
    for key in scheme:
        if key not in KEYS:
            msg = f"`qconfig_spec` has no key {key!r}. Similar: {near_matches(str(key), KEYS)}."
            raise ConfigError(msg)
    iteration, firstconv, mean, std = (scheme.pop(key, None) for key in _OF_THE_RUN)
    require_choice("firstconv", firstconv, (None, False, True))
    if not firstconv and (mean is not None or std is not None):
        msg = "`mean` and `std` are for `firstconv`, which is off. Set it to True, or leave them."
        raise ConfigError(msg)
    return {
        "config": cambricon_config(dtype, **scheme),
        "batches": iteration,
        "firstconv": FirstConv.parse({"mean": mean, "std": std}) if firstconv else None,
        "overrides": mixed_overrides(mixed_layer) if mixed_layer else None,
        "types": None if mapping is None else list(mapping),
    }


def mixed_overrides(mixed_layer: Mapping[str, str]) -> dict[str, dict[str, int] | None]:
    """Return the ``overrides`` for CATCH's ``mixed_layer``."""
    found: dict[str, dict[str, int] | None] = {}
    for paths, dtype in mixed_layer.items():
        require_choice("mixed_layer", dtype, (*BITS, FLOAT))
        for path in paths.split(","):
            found[path.strip()] = None if dtype == FLOAT else bits_of(dtype)
    return found
