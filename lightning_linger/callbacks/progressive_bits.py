"""Widths that become smaller as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_linger.callbacks._compat import Callback, misconfiguration
from lightning_linger.callbacks.algorithm import algorithms_of
from lightning_linger.callbacks.calibrate import CalibrateCallback
from lightning_linger.callbacks.company import follow_in_average
from lightning_linger.callbacks.order import epoch_length
from lightning_linger.callbacks.quantize import QuantizeCallback
from lightning_linger.callbacks.schedule import require_reached
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.tags import WIDEST_OPERAND
from lightning_linger.core.widths import NAMES
from lightning_linger.stages.widths import change_model_bits, check_model_bits


class ProgressiveBitsCallback(Callback):
    """Changes the widths of a model at set epochs, e.g. from 8 over 6 to 4 bits.

    Every step of the way starts from weights that the one before has trained. Quantizers and
    learned ranges stay the same objects: ranges are kept, and steps follow from the new width. A
    layer keeps a width that an override of `QuantizeCallback` gives it, if that is not the model's
    own. Checkpoints hold the widths in force, and so does what is exported at the end.

    List it beside a `QuantizeCallback`; the schedule takes the place of its widths.

    Args:
        schedule: Widths by epoch, e.g. ``{0: 8, 4: 6, 8: 4}``: of weights, inputs and outputs, or
            by name, ``{4: {"weight_bits": 4}}``. Those that an epoch does not name stay. Before the
            first epoch the widths are those of `QuantizeCallback`.
        modules: Globs on dotted paths; None changes the whole model.
    """

    def __init__(
        self,
        schedule: dict[int, int | dict[str, int]],
        modules: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not schedule or any(type(epoch) is not int or epoch < 0 for epoch in schedule):
            msg = f"`schedule` maps epochs, from 0, to widths. Found: {schedule!r}."
            raise ConfigError(msg)
        self.schedule = {epoch: _fields(schedule[epoch]) for epoch in sorted(schedule)}
        self.modules = modules

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a run in which widths could not change, or would change in vain."""
        if stage != "fit":
            return
        found = [
            callback for callback in trainer.callbacks if isinstance(callback, QuantizeCallback)
        ]
        if not found or isinstance(found[0], CalibrateCallback):
            msg = (
                "ProgressiveBitsCallback changes the widths that a QuantizeCallback trains with. "
                "HINT: add a QuantizeCallback."
            )
            raise misconfiguration(msg)
        last, freeze = max(self.schedule), found[0].freeze_at_epoch
        if freeze is not None and freeze <= last:
            msg = (
                f"QuantizeCallback(freeze_at_epoch={freeze}) holds the ranges while "
                f"ProgressiveBitsCallback still changes widths in epoch {last}. HINT: freeze at "
                f"{last + 1} or later."
            )
            raise misconfiguration(msg)
        for algorithm in algorithms_of(trainer):
            start = algorithm.schedule.at_epoch
            if algorithm.name == "adaround" and start is not None and start < last:
                msg = (
                    f"AdaRoundCallback(at_epoch={start}) learns to round to the widths of then, "
                    f"and ProgressiveBitsCallback still changes them in epoch {last}. HINT: learn "
                    f"in epoch {last + 1} or later, or leave `at_epoch` away."
                )
                raise misconfiguration(msg)
        require_reached(trainer, last, f"Epoch {last} of ProgressiveBitsCallback")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse early what a layer could not change to in the middle of the run."""
        for fields in self.schedule.values():
            check_model_bits(pl_module, fields, self.modules)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse ranges that are held too early, now that the steps of an epoch are known."""
        quantize = next(item for item in trainer.callbacks if isinstance(item, QuantizeCallback))
        last, freeze = max(self.schedule), quantize.freeze_at_step
        if freeze is not None and freeze <= last * epoch_length(trainer):
            msg = (
                f"QuantizeCallback(freeze_at_step={freeze}) holds the ranges while "
                f"ProgressiveBitsCallback still changes widths in epoch {last}. HINT: freeze later."
            )
            raise misconfiguration(msg)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the widths of the epoch."""
        wanted: dict[str, int] = {}
        for epoch, fields in self.schedule.items():
            if epoch <= trainer.current_epoch:
                wanted |= fields
        if wanted:
            change_model_bits(pl_module, wanted, self.modules)
            follow_in_average(trainer, pl_module)


def _fields(widths: int | dict[str, int]) -> dict[str, int]:
    fields = dict(widths) if isinstance(widths, dict) else dict.fromkeys(NAMES, widths)
    unknown = [name for name in fields if name not in NAMES]
    if unknown:
        msg = f"`schedule` holds {unknown}. Widths are named {NAMES}."
        raise ConfigError(msg)
    if any(type(bits) is not int or not 2 <= bits <= WIDEST_OPERAND for bits in fields.values()):
        msg = f"`schedule` holds widths from 2 to {WIDEST_OPERAND}. Found: {widths!r}."
        raise ConfigError(msg)
    return fields
