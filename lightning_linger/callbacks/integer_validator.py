"""Running validation batches in integers, beside the fake-quant forward."""

from __future__ import annotations

from typing import Any

from lightning_linger.callbacks.logging import log_values
from lightning_linger.callbacks.replay import ReplayCallback, log_aggregate
from lightning_linger.core.instrumentation import instrumentation_of, is_prepared
from lightning_linger.simulate.divergence import Forward, measure_divergence, measured_sites
from lightning_linger.simulate.metrics import Divergence, DivergenceRow


class IntegerValidatorCallback(ReplayCallback):
    """Proves during training that the integer model equals the trained one.

    On some validation batches every site runs in integers, once in the real chain of integers
    (accumulated) and once on the fake-quant input (isolated); mismatching codes, and the error
    against float, go to every logger. A table of the worst sites is printed at the end of ``fit``.

    Logged aggregates, which a checkpoint may monitor: ``integer/mismatches`` (codes that differ),
    ``integer/mismatch_rate`` and ``integer/worst_sqnr`` (dB).

    Args:
        batches: How many validation batches of an epoch run in integers.
        every_n_epochs: Only in every n-th epoch.
        rows: How many sites the final table shows.
    """

    def __init__(self, batches: int = 1, every_n_epochs: int = 1, rows: int = 5) -> None:
        super().__init__(batches, every_n_epochs)
        self.rows = rows
        self.latest: list[DivergenceRow] = []
        self._meter: Divergence | None = None

    def begin(self, module: Any) -> None:
        """Start with nothing counted."""
        self._meter = Divergence(measured_sites(module)).to(module.device)

    def replay(self, trainer: Any, module: Any, forward: Forward) -> None:
        """Compare the number systems."""
        if self._meter is not None:
            measure_divergence(module, forward, self._meter)

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
            values[f"mismatch/{row.site}"] = row.mismatch_rate
            values[f"integer_sqnr/{row.site}"] = row.sqnr
            values[f"integer_sqnr_isolated/{row.site}"] = row.isolated_sqnr
            values[f"integer_max_error/{row.site}"] = row.max_error
            values[f"integer_max_lsb/{row.site}"] = float(row.max_lsb)
        log_values(trainer, values)
        mismatches = sum(row.mismatches for row in self.latest)
        elements = sum(row.elements for row in self.latest)
        log_aggregate(pl_module, "integer/mismatches", float(mismatches))
        log_aggregate(pl_module, "integer/mismatch_rate", mismatches / max(elements, 1))
        worst = min(row.sqnr for row in self.latest)
        log_aggregate(pl_module, "integer/worst_sqnr", worst)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the worst sites."""
        if not trainer.is_global_zero:
            return
        if self.latest:
            _print(self._table())
        unready = _unready(pl_module)
        if unready:
            _print(
                f"{len(unready)} sites have seen no range and ran in float: "
                f"{', '.join(unready[:5])}"
            )

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


def _print(text: str) -> None:
    from rich.console import Console

    Console().print(text, markup=False, highlight=False)
