"""Ranges that stay: every scale fixed from now on, while weights go on training."""

from __future__ import annotations

from torch import nn

from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.stages.learned import learned_ranges


def freeze_ranges(model: nn.Module, frozen: bool = True) -> nn.Module:
    """Keep every range of a prepared model, or let all move again. Returns the model.

    Ranges of activations and gradients stay where they are, learned ranges have no gradient any
    more, and weights keep the steps they have in the next forward. A checkpoint holds all of it.
    Where a range was never seen, the site goes on in float.

    Args:
        model: A prepared model.
        frozen: Whether ranges stay.
    """
    instrumentation = instrumentation_of(model)
    instrumentation.freeze(frozen)
    for parameter in learned_ranges(model).values():
        parameter.grad = None
    return model
