"""Per-layer quantization error, for the dashboard."""

from __future__ import annotations

from typing import Any

from lightning_linger.callbacks.dashboard import Findings
from lightning_linger.callbacks.logging import log_values
from lightning_linger.callbacks.replay import ReplayCallback, log_aggregate
from lightning_linger.core.errors import ConfigError
from lightning_linger.simulate.divergence import Forward, measure_quant_error, measured_sites
from lightning_linger.simulate.metrics import OutputError, OutputRow, QuantError, QuantErrorRow
from lightning_linger.simulate.samples import ValueSamples


class QuantErrorCallback(ReplayCallback):
    """Logs SQNR, cosine, saturation and step exponent of every site against the float forward.

    SQNR is logged accumulated, through the whole chain, and isolated, of the site alone.
    TensorBoard also gets a page of charts, heat maps, histograms of the worst sites, and advice;
    the run's folder gets ``linger.jsonl``, which ``lightning-linger report`` reads.

    Logged aggregates, which a checkpoint may monitor: ``quant_error/worst_sqnr`` (dB),
    ``quant_error/worst_saturation`` (share of values), and of the model's output
    ``quant_error/output_sqnr`` (dB) and ``quant_error/decisions_changed`` (share of decisions).

    Args:
        batches: How many validation batches of an epoch are compared.
        every_n_epochs: Only in every n-th epoch.
        worst: How many sites histograms and advice show.
        class_dim: Dimension of the model's output over which a decision takes the largest value.
    """

    def __init__(
        self, batches: int = 1, every_n_epochs: int = 1, worst: int = 6, class_dim: int = 1
    ) -> None:
        super().__init__(batches, every_n_epochs, class_dim)
        if not isinstance(worst, int) or worst < 1:
            msg = f"`worst` must be a positive integer. Found: {worst!r}."
            raise ConfigError(msg)
        self.worst = worst
        self.latest: list[QuantErrorRow] = []
        self.latest_output: OutputRow | None = None
        self._measured = False
        self._meter: QuantError | None = None
        self._outputs = OutputError(class_dim)
        self._samples = ValueSamples()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the samples of the validation before."""
        self._measured = False

    def begin(self, module: Any) -> None:
        """Start with nothing counted."""
        self._meter = QuantError(measured_sites(module)).to(module.device)
        self._outputs = OutputError(self.class_dim).to(module.device)
        self._samples = ValueSamples()

    def replay(self, trainer: Any, module: Any, forward: Forward) -> None:
        """Compare fake-quant with float."""
        if self._meter is not None:
            measure_quant_error(module, forward, self._meter, self._outputs, self._samples)

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
            values[f"sqnr/{row.site}"] = row.sqnr
            values[f"sqnr_isolated/{row.site}"] = row.isolated_sqnr
            values[f"cosine/{row.site}"] = row.cosine
            values[f"saturation/{row.site}"] = row.saturation
            values[f"exponent/{row.site}"] = row.exponent
        log_values(trainer, values)
        aggregates = {
            "worst_sqnr": min(row.sqnr for row in self.latest),
            "worst_saturation": max(row.saturation for row in self.latest),
        }
        if self.latest_output is not None:
            aggregates["output_sqnr"] = self.latest_output.sqnr
            if self.latest_output.decisions:
                aggregates["decisions_changed"] = self.latest_output.changed
        for name, value in aggregates.items():
            log_aggregate(pl_module, f"quant_error/{name}", value)

    def contribute(self, findings: Findings) -> None:
        """Add the errors of this validation."""
        findings.worst = self.worst
        if self._measured:
            findings.fake = self.latest
            findings.fake_output = self.latest_output
            findings.samples = self._samples
