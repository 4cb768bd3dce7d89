"""Bias correction, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_linger.callbacks.algorithm import AlgorithmCallback
from lightning_linger.stages.correct_bias import correct_bias_by
from lightning_linger.stages.forwards import Forward


class BiasCorrectionCallback(AlgorithmCallback):
    """Moves biases so that layers of the quantized model have the means of the float model.

    Args:
        at_epoch: At the start of this epoch; None, without ``at_step``, at the end of ``fit``,
            behind `CalibrateCallback`.
        at_step: Before this optimizer step, instead.
        batches: How many training batches the means are taken over.
        modules: Globs on dotted paths; None takes the whole model.
    """

    name = "correct_bias"
    order = 2

    def __init__(
        self,
        at_epoch: int | None = None,
        at_step: int | None = None,
        batches: int = 32,
        modules: Sequence[str] | None = None,
    ) -> None:
        super().__init__(at_epoch, at_step, batches)
        self.modules = modules

    def apply(self, trainer: Any, module: Any, forwards: Sequence[Forward]) -> None:
        """Correct."""
        correct_bias_by(module, forwards, self.modules)
