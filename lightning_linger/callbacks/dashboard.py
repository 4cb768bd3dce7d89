"""What the measuring callbacks of a Trainer show together."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_linger.callbacks import tensorboard
from lightning_linger.callbacks.logging import log_values
from lightning_linger.core.errors import QuantizationWarning
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.dashboard.advice import advise
from lightning_linger.dashboard.figures import matplotlib_is_installed
from lightning_linger.dashboard.model import (
    bits_per_weight,
    charted_sites,
    planned_layers,
    planned_target,
    settings_of,
    stages_on,
    value_histograms,
    widths_in_force,
)
from lightning_linger.dashboard.records import (
    INTEGER,
    STAGES,
    EpochRecord,
    RunRecord,
    StageSwitch,
    finite,
    layer_errors,
    output_errors,
    stage_name,
)
from lightning_linger.dashboard.run_log import FILE_NAME, RunLog
from lightning_linger.simulate.metrics import DivergenceRow, OutputRow, QuantErrorRow
from lightning_linger.simulate.samples import ValueSamples

# Names of values that the library itself logs.
OWN = ("integer/", "quant_error/", "stage/", "metric/", "bits/")
# What a metric's name contains that is to be high, best first; otherwise the first of a validation.
_ACCURACIES = ("acc", "f1", "auroc", "auc", "map", "iou", "dice", "psnr", "bleu")
BITS_PER_WEIGHT = "bits/per_weight"
_STAGE_METRICS = (
    *(f"metric/{stage_name(stages)}" for stages in ((), STAGES[:1], STAGES)),
    f"metric/{INTEGER}",
)
_ROW_METRICS = (
    *_STAGE_METRICS,
    "quant_error/worst_sqnr",
    "quant_error/decisions_changed",
    "integer/mismatch_rate",
    BITS_PER_WEIGHT,
)
# Drawing in the course of a run may take this share of its time.
DRAWING_SHARE = 0.01


@dataclass
class Findings:
    """What the callbacks found in one validation.

    Args:
        fake: Fake-quant against float, by site.
        fake_output: The same for the model's output.
        integers: Integers, by site.
        integer_output: Integers against fake-quant, for the model's output.
        samples: Values of the sites.
        worst: How many layers are shown in detail.
    """

    fake: list[QuantErrorRow] = field(default_factory=list)
    fake_output: OutputRow | None = None
    integers: list[DivergenceRow] = field(default_factory=list)
    integer_output: OutputRow | None = None
    samples: ValueSamples = field(default_factory=ValueSamples)
    worst: int = 6


class Budget:
    """Lets something happen as long as it has taken only a small share of the time so far.

    Args:
        share: Of the time since the budget was made.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._start = time.monotonic()
        self._spent = 0.0

    def allows(self) -> bool:
        """Whether there is time left; the first time there always is."""
        return self._spent <= self.share * (time.monotonic() - self._start)

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time that passes in the context."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._spent += time.monotonic() - start


class Dashboard:
    """Keeps the record of a run, in a file and in every TensorBoard logger; on rank zero.

    Args:
        trainer: Its loggers are used.
        module: The prepared module.
        folder: Where the run's file goes; None writes none.
        resumed: Whether the run goes on from a checkpoint.
    """

    def __init__(self, trainer: Any, module: Any, folder: Path | None, resumed: bool) -> None:
        sites = charted_sites(module)
        platform, exact = planned_target(module)
        self.record = RunRecord(
            # Lightning calls every folder `version_0`; the one above it tells them apart.
            name="/".join(folder.parts[-2:]) if folder is not None else "",
            platform=platform,
            exact=exact,
            settings=settings_of(instrumentation_of(module).plans),
            layers=planned_layers(module),
        )
        self._log = RunLog(folder / FILE_NAME, resumed) if folder is not None else None
        if self._log is not None:
            self._log.run(self.record)
        self._budget = Budget(DRAWING_SHARE)
        self._findings = Findings()
        self._graph_shown = False
        self._drawn_at = -1
        self._stages: tuple[str, ...] | None = None
        self._width_changes: int | None = None
        settings = {**_hyperparameters(module), **_stage_settings(self.record)}
        self._draws = matplotlib_is_installed()
        for writer in tensorboard.writers(trainer):
            tensorboard.show_layout(writer, sites)
            # Before Lightning writes the module's own, of which TensorBoard keeps the first.
            tensorboard.show_settings(writer, settings, _ROW_METRICS)
            if not self._draws:
                warnings.warn(
                    "matplotlib is not installed: TensorBoard gets charts and tables, but no heat "
                    'maps, histograms and timeline. `pip install "lightning-linger[plots]"`.',
                    QuantizationWarning,
                    stacklevel=2,
                )

    def note_switches(self, trainer: Any, module: Any) -> None:
        """Note other stages and other widths; called in every step."""
        self._note_stages(trainer, module)
        self._note_widths(trainer, module)

    def _note_widths(self, trainer: Any, module: Any) -> None:
        changes = instrumentation_of(module).width_changes
        if changes == self._width_changes:
            return
        self._width_changes = changes
        switch = widths_in_force(module, trainer.current_epoch, trainer.global_step)
        latest = self.record.widths[-1] if self.record.widths else None
        # What was only tried out has been taken back.
        if latest is not None and switch.bits == latest.bits:
            return
        self.record.switch_widths(switch)
        self._graph_shown = False
        if self._log is not None:
            self._log.widths(switch)

    def _note_stages(self, trainer: Any, module: Any) -> None:
        stages = stages_on(instrumentation_of(module).switches)
        if stages == self._stages:
            return
        self._stages = stages
        switch = StageSwitch(trainer.current_epoch, trainer.global_step, stages)
        self.record.switches.append(switch)
        if self._log is not None:
            self._log.switch(switch)

    def show_epoch(self, trainer: Any, module: Any, findings: Findings) -> None:
        """Show what a validation found."""
        stages = stages_on(instrumentation_of(module).switches)
        epoch = EpochRecord(
            trainer.current_epoch,
            trainer.global_step,
            stages,
            _user_metrics(trainer),
            layer_errors(findings.fake, findings.integers),
            output_errors(findings.fake_output, findings.integer_output),
        )
        self.record.epochs.append(epoch)
        if self._log is not None:
            self._log.epoch(epoch)
        widths = _widths(self.record, module) if STAGES[-1] in stages else {}
        log_values(trainer, {**_stage_values(epoch), **widths})
        if not epoch.layers:
            return
        self._findings = findings
        if self._budget.allows():
            with self._budget.spending():
                self._show(trainer, epoch)

    def note_integer_metrics(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Note what the user's metrics are of the integer model, at the end of the run."""
        self.record.integer_metrics = finite(metrics)
        if self._log is not None:
            self._log.integer_metrics(self.record.integer_metrics)
        name = primary_metric(self.record.integer_metrics)
        if name is not None:
            log_values(trainer, {f"metric/{INTEGER}": metrics[name]})

    def close(self, trainer: Any) -> None:
        """Show the end of the run."""
        sites = (layer.site for layer in self.record.measured_layers)
        self.record.histograms = value_histograms(self._findings.samples, sites)
        if self._log is not None and self.record.histograms:
            self._log.histograms(self.record.histograms)
        if self.record.epochs and self._drawn_at != self.record.epochs[-1].step:
            self._show(trainer, self.record.epochs[-1])

    def _show(self, trainer: Any, epoch: EpochRecord) -> None:
        self._drawn_at = epoch.step
        worst = self._findings.worst
        sites = [item.error.site for item in advise(self.record, worst)]
        self.record.histograms = {
            **self.record.histograms,
            **value_histograms(self._findings.samples, sites),
        }
        for writer in tensorboard.writers(trainer):
            if epoch.layers and not self._graph_shown:
                tensorboard.show_graph(writer, self.record, epoch)
            tensorboard.show_advice(writer, self.record, worst, epoch.step)
            if self._draws:
                tensorboard.show_pictures(writer, self.record, worst, epoch.step)
        self._graph_shown = self._graph_shown or bool(epoch.layers)


def _stage_values(epoch: EpochRecord) -> dict[str, float]:
    values = {f"stage/{stage}": float(stage in epoch.stages) for stage in STAGES}
    name = primary_metric(epoch.metrics)
    if name is not None:
        values[f"metric/{epoch.stage}"] = epoch.metrics[name]
    return values


def _widths(record: RunRecord, module: Any) -> dict[str, float]:
    """Return the widths in force: of every layer, and of all weights."""
    values: dict[str, float] = {}
    for layer in record.layers:
        weight = layer.bits.partition("/")[0]
        if weight.isdigit():
            values[f"weight_bits/{layer.site}"] = int(weight)
        if layer.output_bits is not None:
            values[f"output_bits/{layer.site}"] = layer.output_bits
    mean = bits_per_weight(module)
    return values if mean is None else {**values, BITS_PER_WEIGHT: mean}


def primary_metric(metrics: dict[str, float]) -> str | None:
    """Return the name of the metric that stands for the run: an accuracy of the validation.

    Args:
        metrics: The user's metrics, in the order in which they were logged.
    """
    names = sorted(metrics, key=lambda name: name.lower().startswith("train"))
    for word in _ACCURACIES:
        for name in names:
            if word in name.lower():
                return name
    return names[0] if names else None


def _user_metrics(trainer: Any) -> dict[str, float]:
    return finite(
        {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if not name.startswith(OWN)
        }
    )


def _stage_settings(record: RunRecord) -> dict[str, str]:
    """Return what tells runs apart, few enough for a row."""
    bits = (f"quantize.{name}_bits" for name in ("weight", "activation", "output"))
    return {
        "platform": record.platform,
        "planned bits (weight/input/output)": "/".join(
            record.settings.get(x, "float") for x in bits
        ),
        "overrides": record.settings.get("quantize.overrides", ""),
        "stages": ", ".join(dict.fromkeys(name.split(".")[0] for name in record.settings)),
    }


def _hyperparameters(module: Any) -> dict[str, Any]:
    """Return the module's own, as far as TensorBoard can show them."""
    found = dict(getattr(module, "hparams", {}))
    return {name: x for name, x in found.items() if isinstance(x, bool | int | float | str)}
