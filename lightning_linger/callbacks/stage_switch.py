"""What changes in the training when a stage switches on."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_linger.callbacks._compat import Callback, misconfiguration
from lightning_linger.callbacks.stage import StageCallback
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import instrumentation_of

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")

# Of schedulers: what they compute rates from.
_BASES = ("base_lrs", "max_lrs", "_last_lr")


class StageSwitchCallback(Callback):
    """Lowers the learning rate, and forgets the patience of early stopping, at a stage's start.

    A quantized model is fine-tuned, at about a tenth of the rate of the float phase, and its metric
    may first fall behind the float one without a reason to stop. A stage that is on from the first
    step on changes nothing.

    List it after the stage callbacks.

    Args:
        stage: Which stage: ``quantize``, ``normalize`` or ``fuse_bn``.
        learning_rate_factor: What the rates of all parameter groups, and those that their
            schedulers start from, are multiplied with.
        reset_patience: Whether `EarlyStopping` starts anew, without a best value.
    """

    def __init__(
        self,
        stage: Literal["fuse_bn", "normalize", "quantize"] = "quantize",
        learning_rate_factor: float = 1.0,
        reset_patience: bool = False,
    ) -> None:
        super().__init__()
        if stage not in ("fuse_bn", "normalize", "quantize"):
            msg = f"`stage` must be 'fuse_bn', 'normalize' or 'quantize'. Found: {stage!r}."
            raise ConfigError(msg)
        if not 0.0 < learning_rate_factor < math.inf:
            msg = (
                "`learning_rate_factor` must be a positive number, e.g. 0.1. Found: "
                f"{learning_rate_factor!r}."
            )
            raise ConfigError(msg)
        self.stage = stage
        self.learning_rate_factor = learning_rate_factor
        self.reset_patience = reset_patience
        self._was_on = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a run in which this callback would see a switch too late, or never."""
        if stage != "fit":
            return
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        names = [callback.stage for callback in before if isinstance(callback, StageCallback)]
        if self.stage not in names:
            msg = (
                f"StageSwitchCallback(stage={self.stage!r}) follows no callback of that stage. "
                f"Before it are: {names}. HINT: list it after the stage callbacks."
            )
            raise misconfiguration(msg)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the state a run starts, or is resumed, with."""
        self._was_on = self._is_on(pl_module)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act if the stage has just been switched on."""
        on = self._is_on(pl_module)
        if on and not self._was_on and trainer.global_step > 0:
            self._act(trainer)
        self._was_on = on

    def _is_on(self, module: Any) -> bool:
        switches = instrumentation_of(module).switches
        return bool(getattr(switches, {"fuse_bn": "fuse"}.get(self.stage, self.stage)))

    def _act(self, trainer: Any) -> None:
        if self.learning_rate_factor != 1.0:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    _scale_rates(group, self.learning_rate_factor)
            for config in trainer.lr_scheduler_configs:
                _scale_scheduler(config.scheduler, self.learning_rate_factor)
        if self.reset_patience:
            for stopping in trainer.early_stopping_callbacks:
                stopping.wait_count = 0
                worst = math.inf if stopping.mode == "min" else -math.inf
                stopping.best_score = torch.tensor(worst)


def _scale_rates(group: dict[str, Any], factor: float) -> None:
    for name in _RATES:
        if isinstance(group.get(name), Tensor):
            group[name].mul_(factor)
        elif name in group:
            group[name] = group[name] * factor


def _scale_scheduler(scheduler: Any, factor: float) -> None:
    for name in _BASES:
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
    for inner in getattr(scheduler, "_schedulers", ()):
        _scale_scheduler(inner, factor)
