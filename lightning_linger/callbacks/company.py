"""Other callbacks whose work depends on that of the stages, or spoils it."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_linger.callbacks._compat import misconfiguration
from lightning_linger.core.errors import QuantizationWarning
from lightning_linger.core.instrumentation import instrumentation_of, is_prepared
from lightning_linger.core.widths import widths_of


def check_company(trainer: Any, first_stage: Any, last_start: int) -> None:
    """Refuse or warn about callbacks that do not go together with stages.

    Args:
        trainer: Whose callbacks are checked.
        first_stage: The first stage callback in the list.
        last_start: Epoch at which the last stage starts.

    Raises:
        MisconfigurationException: With the reason and what to do.
    """
    callbacks = trainer.callbacks
    for callback in callbacks:
        if _is(callback, "WeightAveraging"):
            _check_averaging(callback, callbacks.index(callback) < callbacks.index(first_stage))
        if _is(callback, "EarlyStopping") and last_start:
            _check_stopping(trainer, last_start)


def follow_in_average(trainer: Any, module: Any) -> None:
    """Switch the stages of a running average of the model as those of the model are."""
    for callback in trainer.callbacks:
        average = getattr(getattr(callback, "_average_model", None), "module", None)
        if average is None or not is_prepared(average):
            continue
        followed, follower = instrumentation_of(module), instrumentation_of(average)
        for name in ("fuse", "fuse_mode", "normalize", "quantize", "watch"):
            setattr(follower.switches, name, getattr(followed.switches, name))
        follower.change_widths(
            {site.key: widths_of(site) for site in followed.sites if site.quantized}
        )
        for site, twin in zip(followed.sites, follower.sites, strict=True):
            twin.freeze(site.frozen)
            twin.leave_float(site.floating)


def _check_averaging(callback: Any, before_stages: bool) -> None:
    name = type(callback).__name__
    if before_stages:
        msg = (
            f"{name} copies the model before the stages are attached to it: its checkpoints would "
            f"hold a float model. HINT: list {name} after the stage callbacks."
        )
        raise misconfiguration(msg)
    if getattr(callback, "_use_buffers", False):
        msg = (
            f"{name} averages buffers, and among them ranges from before a stage has started, "
            "which are zero. HINT: pass `use_buffers=False`; ranges and statistics are then those "
            "of the model."
        )
        raise misconfiguration(msg)


def _check_stopping(trainer: Any, last_start: int) -> None:
    if (trainer.fit_loop.min_epochs or 0) <= last_start:
        warnings.warn(
            f"EarlyStopping may end the run before the last stage starts in epoch {last_start}. "
            f"Pass `min_epochs={last_start + 1}` to the Trainer, and "
            "`StageSwitchCallback(reset_patience=True)` to give the stage a patience of its own.",
            QuantizationWarning,
            stacklevel=2,
        )


def _is(callback: Any, name: str) -> bool:
    # By name: each installed namespace has a class of its own.
    return any(base.__name__ == name for base in type(callback).__mro__)
