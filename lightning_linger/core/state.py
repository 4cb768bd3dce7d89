"""What is on at a moment of a run: saved in the recipe, and switched on again from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from lightning_linger.core.widths import Widths

if TYPE_CHECKING:
    from lightning_linger.core.instrumentation import Instrumentation


def what_is_on(instrumentation: Instrumentation) -> dict[str, Any]:
    """Return what changes during a run, as plain data."""
    switches, sites = instrumentation.switches, instrumentation.sites
    changed = instrumentation.changed_widths
    return {
        "fuse": switches.fuse,
        "fuse_mode": switches.fuse_mode,
        "normalize": switches.normalize,
        "quantize": switches.quantize,
        "watch": switches.watch,
        "frozen": {site.key: sorted(site.frozen) for site in sites if site.frozen},
        "floating": {site.key: sorted(site.floating) for site in sites if site.floating},
        "applied": instrumentation.applied,
        "gradients": _gradient_states(instrumentation),
        "widths": {key: astuple(widths) for key, widths in changed.items()},
    }


def switch_back(instrumentation: Instrumentation, recipe: Mapping[str, Any]) -> None:
    """Switch on what a recipe says, as far as it is planned here."""
    switches, planned = instrumentation.switches, instrumentation.plans
    switches.fuse = recipe["fuse"] and "fuse_bn" in planned
    switches.fuse_mode = recipe["fuse_mode"]
    switches.normalize = recipe["normalize"] and "normalize" in planned
    switches.quantize = recipe["quantize"] and "quantize" in planned
    switches.watch = recipe.get("watch", False) and "quantize" in planned
    instrumentation.applied = list(recipe.get("applied", ()))
    frozen, floating = recipe.get("frozen", {}), recipe.get("floating", {})
    gradients = recipe.get("gradients", {})
    for site in instrumentation.sites:
        site.freeze(frozenset(frozen.get(site.key, ())))
        site.leave_float(frozenset(floating.get(site.key, ())))
        for node in site.gradient_quantizers():
            node.active, node.frozen = gradients.get(node.name, (True, node.frozen))
    if not instrumentation.accepts_changes:
        saved = {key: Widths(*widths) for key, widths in recipe.get("widths", {}).items()}
        known = {key: widths for key, widths in saved.items() if key in instrumentation}
        instrumentation.change_widths({**instrumentation.original_widths, **known})


def _gradient_states(instrumentation: Instrumentation) -> dict[str, tuple[bool, bool]]:
    """Return which gradients are not treated as their site says.

    Returns:
        Whether each is rounded, and whether its range stays, by name.
    """
    return {
        node.name: (node.active, node.frozen)
        for site in instrumentation.sites
        for node in site.gradient_quantizers()
        if not node.active or node.frozen != ("gradients" in site.frozen)
    }
