"""The layers of a model that have a width of their own."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import WIDEST_OPERAND
from lightning_linger.core.widths import NAMES, Widths
from lightning_linger.stages.selection import sites_within


@dataclass(frozen=True)
class Unit:
    """Calls that have their widths together.

    Args:
        name: A pattern of ``overrides`` that matches them and nothing else.
        sites: Their site keys.
    """

    name: str
    sites: tuple[str, ...]


def units_of(instrumentation: Instrumentation, part: str) -> list[Unit]:
    """Return the layers of a planned model that have weights, or codes, of their own."""
    sites: dict[str, list[str]] = {}
    for site in instrumentation.sites:
        if is_measured(site, part):
            sites.setdefault(_unit_name(site, instrumentation), []).append(site.key)
    return [Unit(name, tuple(keys)) for name, keys in sites.items()]


def measured_layers(
    model: nn.Module, part: str, modules: Sequence[str] | None = None
) -> list[Unit]:
    """Return the layers of a planned model that are measured.

    Args:
        model: The model.
        part: What of them.
        modules: Globs on dotted paths; None takes all.

    Raises:
        ConfigError: If a glob matches nothing.
        UnsupportedError: If there is no such layer.
    """
    instrumentation = instrumentation_of(model)
    within = {site.key for site in sites_within(model, modules)}
    chosen = [unit for unit in units_of(instrumentation, part) if within & set(unit.sites)]
    if not chosen:
        msg = (
            f"{type(model).__name__} has no layer to measure for part={part!r}"
            + (f" and modules={list(modules)}" if modules is not None else "")
            + ". `print(linger.summary(model))` shows what is quantized."
        )
        raise UnsupportedError(msg)
    return chosen


def is_measured(site: Site, part: str) -> bool:
    """Whether a site has something of that part whose width can be chosen."""
    if not site.quantized or site.merged or site.completes_fold:
        return False
    if site.has_parameters:
        return True
    return part != "weights" and (site.output is not None or bool(site.inputs))


def _unit_name(site: Site, instrumentation: Instrumentation) -> str:
    path, owner = site.node.owner, site.__dict__["owner"]
    makes = {
        (other.node.op, other.key.rpartition("/")[2])
        for other in instrumentation.sites
        if other.node.owner == path and other.quantized
    }
    alone = path and len(makes) == 1 and next(owner.children(), None) is None
    return glob.escape(path if alone else site.key)


def widths_for(part: str, bits: int, widths: Widths) -> Widths:
    """Return widths of a layer of which a part has another; a float result stays float."""
    changed = dict.fromkeys(_NAMES[part], bits)
    if widths.output_bits is None or widths.output_bits > WIDEST_OPERAND:
        changed.pop("output_bits", None)
    return dataclasses.replace(widths, **changed)


_NAMES: dict[str, tuple[str, ...]] = {
    "weights": ("weight_bits",),
    "activations": ("activation_bits", "output_bits"),
    "both": NAMES,
}
