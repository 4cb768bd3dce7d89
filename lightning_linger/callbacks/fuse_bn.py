"""Folding batch norms, on a schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lightning_linger.callbacks.company import follow_in_average
from lightning_linger.callbacks.schedule import Condition
from lightning_linger.callbacks.stage import StageCallback
from lightning_linger.core.config import FuseConfig, FuseMode
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.stages.fuse_bn import plan_fuse_bn, switch_fuse_bn


class FuseBNCallback(StageCallback):
    """Folds batch norms into the layers before them, in training and evaluation alike.

    Constraints and weight quantization act on the folded weights, as on the chip; gradients and
    statistics are those of the separate layers.

    Args:
        at_epoch: First epoch with folding on; 0 by default.
        at_step: First step, instead.
        when: A condition, instead.
        end_epoch: First epoch with folding off again.
        mode: ``running`` (one convolution), ``batch`` (linger's two convolutions) or ``frozen``.
        freeze_at_epoch: From this epoch on the statistics no longer move (mode ``frozen``).
        modules: Globs on dotted paths of layers to fold; None folds all.
        allow_changes: Whether to go on from a checkpoint, or a model, of a run with other
            arguments; those given here win.
    """

    stage = "fuse_bn"
    order = 0
    needed_by_later = True

    def __init__(
        self,
        at_epoch: int | None = None,
        at_step: int | None = None,
        when: Condition | None = None,
        end_epoch: int | None = None,
        mode: FuseMode = "running",
        freeze_at_epoch: int | None = None,
        modules: Sequence[str] | None = None,
        allow_changes: bool = False,
    ) -> None:
        super().__init__(at_epoch, at_step, when, end_epoch, allow_changes)
        if freeze_at_epoch is not None and freeze_at_epoch < 0:
            msg = f"`freeze_at_epoch` must be a non-negative integer. Found: {freeze_at_epoch!r}."
            raise ConfigError(msg)
        self.config = FuseConfig(mode)
        self.freeze_at_epoch = freeze_at_epoch
        self.modules = modules

    def plan(self, module: Any) -> None:
        """Find the pairs to fold."""
        plan_fuse_bn(module, self.config, self.modules)

    def is_on(self, module: Any) -> bool:
        """Return whether folding is on."""
        return instrumentation_of(module).switches.fuse

    def switch(self, module: Any, on: bool) -> None:
        """Switch folding."""
        switch_fuse_bn(module, on)

    def describe(self) -> dict[str, Any]:
        """Return what the plan depends on."""
        return {**dataclasses.asdict(self.config), "modules": self.modules}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Switch, and freeze the statistics when their epoch has come."""
        super().on_train_epoch_start(trainer, pl_module)
        if self.freeze_at_epoch is not None:
            frozen = trainer.current_epoch >= self.freeze_at_epoch
            switch_fuse_bn(
                pl_module, self.is_on(pl_module), "frozen" if frozen else self.config.mode
            )
            follow_in_average(trainer, pl_module)
