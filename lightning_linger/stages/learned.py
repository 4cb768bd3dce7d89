"""Learned ranges of a model, for the optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_linger.core.instrumentation import STATE_NAME
from lightning_linger.core.ranges import LearnedScale


def learned_ranges(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of learned ranges, by the name they have in the model.

    A model that is not prepared, or learns no range, has none.
    """
    own = getattr(model, STATE_NAME, None)
    if own is None:
        return {}
    return {
        f"{STATE_NAME}.{path}.{name}": parameter
        for path, module in own.named_modules()
        if isinstance(module, LearnedScale)
        for name, parameter in module.named_parameters()
    }


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return all parameters of a model for an optimizer, learned ranges without weight decay.

    For example ``torch.optim.AdamW(linger.parameter_groups(self), lr=1e-3)``.
    """
    learned = list(learned_ranges(model).values())
    taken = {id(parameter) for parameter in learned}
    others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    groups: list[dict[str, Any]] = [{"params": others}]
    return [*groups, {"params": learned, "weight_decay": 0.0}] if learned else groups
