"""What is recorded of a quantized run, and drawn by every dashboard."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_linger.simulate.metrics import DivergenceRow, OutputRow, QuantErrorRow

STAGES = ("fuse_bn", "normalize", "quantize")
# What the metrics of the integer model are shown as, beside those of the stages.
INTEGER = "integer"


@dataclass(frozen=True)
class Layer:
    """One site of the model.

    Args:
        site: Site key, e.g. ``block.conv1/conv2d/0``.
        op: Canonical op name.
        bits: ``weight/input/output`` widths in force, empty for float.
        output_bits: Width of the output codes, None where the output is not rounded here.
        why_float: Why it is not quantized, empty if it is.
        inputs: Site keys of the layers whose results it takes.
    """

    site: str
    op: str
    bits: str = ""
    output_bits: int | None = None
    why_float: str = ""
    inputs: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What a picture calls the layer: ``block.conv1 conv2d``, and a number for repetitions."""
        path, op, index = self.site.rsplit("/", 2)
        number = "" if index == "0" else f" {index}"
        return f"{path} {op}{number}".strip()


@dataclass(frozen=True)
class LayerError:
    """One layer at one epoch.

    Args:
        site: Site key.
        sqnr: Accumulated signal to noise ratio against float, dB: of the integer model where that
            was run, of fake-quant otherwise.
        isolated_sqnr: Of the layer alone, on the input that quantization left it, dB.
        cosine: Cosine similarity with float, -1 to 1.
        saturation: Share of the values on an end of the grid, 0 to 1.
        exponent: log2 of the step.
        mismatch_rate: Share of the integer codes that differ from fake-quant, 0 to 1.
        max_lsb: Largest such difference, in codes.
    """

    site: str
    sqnr: float
    isolated_sqnr: float
    cosine: float | None = None
    saturation: float | None = None
    exponent: float | None = None
    mismatch_rate: float | None = None
    max_lsb: int | None = None

    @property
    def noise(self) -> float:
        """Accumulated noise as a share of the signal (of amplitudes, root mean square)."""
        return noise_share(self.sqnr)

    @property
    def isolated_noise(self) -> float:
        """Noise of the layer alone as a share of the signal."""
        return noise_share(self.isolated_sqnr)


def noise_share(sqnr: float) -> float:
    """Return the noise of an SQNR in dB as a share of the signal's amplitude; 20 dB are 0.1."""
    return float(10.0 ** (-sqnr / 20.0))


@dataclass(frozen=True)
class OutputErrors:
    """The model's output at one epoch; None where it was not measured.

    Args:
        sqnr: Fake-quant against float, dB.
        decisions_changed: Share of the decisions that quantization changes.
        mismatch_rate: Share of the integer output values that differ from fake-quant.
        integer_decisions_changed: Share of the decisions that differ between the two.
    """

    sqnr: float | None = None
    decisions_changed: float | None = None
    mismatch_rate: float | None = None
    integer_decisions_changed: float | None = None


@dataclass(frozen=True)
class ValueHistogram:
    """How the values of one layer lie, in float and on the grid.

    Args:
        site: Site key.
        edges: Edges of the bins, one more than there are bins.
        reference: Number of float values per bin.
        quantized: Number of values on the grid per bin.
        low: Value of the lowest code in use.
        high: Value of the highest code in use.
    """

    site: str
    edges: tuple[float, ...]
    reference: tuple[int, ...]
    quantized: tuple[int, ...]
    low: float
    high: float

    @property
    def clipped(self) -> float:
        """Share of the float values in bins that lie beyond the clip limits."""
        outside = sum(
            count
            for count, left, right in zip(
                self.reference, self.edges[:-1], self.edges[1:], strict=True
            )
            if right <= self.low or left >= self.high
        )
        return outside / max(sum(self.reference), 1)


@dataclass(frozen=True)
class StageSwitch:
    """The stages that are on from a step.

    Args:
        epoch: Epoch of the step.
        step: First step, ``trainer.global_step``.
        stages: Names out of ``STAGES``.
    """

    epoch: int
    step: int
    stages: tuple[str, ...]


@dataclass(frozen=True)
class WidthSwitch:
    """The widths in force from a step.

    Args:
        epoch: Epoch of the step.
        step: First step, ``trainer.global_step``.
        bits: ``weight/input/output`` widths by site, of all that are quantized.
        output_bits: Widths of the output codes by site, of those whose output is rounded.
    """

    epoch: int
    step: int
    bits: dict[str, str]
    output_bits: dict[str, int]


@dataclass(frozen=True)
class EpochRecord:
    """What one validation found.

    Args:
        epoch: Epoch.
        step: ``trainer.global_step``.
        stages: The stages that were on.
        metrics: The user's metrics.
        layers: Errors by layer, in execution order; empty before quantization.
        outputs: Errors of the model's output.
    """

    epoch: int
    step: int
    stages: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    layers: tuple[LayerError, ...] = ()
    outputs: OutputErrors = OutputErrors()

    @property
    def stage(self) -> str:
        """The stage by name: ``float``, ``constrained`` or ``QAT``."""
        return stage_name(self.stages)


def stage_name(stages: Iterable[str]) -> str:
    """Return what a user calls the stages that are on."""
    on = set(stages)
    if "quantize" in on:
        return "QAT"
    return "constrained" if on else "float"


@dataclass
class RunRecord:
    """One run.

    Args:
        name: What pictures call it.
        platform: Name of the target, empty if nothing is planned to be quantized.
        exact: Whether integers must equal fake-quant bit for bit (power-of-two scales).
        settings: What the stages were planned with.
        layers: The layers in execution order, with the widths in force at the end.
        switches: When which stages were on, in order.
        widths: When which widths were in force, in order.
        epochs: What the validations found, in order.
        histograms: The latest values by site.
        integer_metrics: The user's metrics of the integer model, at the end.
    """

    name: str = ""
    platform: str = ""
    exact: bool = True
    settings: dict[str, str] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    switches: list[StageSwitch] = field(default_factory=list)
    widths: list[WidthSwitch] = field(default_factory=list)
    epochs: list[EpochRecord] = field(default_factory=list)
    histograms: dict[str, ValueHistogram] = field(default_factory=dict)
    integer_metrics: dict[str, float] = field(default_factory=dict)

    @property
    def measured(self) -> list[EpochRecord]:
        """The epochs in which layers were measured."""
        return [epoch for epoch in self.epochs if epoch.layers]

    @property
    def latest(self) -> EpochRecord | None:
        """The last epoch in which layers were measured."""
        measured = self.measured
        return measured[-1] if measured else None

    @property
    def measured_layers(self) -> list[Layer]:
        """The layers that were measured at least once, in execution order."""
        sites = {error.site for epoch in self.measured for error in epoch.layers}
        return [layer for layer in self.layers if layer.site in sites]

    def switch_widths(self, switch: WidthSwitch) -> None:
        """Take widths over that are in force from now on."""
        # A resumed run repeats what came after its checkpoint.
        self.widths = [earlier for earlier in self.widths if earlier.step < switch.step] + [switch]
        self.layers = [
            dataclasses.replace(
                layer,
                bits=switch.bits.get(layer.site, ""),
                output_bits=switch.output_bits.get(layer.site),
            )
            for layer in self.layers
        ]

    def widths_of(self, site: str) -> list[tuple[int, str]]:
        """Return the steps from which a layer had other widths than before, and these."""
        found: list[tuple[int, str]] = []
        for switch in self.widths:
            bits = switch.bits.get(site, "")
            if not found or found[-1][1] != bits:
                found.append((switch.step, bits))
        return found

    def layer(self, site: str) -> Layer:
        """Return the layer of a site key."""
        return next((x for x in self.layers if x.site == site), Layer(site, site.split("/")[-2]))

    def measured_inputs(self, site: str) -> list[str]:
        """Return the measured layers that feed a layer, through those that have no values."""
        measured = {layer.site for layer in self.measured_layers}
        layers = {layer.site: layer for layer in self.layers}
        found: dict[str, None] = {}
        seen: set[str] = set()
        waiting = list(layers[site].inputs) if site in layers else []
        while waiting:
            source = waiting.pop(0)
            if source in measured:
                found[source] = None
            elif source in layers and source not in seen:
                seen.add(source)
                waiting += layers[source].inputs
        return list(found)

    def metrics_by_stage(self) -> dict[str, dict[str, float]]:
        """Return the metrics of the last epoch of each stage, and those of the integer model."""
        by_stage = {epoch.stage: epoch.metrics for epoch in self.epochs if epoch.metrics}
        return {**by_stage, **({INTEGER: self.integer_metrics} if self.integer_metrics else {})}


def layer_errors(
    fake: Iterable[QuantErrorRow], integers: Iterable[DivergenceRow]
) -> tuple[LayerError, ...]:
    """Join what the two callbacks found, in execution order."""
    by_site = {row.site: row for row in fake}
    whole = {row.site: row for row in integers}
    joined = []
    # Both lists follow the order of execution; either may lack sites.
    for site in dict.fromkeys([*by_site, *whole]):
        error, run = by_site.get(site), whole.get(site)
        ratios = run or error
        assert ratios is not None
        joined.append(
            LayerError(
                site,
                ratios.sqnr,
                ratios.isolated_sqnr,
                error.cosine if error else None,
                error.saturation if error else None,
                error.exponent if error else None,
                run.mismatch_rate if run else None,
                run.max_lsb if run else None,
            )
        )
    return tuple(joined)


def output_errors(fake: OutputRow | None, integers: OutputRow | None) -> OutputErrors:
    """Join what the two callbacks found about the model's output."""
    return OutputErrors(
        fake.sqnr if fake else None,
        fake.changed if fake and fake.decisions else None,
        integers.differing if integers else None,
        integers.changed if integers and integers.decisions else None,
    )


def finite(values: dict[str, float]) -> dict[str, float]:
    """Drop what is not a number: a metric that was undefined in an epoch."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
