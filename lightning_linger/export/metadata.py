"""The metadata of an exported file: version, dialect, platform, configuration, scales."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from onnxscript import ir

from lightning_linger.__about__ import __version__
from lightning_linger.core.sites import Site
from lightning_linger.export.dialect import Dialect

METADATA_PREFIX = "lightning_linger."


def describe(
    model: ir.Model, sites: list[Site], dialect: Dialect, described: Mapping[str, Any]
) -> None:
    """Write into a file who made it, and of what.

    Args:
        model: Changed in place.
        sites: The quantized sites, none for a float model.
        dialect: Of the file.
        described: What readers of its codes need, plain data by name.
    """
    model.producer_name = "lightning-linger"
    model.producer_version = __version__
    model.metadata_props.clear()
    model.metadata_props[METADATA_PREFIX + "version"] = __version__
    if not sites:
        return
    platforms = sorted({site.platform_name for site in sites})
    model.metadata_props[METADATA_PREFIX + "dialect"] = dialect.name
    model.metadata_props[METADATA_PREFIX + "platform"] = ",".join(platforms)
    model.metadata_props[METADATA_PREFIX + "config"] = json.dumps(_config_summary(sites))
    for name, found in described.items():
        model.metadata_props[METADATA_PREFIX + name] = json.dumps(found)


def _config_summary(sites: list[Site]) -> dict[str, Any]:
    """Return the most common configuration, and by site what differs from it."""
    configs = {site.key: dataclasses.asdict(site.config) for site in sites if site.config}
    common = json.loads(Counter(json.dumps(c) for c in configs.values()).most_common(1)[0][0])
    differing = {
        key: {name: value for name, value in config.items() if value != common[name]}
        for key, config in configs.items()
        if config != common
    }
    return {"common": common, "sites": differing}
