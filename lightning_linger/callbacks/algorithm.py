"""What the callbacks share that change the parameters once, at one point of a run."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from lightning_linger.callbacks._compat import Callback, misconfiguration
from lightning_linger.callbacks.batches import training_calls
from lightning_linger.callbacks.order import check_algorithms, epoch_length
from lightning_linger.callbacks.schedule import NEVER, Schedule, require_reached
from lightning_linger.callbacks.stage import stages_of
from lightning_linger.callbacks.strategies import shards
from lightning_linger.core.errors import ConfigError, QuantizationWarning
from lightning_linger.core.instrumentation import instrumentation_of, is_prepared
from lightning_linger.stages.forwards import Forward


class AlgorithmCallback(Callback, ABC):
    """Applies an algorithm once: at an epoch, at a step, or at the end of ``fit``.

    That it was applied is part of the model's state: a run that is resumed behind that point, or a
    second ``fit``, does not apply it again.

    Args:
        at_epoch: At the start of this epoch; None, without ``at_step``, at the end of ``fit``.
        at_step: Before this optimizer step, instead.
        batches: How many training batches it looks at.
    """

    # Under this name the model remembers it.
    name: ClassVar[str]
    # Algorithms that act at the same moment act in this order.
    order: ClassVar[int]
    # Whether the quantized model has to know its ranges before; otherwise it must not.
    needs_ranges: ClassVar[bool] = True

    def __init__(self, at_epoch: int | None, at_step: int | None, batches: int) -> None:
        super().__init__()
        if not isinstance(batches, int) or batches < 1:
            msg = f"`batches` must be a positive integer. Found: {batches!r}."
            raise ConfigError(msg)
        self.schedule = Schedule(at_epoch, at_step)
        if at_epoch is None and at_step is None:
            self.schedule.at_epoch = NEVER
        self.batches = batches

    @abstractmethod
    def apply(self, trainer: Any, module: Any, forwards: Sequence[Forward]) -> None:
        """Change the parameters of the prepared module."""

    @property
    def at_end(self) -> bool:
        """Whether it acts at the end of ``fit``."""
        return self.schedule.at_epoch == NEVER

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check when it acts, and in which company."""
        if shards(trainer):
            msg = (
                f"{type(self).__name__} changes whole weights, and with {_strategy(trainer)} they "
                f"lie in pieces. HINT: call `linger.{self.name}` after `fit`, on one device."
            )
            raise misconfiguration(msg)
        if stage == "fit":
            check_algorithms(trainer.callbacks, stages_of(trainer), algorithms_of(trainer))
            if not self._was_applied(pl_module):
                epoch = self.schedule.at_epoch
                require_reached(trainer, epoch, f"{type(self).__name__}(at_epoch={epoch})")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse early what could not be done late."""
        if not pl_module.automatic_optimization:
            msg = (
                f"{type(self).__name__} runs `training_step` on batches, which with manual "
                f"optimization would train the model. HINT: call `linger.{self.name}` after `fit`."
            )
            raise misconfiguration(msg)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check again, now that the steps of an epoch are known."""
        if not trainer.fast_dev_run:
            steps = epoch_length(trainer)
            callbacks, stages = trainer.callbacks, stages_of(trainer)
            check_algorithms(callbacks, stages, algorithms_of(trainer), steps)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Act at an epoch."""
        if trainer.fast_dev_run:
            due = not self.needs_ranges
        else:
            due = self.schedule.at_step is None and self.schedule.is_on(trainer, pl_module, False)
        if due:
            self._act(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act at a step."""
        at_step = self.schedule.at_step
        if at_step is not None and not trainer.fast_dev_run and trainer.global_step >= at_step:
            self._act(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Act at the end."""
        if self.at_end or trainer.fast_dev_run:
            self._act(trainer, pl_module)

    def _was_applied(self, module: Any) -> bool:
        return is_prepared(module) and self.name in instrumentation_of(module).applied

    def _act(self, trainer: Any, module: Any) -> None:
        if self._was_applied(module):
            return
        instrumentation = instrumentation_of(module)
        if self.needs_ranges and not instrumentation.switches.quantize:
            warnings.warn(
                f"{type(self).__name__} did nothing: quantization has not started.",
                QuantizationWarning,
                stacklevel=2,
            )
            return
        calls = training_calls(trainer, module, self.batches) if self.needs_ranges else []
        self.apply(trainer, module, calls)


def _strategy(trainer: Any) -> str:
    return type(trainer.strategy).__name__


def algorithms_of(trainer: Any) -> list[AlgorithmCallback]:
    """Return the callbacks of a trainer that change parameters once, in their order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, AlgorithmCallback)]
