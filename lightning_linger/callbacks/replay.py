"""Repeating the forwards of a validation batch in other number systems."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_linger.callbacks._compat import Callback
from lightning_linger.callbacks.dashboard import Dashboard, Findings
from lightning_linger.callbacks.logging import log_values
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import instrumentation_of, is_prepared
from lightning_linger.simulate.divergence import Forward, measured_sites
from lightning_linger.simulate.metrics import OutputError, OutputRow


class ReplayCallback(Callback, ABC):
    """Notes the outermost module calls of some validation batches, and measures them repeated.

    What is repeated are the calls the user's own step made, with their inputs: no second
    ``validation_step``, no second log.

    The last of these callbacks in a Trainer shows what all of them found.

    Args:
        batches: How many validation batches of an epoch are repeated.
        every_n_epochs: Only in every n-th epoch.
        class_dim: Dimension of the model's output over which a decision takes the largest value.

    Attributes:
        latest: A row per site of the latest validation.
        latest_output: The same of the model's output, None if it returned nothing comparable.
    """

    # What the names of logged aggregates begin with.
    group: str

    def __init__(self, batches: int, every_n_epochs: int, class_dim: int) -> None:
        super().__init__()
        for name, value in (("batches", batches), ("every_n_epochs", every_n_epochs)):
            if not isinstance(value, int) or value < 1:
                msg = f"`{name}` must be a positive integer. Found: {value!r}."
                raise ConfigError(msg)
        self.batches = batches
        self.every_n_epochs = every_n_epochs
        self.class_dim = class_dim
        self.latest: list[Any] = []
        self.latest_output: OutputRow | None = None
        self._measured = False
        self._meter: Any = None
        self._outputs = OutputError(class_dim)
        self._dashboard: Dashboard | None = None

    @abstractmethod
    def make_meter(self, sites: Sequence[str]) -> Any:
        """Return the metric of the batches of an epoch, which gives ``rows()``."""

    @abstractmethod
    def replay(self, trainer: Any, module: Any, forward: Forward) -> None:
        """Measure the repeated forward, which returns what the model returns."""

    @abstractmethod
    def site_values(self, row: Any) -> dict[str, float]:
        """Return what is logged of a site, by name."""

    @abstractmethod
    def aggregates(self) -> dict[str, float]:
        """Return what is logged of the whole model, by name."""

    @abstractmethod
    def contribute(self, findings: Findings) -> None:
        """Add what this validation found."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the dashboard."""
        if _replaying(trainer)[-1] is not self or trainer.fast_dev_run:
            return
        # The folder is broadcast: every rank has to ask for it.
        folder = trainer.log_dir if trainer.loggers else None
        if trainer.is_global_zero and is_prepared(pl_module):
            resumed = bool(trainer.ckpt_path) or trainer.current_epoch > 0
            where = run_folder(trainer.loggers[0], folder) if folder is not None else None
            self._dashboard = Dashboard(trainer, pl_module, where, resumed)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Note which stages are on, and with which widths."""
        if self._dashboard is not None:
            self._dashboard.note_switches(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the validation before."""
        self._measured = False

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start counting."""
        if self._wanted(trainer, pl_module, batch_idx=0):
            self.begin(pl_module)

    def begin(self, module: Any) -> None:
        """Start with nothing counted; called on every rank, whatever data it has."""
        self._meter = self.make_meter(measured_sites(module)).to(module.device)
        self._outputs = OutputError(self.class_dim).to(module.device)

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

        def forward() -> Any:
            results = [call() for call in calls or ()]
            return results[-1] if results else None

        try:
            if self._meter is not None:
                self.replay(trainer, pl_module, forward)
        finally:
            # Another replaying callback may want the same calls.
            instrumentation.calls = calls

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Reduce over ranks and log."""
        if self._meter is None:
            return
        self.latest = self._meter.rows()
        self.latest_output = self._outputs.row()
        self._meter = None
        if not self.latest:
            return
        self._measured = True
        values: dict[str, float] = {}
        for row in self.latest:
            for name, value in self.site_values(row).items():
                values[f"{name}/{row.site}"] = value
        log_values(trainer, values)
        for name, value in self.aggregates().items():
            log_aggregate(pl_module, f"{self.group}/{name}", value)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop noting, and show what was found."""
        if is_prepared(pl_module):
            instrumentation_of(pl_module).calls = None
        if self._dashboard is not None and not trainer.sanity_checking:
            findings = Findings()
            for callback in _replaying(trainer):
                callback.contribute(findings)
            self._dashboard.show_epoch(trainer, pl_module, findings)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Show the end of the run."""
        if self._dashboard is not None:
            self._dashboard.close(trainer)
            self._dashboard = None

    def _wanted(self, trainer: Any, module: Any, batch_idx: int) -> bool:
        return (
            is_prepared(module)
            and instrumentation_of(module).switches.quantize
            and not trainer.sanity_checking
            and batch_idx < self.batches
            and trainer.current_epoch % self.every_n_epochs == 0
        )


def _replaying(trainer: Any) -> list[ReplayCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, ReplayCallback)]


def dashboard_of(trainer: Any) -> Dashboard | None:
    """Return the dashboard of a run; ranks other than zero, and trial runs, have none."""
    callbacks = _replaying(trainer)
    return callbacks[-1]._dashboard if callbacks else None


def run_folder(logger: Any, folder: str) -> Path:
    """Return the folder of one run; some loggers only name one that all their runs share."""
    if getattr(logger, "log_dir", None) is not None:
        return Path(folder)
    parts = (str(part) for part in (logger.name, logger.version) if part not in (None, ""))
    return Path(folder).joinpath(*parts)


def log_aggregate(module: Any, name: str, value: float) -> None:
    """Log a value that is the same on every rank, so that every rank may monitor it."""
    module.log(name, value, sync_dist=True, reduce_fx="max")
