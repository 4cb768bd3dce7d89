"""Conditions on which a stage may start, for ``when=``."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning_linger.callbacks._compat import misconfiguration
from lightning_linger.core.errors import ConfigError


class OnPlateau:
    """Holds once a metric has not improved for some epochs: training has come to rest.

    The count is saved in checkpoints.

    Args:
        monitor: A logged metric.
        patience: Epochs without improvement.
        mode: ``min`` if smaller is better, else ``max``.
        min_delta: Smaller changes are no improvement.
    """

    def __init__(
        self,
        monitor: str,
        patience: int = 3,
        mode: Literal["min", "max"] = "min",
        min_delta: float = 0.0,
    ) -> None:
        if not isinstance(patience, int) or patience < 1:
            msg = f"`patience` must be a positive integer. Found: {patience!r}."
            raise ConfigError(msg)
        if mode not in ("min", "max"):
            msg = f"`mode` must be 'min' or 'max'. Found: {mode!r}."
            raise ConfigError(msg)
        self.monitor = monitor
        self.patience = patience
        self.mode = mode
        self.min_delta = min_delta
        self.best = math.inf
        self.waited = 0

    def __call__(self, trainer: Any, module: Any) -> bool:
        """Look at the metric of the epoch before."""
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            if trainer.current_epoch == 0:
                return False
            msg = (
                f"OnPlateau(monitor={self.monitor!r}) finds no such metric. Logged are: "
                f"{sorted(metrics)}. HINT: log it, once per epoch, with `self.log`."
            )
            raise misconfiguration(msg)
        value = float(metrics[self.monitor]) * (1 if self.mode == "min" else -1)
        if value < self.best - self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return what has been seen."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.waited = state["best"], state["waited"]
