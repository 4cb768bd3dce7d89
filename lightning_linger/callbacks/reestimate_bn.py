"""Batch norm statistics estimated anew, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_linger.callbacks.algorithm import AlgorithmCallback
from lightning_linger.stages.forwards import Forward
from lightning_linger.stages.reestimate_bn import reestimate_bn_by


class ReestimateBNCallback(AlgorithmCallback):
    """Replaces the running statistics of batch norms by the mean of those of some batches.

    Args:
        at_epoch: At the start of this epoch; None, without ``at_step``, at the end of ``fit``.
        at_step: Before this optimizer step, instead.
        batches: How many training batches.
        keep_codes: Keep variances with which folded weights would be rounded to other codes.
        modules: Globs on dotted paths of batch norms; None takes all that keep statistics.
    """

    name = "reestimate_bn"
    order = 1

    def __init__(
        self,
        at_epoch: int | None = None,
        at_step: int | None = None,
        batches: int = 32,
        keep_codes: bool = True,
        modules: Sequence[str] | None = None,
    ) -> None:
        super().__init__(at_epoch, at_step, batches)
        self.keep_codes = keep_codes
        self.modules = modules

    def apply(self, trainer: Any, module: Any, forwards: Sequence[Forward]) -> None:
        """Estimate."""
        reestimate_bn_by(module, forwards, self.modules, self.keep_codes)
