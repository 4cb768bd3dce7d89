"""How well a model does without labels: its output against that of the first evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_linger.core.distributed import sum_over_ranks
from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.core.payload import real_values
from lightning_linger.simulate.divergence import Forward, main_result


def output_score(
    metric: Literal["noise", "kl"], forwards: Sequence[Forward]
) -> Callable[[], float]:
    """Return an evaluation of the model's output, without labels.

    What it returns the first time, in float, is 0, and what later ones are compared with.

    Args:
        metric: See :func:`sensitivity`.
        forwards: Run the model on a batch each, and return its output.
    """
    losses = {"noise": _noise, "kl": _divergence}
    if metric not in losses:
        msg = f"`metric` must be a function or one of {tuple(losses)}. Found: {metric!r}."
        raise ConfigError(msg)
    loss = losses[metric]
    references: list[Tensor] = []

    def score() -> float:
        outputs = [_output(forward) for forward in forwards]
        if not references:
            references.extend(outputs)
        sums = torch.stack([loss(y, r) for y, r in zip(outputs, references, strict=True)])
        total, weight = sum_over_ranks(sums.sum(0)).tolist()
        return -total / weight if weight else 0.0

    return score


def _output(forward: Forward) -> Tensor:
    result = main_result(forward())
    if result is None:
        msg = "the model returns no floating tensor to compare. Pass a function as `metric`."
        raise UnsupportedError(msg)
    return real_values(result).detach().double()


def _noise(y: Tensor, reference: Tensor) -> Tensor:
    """Return the power of the noise and that of the signal."""
    return torch.stack([(y - reference).square().sum(), reference.square().sum()])


def _divergence(y: Tensor, reference: Tensor) -> Tensor:
    """Return the sum of KL(reference, y) in nats, and the number of decisions."""
    if reference.dim() < 2:
        msg = "`metric='kl'` needs outputs with classes along dimension 1. Use 'noise'."
        raise ConfigError(msg)
    ours, right = y.log_softmax(1), reference.log_softmax(1)
    divergence = (right.exp() * (right - ours)).sum()
    return torch.stack([divergence, divergence.new_tensor(reference[:, 0].numel())])
