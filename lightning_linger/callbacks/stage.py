"""What the stage callbacks share: one set-up for all of them, and a schedule each."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from lightning_linger.callbacks._compat import Callback, misconfiguration
from lightning_linger.callbacks.company import check_company, follow_in_average
from lightning_linger.callbacks.discovery import prepare_module
from lightning_linger.callbacks.order import (
    check_order,
    check_order_in_steps,
    epoch_length,
    ordered,
)
from lightning_linger.callbacks.schedule import NEVER, Condition, Schedule
from lightning_linger.callbacks.strategies import (
    refuse_unsupported_shards,
    refuse_unsupported_strategy,
    shards,
    share_statistics,
)
from lightning_linger.core.errors import QuantizationWarning
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.recipe import changes, plain_data
from lightning_linger.stages.prepare import prepare_from, strip

# Keys of a checkpoint.
CONDITIONS = "linger_conditions"
SHARDED_STATE = "linger_state"


class StageCallback(Callback, ABC):
    """Plans its stage when the run is set up and switches it by a schedule.

    Sites, quantizers and limits are all created in ``setup``, before optimizers exist; a switch in
    the middle of the run adds and removes nothing.
    """

    # What the stage's plan is called.
    stage: ClassVar[str]
    # Stages build on each other in this order.
    order: ClassVar[int]
    # Whether a later stage has to end when this one does.
    needed_by_later: ClassVar[bool] = False

    def __init__(
        self,
        at_epoch: int | None,
        at_step: int | None,
        when: Condition | None,
        end_epoch: int | None,
        allow_changes: bool,
    ) -> None:
        super().__init__()
        self.allow_changes = allow_changes
        self.schedule = Schedule(at_epoch, at_step, when, end_epoch)
        self._metrics: dict[str, float] = {}

    @abstractmethod
    def plan(self, module: Any) -> None:
        """Attach the stage to the prepared module without switching it on."""

    @abstractmethod
    def is_on(self, module: Any) -> bool:
        """Return whether the stage is on."""

    @abstractmethod
    def switch(self, module: Any, on: bool) -> None:
        """Switch the stage."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what the plan depends on, to recognise a module that is planned already."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the sites and plan every stage of the trainer, once."""
        if self._leads(trainer):
            plan_stages(trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the order again, now that the steps of an epoch are known; go on where it was."""
        if self._leads(trainer) and not pl_module.training:
            # Lightning trains a model in the mode that it finds.
            warnings.warn(
                f"{type(pl_module).__name__} is in evaluation mode: no range will move, and what "
                "has none stays float. Call `model.train()` before `fit`.",
                QuantizationWarning,
                stacklevel=2,
            )
        if not trainer.fast_dev_run:
            check_order_in_steps(ordered(stages_of(trainer)), epoch_length(trainer))
        # Lightning saves no metrics, and a condition looks at those of the epoch before.
        for name, value in self._metrics.items():
            trainer.callback_metrics.setdefault(name, torch.tensor(value))
        self._metrics = {}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Switch by epoch or condition."""
        self._follow_schedule(trainer, pl_module)
        _show_stages(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Switch by step."""
        self._share_statistics(trainer, pl_module)
        if self.schedule.at_step is not None:
            self._follow_schedule(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep ranges still, even for a user who validates in training mode."""
        self._share_statistics(trainer, pl_module)
        instrumentation_of(pl_module).switches.observing = False

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Let training move the ranges again."""
        instrumentation_of(pl_module).switches.observing = True

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Test the same model on all processes."""
        self._share_statistics(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Predict with the same model on all processes."""
        self._share_statistics(trainer, pl_module)

    def _leads(self, trainer: Any) -> bool:
        """Whether this callback does what is done once for all stages."""
        return stages_of(trainer)[0] is self

    def _share_statistics(self, trainer: Any, module: Any) -> None:
        if self._leads(trainer) and shards(trainer):
            share_statistics(module)

    def _follow_schedule(self, trainer: Any, module: Any) -> None:
        on = self.is_on(module)
        if self.schedule.when is not None and not on and not self._may_start(trainer, module):
            return
        wanted = self.schedule.is_on(trainer, module, on)
        if wanted != on:
            self.switch(module, wanted)
            follow_in_average(trainer, module)
            _show_stages(trainer, module)

    def _may_start(self, trainer: Any, module: Any) -> bool:
        """Whether all stages are on that this one builds on."""
        before = [callback for callback in stages_of(trainer) if callback.order < self.order]
        return trainer.fast_dev_run or all(callback.is_on(module) for callback in before)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save what a condition remembers, and the metrics that it will look at next."""
        condition: Any = self.schedule.when
        if condition is not None:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            state = condition.state_dict() if hasattr(condition, "state_dict") else {}
            saved = {"metrics": metrics, "state": state}
            checkpoint.setdefault(CONDITIONS, {})[self.stage] = saved
        if self._leads(trainer) and shards(trainer):
            # The strategy loads tensor by tensor: what is on, and what came later, would be lost.
            checkpoint[SHARDED_STATE] = dict(instrumentation_of(pl_module).state_dict())

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Give it back."""
        if self._leads(trainer) and SHARDED_STATE in checkpoint:
            instrumentation_of(pl_module).load_state_dict(checkpoint[SHARDED_STATE])
        saved = checkpoint.get(CONDITIONS, {}).get(self.stage)
        if saved is not None and self.schedule.when is not None:
            self._metrics = saved["metrics"]
            condition: Any = self.schedule.when
            if hasattr(condition, "load_state_dict"):
                condition.load_state_dict(saved["state"])


def stages_of(trainer: Any) -> list[StageCallback]:
    """Return the callbacks of a trainer that are stages."""
    return [callback for callback in trainer.callbacks if isinstance(callback, StageCallback)]


def _show_stages(trainer: Any, module: Any) -> None:
    """Show in the postfix of the progress bar which stages are on."""
    if trainer.progress_bar_callback is None:
        return
    stages = sorted(stages_of(trainer), key=lambda item: item.order)
    on = "+".join(callback.stage for callback in stages if callback.is_on(module))
    trainer.progress_bar_metrics["stage"] = on or "float"


def plan_stages(trainer: Any, module: Any, stage: str) -> None:
    """Find the sites and plan every stage of the trainer; a second time changes nothing."""
    stages = stages_of(trainer)
    refuse_unsupported_strategy(trainer, module)
    in_order = ordered(stages)
    check_order(in_order)
    starts = [callback.schedule.at_epoch or 0 for callback in stages]
    check_company(trainer, stages[0], max(e for e in (0, *starts) if e < NEVER))
    make_layers(module)
    prepare_module(trainer, module, stage)
    _plan(module, in_order)
    if shards(trainer):
        refuse_unsupported_shards(module)
    instrumentation_of(module).sharded = shards(trainer)


def _plan(module: Any, stages: list[StageCallback]) -> None:
    """Plan the stages; a module that was planned before keeps its ranges, unless it differs."""
    instrumentation = instrumentation_of(module)
    allowed = any(callback.allow_changes for callback in stages)
    instrumentation.accepts_changes = allowed
    plans = {callback.stage: plain_data(callback.describe()) for callback in stages}
    before = instrumentation.plans
    if before == plans:
        return
    changed = changes(before, plans)
    if changed and not allowed:
        msg = (
            f"The model was prepared with other arguments before: {'; '.join(changed)}. HINT: keep "
            "the arguments; pass `allow_changes=True` to go on with other ones; or call "
            "`linger.strip(model)` to start over."
        )
        raise misconfiguration(msg)
    if before:
        module = _prepared_again(module)
    for callback in stages:
        callback.plan(module)
    if before:
        _take_state(module, instrumentation.state_dict())
        instrumentation_of(module).accepts_changes = allowed


def _prepared_again(module: Any) -> Any:
    """Replace the instrumentation by a new one of the same dataflow."""
    before = instrumentation_of(module)
    prepare_from(strip(module), before.graph)
    instrumentation_of(module).example = before.example
    return module


def _take_state(module: Any, state: dict[str, Any]) -> None:
    """Load the ranges of an instrumentation that was planned otherwise."""
    instrumentation = instrumentation_of(module)
    instrumentation.accepts_changes = True
    instrumentation.load_state_dict(state)


def make_layers(module: Any) -> None:
    """Let a LightningModule make what it makes in ``configure_model``, if anything."""
    definer = next(base for base in type(module).__mro__ if "configure_model" in base.__dict__)
    if not definer.__module__.startswith(("pytorch_lightning.", "lightning.pytorch.")):
        module.configure_model()
