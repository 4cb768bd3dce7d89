"""How rounding is learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_linger.core.errors import ConfigError


@dataclass(frozen=True)
class AdaRoundConfig:
    """How rounding is learned.

    Args:
        steps: Steps of Adam per layer.
        learning_rate: Of Adam.
        batch_size: Samples per step, from one calibration batch each.
        regularization: Weight of the term that drives each weight to up or down, against the
            output error as a share of that of rounding to nearest.
        warm_start: Share of the steps without that term, from 0 to 1.
        sharpness: First and last exponent of that term, which is annealed (beta of eq. 24).
        seed: Of the choice of samples.
    """

    steps: int = 500
    learning_rate: float = 3e-2
    batch_size: int = 32
    regularization: float = 1.0
    warm_start: float = 0.2
    sharpness: tuple[float, float] = (20.0, 2.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                msg = f"`{name}` must be a positive integer. Found: {value!r}."
                raise ConfigError(msg)
        for name in ("learning_rate", "regularization"):
            if not getattr(self, name) > 0:
                msg = f"`{name}` must be positive. Found: {getattr(self, name)!r}."
                raise ConfigError(msg)
        if not 0 <= self.warm_start < 1:
            msg = f"`warm_start` must be at least 0 and below 1. Found: {self.warm_start!r}."
            raise ConfigError(msg)
        if len(self.sharpness) != 2 or not all(value > 0 for value in self.sharpness):
            msg = f"`sharpness` must be two positive numbers. Found: {self.sharpness!r}."
            raise ConfigError(msg)

    def exponent(self, step: int) -> float | None:
        """Return the exponent of the term at a step, None while there is no such term."""
        start = self.warm_start * self.steps
        if step < start:
            return None
        done = (step - start) / max(self.steps - start, 1)
        first, last = self.sharpness
        return last + 0.5 * (first - last) * (1 + math.cos(math.pi * done))
