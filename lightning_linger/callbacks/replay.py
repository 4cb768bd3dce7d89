"""Repeating the forwards of a validation batch in other number systems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_linger.callbacks._compat import Callback
from lightning_linger.callbacks.logging import DASHBOARD, show_layout
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import instrumentation_of, is_prepared


class ReplayCallback(Callback):  # type: ignore[misc]
    """Notes the outermost module calls of some validation batches and hands them on.

    What is repeated are the calls the user's own step made, with their inputs: no second
    ``validation_step``, no second log.

    Args:
        batches: How many validation batches of an epoch are repeated.
        every_n_epochs: Only in every n-th epoch.
    """

    def __init__(self, batches: int, every_n_epochs: int) -> None:
        super().__init__()
        for name, value in (("batches", batches), ("every_n_epochs", every_n_epochs)):
            if not isinstance(value, int) or value < 1:
                msg = f"`{name}` must be a positive integer. Found: {value!r}."
                raise ConfigError(msg)
        self.batches = batches
        self.every_n_epochs = every_n_epochs

    def begin(self, module: Any) -> None:
        """Prepare for the batches of an epoch; called on every rank, whatever data it has."""
        raise NotImplementedError

    def replay(self, trainer: Any, module: Any, forward: Callable[[], None]) -> None:
        """Use the repeated forward."""
        raise NotImplementedError

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Lay out the dashboard."""
        show_layout(trainer, DASHBOARD)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start counting."""
        if self._wanted(trainer, pl_module, batch_idx=0):
            self.begin(pl_module)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start noting calls."""
        if self._wanted(trainer, pl_module, batch_idx):
            instrumentation_of(pl_module).calls = []

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Repeat what was noted."""
        if not self._wanted(trainer, pl_module, batch_idx):
            return
        instrumentation = instrumentation_of(pl_module)
        calls, instrumentation.calls = instrumentation.calls, None

        def forward() -> None:
            for call in calls or ():
                call()

        try:
            self.replay(trainer, pl_module, forward)
        finally:
            # Another replaying callback may want the same calls.
            instrumentation.calls = calls

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop noting."""
        if is_prepared(pl_module):
            instrumentation_of(pl_module).calls = None

    def _wanted(self, trainer: Any, module: Any, batch_idx: int) -> bool:
        return (
            is_prepared(module)
            and instrumentation_of(module).switches.quantize
            and not trainer.sanity_checking
            and batch_idx < self.batches
            and trainer.current_epoch % self.every_n_epochs == 0
        )


def log_aggregate(module: Any, name: str, value: float) -> None:
    """Log a value that is the same on every rank, so that every rank may monitor it."""
    module.log(name, value, sync_dist=True, reduce_fx="max")
