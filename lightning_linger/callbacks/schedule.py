"""When a stage is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_linger.callbacks._compat import misconfiguration
from lightning_linger.core.errors import ConfigError

# An epoch that does not come.
NEVER = 2**62

Condition = Callable[[Any, Any], bool]


class Schedule:
    """A stage starts at an epoch, a step, or when a condition first holds, and may end again.

    Args:
        at_epoch: First epoch in which the stage is on, from 0. The default if nothing is given.
        at_step: First optimizer step (``trainer.global_step``) before which the stage switches on.
        when: Called with the trainer and the module at the start of every epoch; once it returns
            True (on rank 0) the stage is on.
        end_epoch: First epoch in which the stage is off again; None keeps it on.
    """

    def __init__(
        self,
        at_epoch: int | None = None,
        at_step: int | None = None,
        when: Condition | None = None,
        end_epoch: int | None = None,
    ) -> None:
        given = [name for name, value in self._named(at_epoch, at_step, when) if value is not None]
        if len(given) > 1:
            msg = f"give one of `at_epoch`, `at_step` and `when`. Found: {given}."
            raise ConfigError(msg)
        for name, value in (("at_epoch", at_epoch), ("at_step", at_step), ("end_epoch", end_epoch)):
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 0
            ):
                msg = f"`{name}` must be a non-negative integer. Found: {value!r}."
                raise ConfigError(msg)
        self.at_epoch = 0 if not given else at_epoch
        self.at_step = at_step
        self.when = when
        self.end_epoch = end_epoch
        if end_epoch is not None and self.at_epoch is not None and end_epoch <= self.at_epoch:
            msg = (
                f"`end_epoch` ({end_epoch}) must come after `at_epoch` ({self.at_epoch}): the "
                "stage would never be on."
            )
            raise ConfigError(msg)

    @staticmethod
    def _named(
        at_epoch: int | None, at_step: int | None, when: Condition | None
    ) -> tuple[tuple[str, Any], ...]:
        return ("at_epoch", at_epoch), ("at_step", at_step), ("when", when)

    def is_on(self, trainer: Any, module: Any, on: bool) -> bool:
        """Return whether the stage should be on now, given whether it is."""
        if trainer.fast_dev_run:
            return True
        if self.end_epoch is not None and trainer.current_epoch >= self.end_epoch:
            return False
        if self.at_epoch is not None:
            return bool(trainer.current_epoch >= self.at_epoch)
        if on:
            return True
        if self.at_step is not None:
            return bool(trainer.global_step >= self.at_step)
        if self.when is None:
            return False
        # The values a condition looks at may differ between ranks.
        return bool(trainer.strategy.broadcast(bool(self.when(trainer, module))))

    def __str__(self) -> str:
        """Describe the start."""
        if self.at_epoch is not None:
            return f"at_epoch={self.at_epoch}"
        return f"at_step={self.at_step}" if self.at_step is not None else "when=..."


def require_reached(trainer: Any, epoch: int | None, what: str) -> None:
    """Refuse an epoch that the run does not have.

    Args:
        trainer: In ``setup``.
        epoch: The last epoch in which something is to happen; None, and `NEVER`, are not checked.
        what: What would not happen, e.g. ``ONNXExportCallback(at_epoch=9)``.

    Raises:
        MisconfigurationException: If the run ends before.
    """
    last = trainer.max_epochs
    if epoch is None or epoch == NEVER or last is None or trainer.fast_dev_run:
        return
    if 0 <= last <= epoch:
        msg = (
            f"{what} never acts with max_epochs={last}. HINT: epochs count from 0, the last one is "
            f"{last - 1}."
        )
        raise misconfiguration(msg)
