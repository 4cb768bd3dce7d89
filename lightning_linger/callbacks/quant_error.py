"""Per-layer quantization error, for the dashboard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_linger.callbacks.dashboard import Findings
from lightning_linger.callbacks.replay import ReplayCallback
from lightning_linger.core.errors import ConfigError
from lightning_linger.simulate.divergence import Forward, measure_quant_error
from lightning_linger.simulate.metrics import QuantError, QuantErrorRow
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

    group = "quant_error"

    def __init__(
        self, batches: int = 1, every_n_epochs: int = 1, worst: int = 6, class_dim: int = 1
    ) -> None:
        super().__init__(batches, every_n_epochs, class_dim)
        if not isinstance(worst, int) or worst < 1:
            msg = f"`worst` must be a positive integer. Found: {worst!r}."
            raise ConfigError(msg)
        self.worst = worst
        self.latest: list[QuantErrorRow] = []
        self._samples = ValueSamples()

    def make_meter(self, sites: Sequence[str]) -> QuantError:
        """Add up the errors of each site."""
        return QuantError(sites)

    def begin(self, module: Any) -> None:
        """Start with nothing counted and no sample."""
        super().begin(module)
        self._samples = ValueSamples()

    def replay(self, trainer: Any, module: Any, forward: Forward) -> None:
        """Compare fake-quant with float."""
        measure_quant_error(module, forward, self._meter, self._outputs, self._samples)

    def site_values(self, row: QuantErrorRow) -> dict[str, float]:
        """Return the errors, and what the range does to the values."""
        return {
            "sqnr": row.sqnr,
            "sqnr_isolated": row.isolated_sqnr,
            "cosine": row.cosine,
            "saturation": row.saturation,
            "exponent": row.exponent,
        }

    def aggregates(self) -> dict[str, float]:
        """Return the worst sites, and the errors of the model's output."""
        found = {
            "worst_sqnr": min(row.sqnr for row in self.latest),
            "worst_saturation": max(row.saturation for row in self.latest),
        }
        if self.latest_output is not None:
            found["output_sqnr"] = self.latest_output.sqnr
            if self.latest_output.decisions:
                found["decisions_changed"] = self.latest_output.changed
        return found

    def contribute(self, findings: Findings) -> None:
        """Add the errors of this validation."""
        findings.worst = self.worst
        if self._measured:
            findings.fake = self.latest
            findings.fake_output = self.latest_output
            findings.samples = self._samples
