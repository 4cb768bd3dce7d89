"""Running validation batches in integers, beside the fake-quant forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_linger.callbacks import tensorboard
from lightning_linger.callbacks.dashboard import Findings
from lightning_linger.callbacks.replay import ReplayCallback, dashboard_of
from lightning_linger.callbacks.silent_validation import (
    evaluation,
    has_one_loader,
    silent_validation,
)
from lightning_linger.core.instrumentation import instrumentation_of, is_prepared
from lightning_linger.core.logs import logger
from lightning_linger.simulate.divergence import Forward, measure_divergence
from lightning_linger.simulate.integer import integer
from lightning_linger.simulate.metrics import Divergence, DivergenceRow


class IntegerValidatorCallback(ReplayCallback):
    """Proves during training that the integer model equals the trained one.

    On some validation batches every site runs in integers, once in the real chain of integers
    (accumulated) and once on the fake-quant input (isolated); mismatching codes, and the error
    against float, go to every logger. TensorBoard and the run's folder get what
    :class:`QuantErrorCallback` gives them, without the histograms. At the end of ``fit`` the
    validation is repeated in integers, for the metric of the integer model (``metric/integer``, and
    a column of TensorBoard's *HParams*), and a table of the worst sites goes to the log at level
    ``INFO`` and to TensorBoard's page *Text*.

    Logged aggregates, which a checkpoint may monitor: ``integer/mismatches`` (codes that differ),
    ``integer/mismatch_rate``, ``integer/worst_sqnr`` (dB), and of the model's output against
    fake-quant ``integer/output_mismatch_rate`` and ``integer/decisions_changed`` (shares).

    Args:
        batches: How many validation batches of an epoch run in integers.
        every_n_epochs: Only in every n-th epoch.
        rows: How many sites the final table shows.
        class_dim: Dimension of the model's output over which a decision takes the largest value.
        final_metric: Whether to repeat the validation in integers at the end of ``fit``.
    """

    group = "integer"

    def __init__(
        self,
        batches: int = 1,
        every_n_epochs: int = 1,
        rows: int = 5,
        class_dim: int = 1,
        final_metric: bool = True,
    ) -> None:
        super().__init__(batches, every_n_epochs, class_dim)
        self.rows = rows
        self.final_metric = final_metric
        self.latest: list[DivergenceRow] = []

    def make_meter(self, sites: Sequence[str]) -> Divergence:
        """Count mismatches and errors of each site."""
        return Divergence(sites)

    def replay(self, trainer: Any, module: Any, forward: Forward) -> None:
        """Compare the number systems."""
        measure_divergence(module, forward, self._meter, self._outputs)

    def site_values(self, row: DivergenceRow) -> dict[str, float]:
        """Return mismatches and errors, accumulated and isolated."""
        return {
            "mismatch": row.mismatch_rate,
            "mismatch_isolated": row.isolated_mismatch_rate,
            "integer_sqnr": row.sqnr,
            "integer_sqnr_isolated": row.isolated_sqnr,
            "integer_max_error": row.max_error,
            "integer_max_lsb": float(row.max_lsb),
        }

    def aggregates(self) -> dict[str, float]:
        """Return the mismatches of the whole model, and what they do to its output."""
        mismatches = sum(row.mismatches for row in self.latest)
        elements = sum(row.elements for row in self.latest)
        found = {
            "mismatches": float(mismatches),
            "mismatch_rate": mismatches / max(elements, 1),
            "worst_sqnr": min(row.sqnr for row in self.latest),
        }
        if self.latest_output is not None:
            found["output_mismatch_rate"] = self.latest_output.differing
            if self.latest_output.decisions:
                found["decisions_changed"] = self.latest_output.changed
        return found

    def contribute(self, findings: Findings) -> None:
        """Add the differences of this validation."""
        if self._measured:
            findings.integers = self.latest
            findings.integer_output = self.latest_output

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the integer model as the user does, and say which sites are the worst."""
        if self._measures_metric(trainer, pl_module):
            with evaluation(pl_module), integer(pl_module):
                metrics = silent_validation(trainer, pl_module)
            if (dashboard := dashboard_of(trainer)) is not None:
                dashboard.note_integer_metrics(trainer, metrics)
        if self.latest:
            table = self._table()
            logger.info("%s", table)
            if trainer.is_global_zero:
                tensorboard.show_text(trainer, "integer_model", table)
        unready = _unready(pl_module)
        if unready:
            logger.warning(
                "%d sites have seen no range and ran in float: %s",
                len(unready),
                ", ".join(unready[:5]),
            )
        super().on_fit_end(trainer, pl_module)

    def _measures_metric(self, trainer: Any, module: Any) -> bool:
        on = is_prepared(module) and instrumentation_of(module).switches.quantize
        wanted = self.final_metric and bool(self.latest) and not trainer.fast_dev_run
        return on and wanted and has_one_loader(trainer)

    def _table(self) -> str:
        mismatches = sum(row.mismatches for row in self.latest)
        elements = sum(row.elements for row in self.latest)
        worst = sorted(self.latest, key=lambda row: (-row.mismatches, row.sqnr))[: self.rows]
        width = max(len(row.site) for row in worst)
        lines = [
            f"Integer model: {mismatches} of {elements} codes differ from fake-quant. Worst sites:",
            f"{'site':<{width}}  mismatches  max LSB  SQNR [dB]  isolated [dB]  max error",
        ]
        lines += [
            f"{row.site:<{width}}  {row.mismatches:>10}  {row.max_lsb:>7}  {row.sqnr:>9.1f}  "
            f"{row.isolated_sqnr:>13.1f}  {row.max_error:>9.4g}"
            for row in worst
        ]
        return "\n".join(lines)


def _unready(module: Any) -> list[str]:
    if not is_prepared(module) or not instrumentation_of(module).switches.quantize:
        return []
    sites = instrumentation_of(module).sites
    return [
        site.key
        for site in sites
        if site.quantized and not all(quantizer.known for quantizer in site.quantizers())
    ]
