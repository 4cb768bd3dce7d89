"""What the settings of a site must fulfil before it is planned."""

from __future__ import annotations

from typing import Any

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.core.platform import Platform
from lightning_linger.core.ranges import RangeRule
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import WIDEST_OPERAND
from lightning_linger.stages.selection import Fields


def require_supported(site: Site, call: Any, config: QuantConfig, platform: Platform) -> None:
    """Refuse settings of a site that its target, or any integer model, cannot have.

    Args:
        site: The site; nothing of it is changed.
        call: Its recorded call.
        config: How it is to be quantized.
        platform: The target.

    Raises:
        UnsupportedError: If the engine cannot run the op, and the settings say it must.
        ConfigError: If the settings do not go with the target or with each other.
    """
    instead = platform.unsupported.get(site.op.variant(call))
    if config.strict_platform and instead is not None:
        msg = (
            f"`{site.key}` at {site.node.location}: the engine of platform {platform.name!r} "
            f"cannot run {site.op.kind}. Use {instead}, leave it in float by an override, or "
            "set strict_platform=False."
        )
        raise UnsupportedError(msg)
    granularity = config.granularity or platform.granularity
    scale = config.scale or platform.scale
    if config.symmetry == "affine" and platform.symmetry != "affine":
        msg = (
            f"`{site.key}`: platform {platform.name!r} has no zero points, it needs "
            "symmetry='symmetric'. Found: 'affine'."
        )
        raise ConfigError(msg)
    _refuse_groups(site, config, scale)
    if platform.right_shift_only and scale != "power_of_two":
        msg = (
            f"`{site.key}`: platform {platform.name!r} shifts, it needs scale='power_of_two'. "
            f"Found: {scale!r}."
        )
        raise ConfigError(msg)
    if platform.layers_only and config.output_bits is not None:
        msg = (
            f"`{site.key}`: layers of platform {platform.name!r} give real results. Set "
            f"output_bits=None. Found: {config.output_bits}."
        )
        raise ConfigError(msg)
    if config.output_bits is not None and config.output_bits > WIDEST_OPERAND:
        if granularity == "channel":
            msg = (
                f"`{site.key}`: a {config.output_bits}-bit output has one scale, the weights "
                "have one per channel. Set granularity='tensor', or output_bits=None for float."
            )
            raise ConfigError(msg)
        if config.output_bits != 32:
            msg = f"`{site.key}`: output_bits above 16 must be 32. Found: {config.output_bits}."
            raise ConfigError(msg)


def require_free_range(site: Site, known: Any, platform: Platform, fields: Fields) -> None:
    """Refuse another range, or form of it, for a result whose grid the engine fixes.

    Args:
        site: The site.
        known: The range of its result that is known, of any form.
        platform: The target.
        fields: What overrides and marks say of the site.

    Raises:
        ConfigError: If they name a range or another symmetry, and the engine fixes it.
    """
    if not isinstance(known, tuple) or fields is None:
        return
    allowed = {"range": (), "symmetry": (None, platform.symmetry)}
    for name, values in allowed.items():
        if name in fields and fields[name] not in values:
            msg = (
                f"`{site.key}`: platform {platform.name!r} fixes the scale and the zero point of "
                f"{site.op.kind} (its range is {known}). Leave `{name}` out of its overrides."
            )
            raise ConfigError(msg)


def _refuse_groups(site: Site, config: QuantConfig, scale: str) -> None:
    """Refuse scales of groups where an integer model could not have them."""
    granularity = config.granularity
    if not (granularity == "input_channel" or isinstance(granularity, int)):
        return
    where = f"`{site.key}`: granularity={granularity!r}"
    if scale != "power_of_two":
        msg = (
            f"{where} needs scale='power_of_two': the steps within one sum have to be shifts "
            f"apart. Found: {scale!r}."
        )
        raise ConfigError(msg)
    if not site.op.groups_weights:
        return
    if config.strict_platform:
        msg = f"{where}: no engine has scales of groups. Set strict_platform=False."
        raise UnsupportedError(msg)
    if RangeRule.parse_weight(config.weight_range).learned is not None:
        msg = f"{where}: ranges of groups are not learned. Found: {config.weight_range!r}."
        raise ConfigError(msg)
    (weight,) = site.op.parameters(site.recorded_call)
    if isinstance(granularity, int) and weight.shape[1] % granularity:
        msg = (
            f"{where}: its {weight.shape[1]} input channels do not part into groups of "
            f"{granularity}. Choose a divisor, or another granularity by an override."
        )
        raise ConfigError(msg)
