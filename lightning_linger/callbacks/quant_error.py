"""Per-layer quantization error, for the dashboard."""

from __future__ import annotations

from typing import Any

from lightning_linger.callbacks.logging import log_values
from lightning_linger.callbacks.replay import ReplayCallback, log_aggregate
from lightning_linger.simulate.divergence import Forward, measure_quant_error, measured_sites
from lightning_linger.simulate.metrics import QuantError, QuantErrorRow


class QuantErrorCallback(ReplayCallback):
    """Logs SQNR, cosine, saturation and step exponent of every site against the float forward.

    Logged aggregates, which a checkpoint may monitor: ``quant_error/worst_sqnr`` (dB) and
    ``quant_error/worst_saturation`` (share of codes).

    Args:
        batches: How many validation batches of an epoch are compared.
        every_n_epochs: Only in every n-th epoch.
    """

    def __init__(self, batches: int = 1, every_n_epochs: int = 1) -> None:
        super().__init__(batches, every_n_epochs)
        self.latest: list[QuantErrorRow] = []
        self._meter: QuantError | None = None

    def begin(self, module: Any) -> None:
        """Start with nothing counted."""
        self._meter = QuantError(measured_sites(module)).to(module.device)

    def replay(self, trainer: Any, module: Any, forward: Forward) -> None:
        """Compare fake-quant with float."""
        if self._meter is not None:
            measure_quant_error(module, forward, self._meter)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Reduce over ranks and log."""
        if self._meter is None:
            return
        self.latest = self._meter.rows()
        self._meter = None
        if not self.latest:
            return
        values: dict[str, float] = {}
        for row in self.latest:
            values[f"sqnr/{row.site}"] = row.sqnr
            values[f"cosine/{row.site}"] = row.cosine
            values[f"saturation/{row.site}"] = row.saturation
            values[f"exponent/{row.site}"] = row.exponent
        log_values(trainer, values)
        worst = min(row.sqnr for row in self.latest)
        log_aggregate(pl_module, "quant_error/worst_sqnr", worst)
        saturation = max(row.saturation for row in self.latest)
        log_aggregate(pl_module, "quant_error/worst_saturation", saturation)
