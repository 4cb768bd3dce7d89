"""Ranges that stay: scales fixed from now on, while weights go on training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.switches import FROZEN_PARTS, FrozenPart
from lightning_linger.stages.learned import learned_ranges
from lightning_linger.stages.selection import sites_within


def freeze_ranges(
    model: nn.Module,
    frozen: bool = True,
    parts: Sequence[FrozenPart] = FROZEN_PARTS,
    modules: Sequence[str] | None = None,
) -> nn.Module:
    """Keep ranges of a prepared model as they are, or let them move again. Returns the model.

    Ranges of activations and gradients stay where they are, learned ranges have no gradient any
    more, and weights and running statistics keep the steps they have in the next forward. A
    checkpoint holds all of it. Where a range was never seen, the site goes on in float.

    Args:
        model: A prepared and planned model.
        frozen: Whether the ranges stay.
        parts: Which: those of ``activations``, ``weights``, ``statistics``, ``gradients``; all by
            default.
        modules: Globs on dotted paths; None takes the whole model.

    Raises:
        ConfigError: If a part is none, or a glob matches nothing.
    """
    unknown = [part for part in parts if part not in FROZEN_PARTS]
    if unknown or isinstance(parts, str):
        msg = f"`parts` must be among {FROZEN_PARTS}. Found: {parts!r}."
        raise ConfigError(msg)
    for site in sites_within(model, modules):
        site.freeze(site.frozen | set(parts) if frozen else site.frozen - set(parts))
        for quantizer in site.quantizers():
            quantizer.thaw()
    for parameter in learned_ranges(model).values():
        if not parameter.requires_grad:
            parameter.grad = None
    return model


def is_frozen(model: nn.Module) -> bool:
    """Whether no range of a prepared model moves any more."""
    return all(site.frozen == set(FROZEN_PARTS) for site in instrumentation_of(model).sites)
