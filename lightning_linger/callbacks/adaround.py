"""Learned rounding, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_linger.callbacks.algorithm import AlgorithmCallback
from lightning_linger.stages.adaround import AdaRoundConfig, adaround_by
from lightning_linger.stages.forwards import Forward


class AdaRoundCallback(AlgorithmCallback):
    """Learns for each weight of the quantized model whether it is rounded up or down.

    The steps of the weights stay frozen afterwards.

    Args:
        at_epoch: At the start of this epoch; None, without ``at_step``, at the end of ``fit``,
            behind `CalibrateCallback`.
        at_step: Before this optimizer step, instead.
        batches: How many training batches it learns from; kept in memory.
        steps: Steps of Adam per layer.
        learning_rate: Of Adam.
        batch_size: Samples per step.
        regularization: Weight of the term that drives each weight to up or down.
        warm_start: Share of the steps without that term.
        sharpness: First and last exponent of that term.
        seed: Of the choice of samples.
        modules: Globs on dotted paths; None takes the whole model.
    """

    name = "adaround"
    order = 2

    def __init__(
        self,
        at_epoch: int | None = None,
        at_step: int | None = None,
        batches: int = 32,
        steps: int = 500,
        learning_rate: float = 3e-2,
        batch_size: int = 32,
        regularization: float = 1.0,
        warm_start: float = 0.2,
        sharpness: tuple[float, float] = (20.0, 2.0),
        seed: int = 0,
        modules: Sequence[str] | None = None,
    ) -> None:
        super().__init__(at_epoch, at_step, batches)
        self.config = AdaRoundConfig(
            steps, learning_rate, batch_size, regularization, warm_start, sharpness, seed
        )
        self.modules = modules

    def apply(self, trainer: Any, module: Any, forwards: Sequence[Forward]) -> None:
        """Learn."""
        adaround_by(module, forwards, self.config, self.modules)
