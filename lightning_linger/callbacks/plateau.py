"""The step of ``ReduceLROnPlateau`` that a checkpoint comes too early for."""

from __future__ import annotations

from typing import Any


def pending_plateau_steps(trainer: Any) -> dict[int, float]:
    """Return the values that plateau schedulers are about to be stepped with at this epoch's end.

    Lightning saves checkpoints before it steps schedulers that monitor a metric, does not save the
    metric, and leaves the step out when the run is resumed.

    Returns:
        Monitored value by index of the scheduler in ``trainer.lr_scheduler_configs``.
    """
    if not trainer.lightning_module.automatic_optimization:
        return {}
    metrics = trainer.callback_metrics
    return {
        index: float(metrics[config.monitor])
        for index, config in enumerate(trainer.lr_scheduler_configs)
        if config.reduce_on_plateau
        and config.interval == "epoch"
        and (trainer.current_epoch + 1) % config.frequency == 0
        and config.monitor in metrics
    }


def replay_plateau_steps(trainer: Any, pending: dict[int, float]) -> None:
    """Take the steps that the interrupted run would have taken next."""
    for index, value in pending.items():
        scheduler = trainer.lr_scheduler_configs[index].scheduler
        trainer.lightning_module.lr_scheduler_step(scheduler, value)
