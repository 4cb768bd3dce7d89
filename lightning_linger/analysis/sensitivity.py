"""How much a model loses by quantizing one layer, measured layer by layer and width by width."""

from __future__ import annotations

import csv
import dataclasses
import glob
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_linger.analysis.saving import save_table
from lightning_linger.core.config import QuantConfig
from lightning_linger.core.distributed import sum_over_ranks
from lightning_linger.core.errors import ConfigError, NonFiniteError, UnsupportedError
from lightning_linger.core.grid import MIN_BITS
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.logs import logger
from lightning_linger.core.payload import real_values
from lightning_linger.core.platform import symmetry_of
from lightning_linger.core.progress import with_progress
from lightning_linger.core.ranges import RangeEstimator
from lightning_linger.core.sites import Site
from lightning_linger.core.table import Table
from lightning_linger.core.tags import WIDEST_OPERAND
from lightning_linger.core.widths import NAMES, Widths, widths_of
from lightning_linger.simulate.divergence import Forward, forward_of, main_result
from lightning_linger.stages.calibrate import learning_ranges
from lightning_linger.stages.prepare import check_example, no_trace
from lightning_linger.stages.quantize import plan_quantize
from lightning_linger.stages.selection import QUANT_MARK, Selection, matches
from lightning_linger.stages.trial import kept_plan, plan_again

Part = Literal["weights", "activations", "both"]
Mode = Literal["one_at_a_time", "all_but_one"]
Metric = Literal["noise", "kl"] | Callable[[nn.Module, Sequence[Any]], float]

PARTS: tuple[Part, ...] = ("weights", "activations", "both")
MODES: tuple[Mode, ...] = ("one_at_a_time", "all_but_one")

_COLUMNS = ("site", "bits", "drop")


@dataclass(frozen=True)
class SensitivityRow:
    """What one layer costs at one width.

    Args:
        site: Site key, or dotted path of the layer: a pattern of ``overrides`` that matches it.
        bits: Width of the layer.
        drop: By how much the metric is worse, in its own unit; negative if it is better.
        part: What had this width: ``weights``, ``activations`` (inputs and outputs), or ``both``.
    """

    site: str
    bits: int
    drop: float
    part: str = "both"


class Sensitivities(Table[SensitivityRow]):
    """One row per layer and width, in the order of the model."""

    row_type = SensitivityRow

    def cells(self) -> list[list[str]]:
        """Return what the cells say, drops with four digits."""
        return [[row.site, str(row.bits), f"{row.drop:.4g}", row.part] for row in self]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table: as CSV or JSON if the name ends so, else as text.

        Returns:
            The path.

        Raises:
            ConfigError: If it cannot be written.
        """
        return save_table(self, path)


def sensitivity(
    model: nn.Module,
    loader: Iterable[Any],
    metric: Metric = "noise",
    bits: Sequence[int] = (2, 4, 8),
    mode: Mode = "one_at_a_time",
    part: Part = "weights",
    modules: Sequence[str] | None = None,
    config: QuantConfig | None = None,
) -> Sensitivities:
    """Measure what each layer of a prepared model costs at each width, without training.

    Every trial is planned, calibrated and evaluated on all batches, which are kept in memory: pass
    few. Afterwards the model is as it was, to the last bit. Float is what the other stages make of
    the model: folding and limits that are on stay on.

    Args:
        model: A prepared model, planned to be quantized or not.
        loader: Batches: tensors, tuples or lists whose first entry is the input, or mappings of
            keyword inputs.
        metric: ``noise``, the power of what quantization adds to the model's output as a share of
            the power of the float output; ``kl``, the Kullback-Leibler divergence of the decisions
            (softmax over dimension 1) from those in float, in nats; neither needs labels. Or a
            function of the model and the batches that returns a number which is better when it is
            higher, such as an accuracy.
        bits: Widths to measure.
        mode: ``one_at_a_time``: one layer has the width, and the drop is what that costs.
            ``all_but_one``: all layers but one have it, and the drop is what leaving out that one
            wins. Whatever does not have the width has 16 bits, next to float.
        part: What of a layer has the width.
        modules: Globs on dotted paths: only these layers are measured.
        config: How layers are quantized, if the model has no plan; widths in it do not count.

    Returns:
        A row per layer and width. A layer is a module that makes one call, or else the call.

    Raises:
        ConfigError: If an argument is wrong, or the loader gives no batch.
        NonFiniteError: If the metric is not finite.
        UnsupportedError: If the model has nothing of that part.
    """
    batches = list(loader)
    if not batches:
        msg = "the loader gave no batch to measure sensitivities with."
        raise ConfigError(msg)
    for batch in batches:
        check_example(batch)
    forwards = [forward_of(model, batch) for batch in batches]
    score = _applied(metric, model, batches) if callable(metric) else output_score(metric, forwards)
    return measure_sensitivity(model, forwards, score, bits, mode, part, modules, config)


def measure_sensitivity(
    model: nn.Module,
    forwards: Sequence[Forward],
    score: Callable[[], float],
    bits: Sequence[int] = (2, 4, 8),
    mode: Mode = "one_at_a_time",
    part: Part = "weights",
    modules: Sequence[str] | None = None,
    config: QuantConfig | None = None,
) -> Sensitivities:
    """Measure sensitivities of whatever runs the model; see :func:`sensitivity`.

    Args:
        model: A prepared model.
        forwards: Run the model on a batch each, to find ranges.
        score: Evaluates the model as it is at the moment; higher is better. Called in float first.
        bits: Widths.
        mode: What is quantized with the layer.
        part: What of it.
        modules: Globs on dotted paths.
        config: How, if the model has no plan.
    """
    widths = check_trials(bits, mode, part)
    instrumentation = instrumentation_of(model)
    with no_trace(model), kept_plan(model):
        model.eval()
        if "quantize" not in instrumentation.plans:
            plan_quantize(model, config or QuantConfig())
        elif config is not None:
            msg = (
                "the model is planned to be quantized, and measured as that plan has it. Leave "
                "`config` away, or call `linger.strip(model)` and `linger.prepare` to start over."
            )
            raise ConfigError(msg)
        trials = _Trials(model, forwards, score, part, modules)
        rows = trials.run(widths, mode)
    logger.info(
        "measured %d layers of %s at %s bits", len(trials.units), type(model).__name__, list(widths)
    )
    return Sensitivities(rows)


def _applied(
    metric: Callable[[nn.Module, list[Any]], float], model: nn.Module, batches: list[Any]
) -> Callable[[], float]:
    return lambda: float(metric(model, batches))


def output_score(
    metric: Literal["noise", "kl"], forwards: Sequence[Forward]
) -> Callable[[], float]:
    """Return an evaluation of the model's output, without labels.

    What it returns the first time, in float, is 0, and what later ones are compared with.

    Args:
        metric: See :func:`sensitivity`.
        forwards: Run the model on a batch each, and return its output.
    """
    losses = {"noise": _noise, "kl": _divergence}
    if metric not in losses:
        msg = f"`metric` must be a function or one of {tuple(losses)}. Found: {metric!r}."
        raise ConfigError(msg)
    loss = losses[metric]
    references: list[Tensor] = []

    def score() -> float:
        outputs = [_output(forward) for forward in forwards]
        if not references:
            references.extend(outputs)
        sums = torch.stack([loss(y, r) for y, r in zip(outputs, references, strict=True)])
        total, weight = sum_over_ranks(sums.sum(0)).tolist()
        return -total / weight if weight else 0.0

    return score


def _output(forward: Forward) -> Tensor:
    result = main_result(forward())
    if result is None:
        msg = "the model returns no floating tensor to compare. Pass a function as `metric`."
        raise UnsupportedError(msg)
    return real_values(result).detach().double()


def _noise(y: Tensor, reference: Tensor) -> Tensor:
    """Return the power of the noise and that of the signal."""
    return torch.stack([(y - reference).square().sum(), reference.square().sum()])


def _divergence(y: Tensor, reference: Tensor) -> Tensor:
    """Return the sum of KL(reference, y) in nats, and the number of decisions."""
    if reference.dim() < 2:
        msg = "`metric='kl'` needs outputs with classes along dimension 1. Use 'noise'."
        raise ConfigError(msg)
    ours, right = y.log_softmax(1), reference.log_softmax(1)
    divergence = (right.exp() * (right - ours)).sum()
    return torch.stack([divergence, divergence.new_tensor(reference[:, 0].numel())])


def check_trials(bits: Sequence[int], mode: str, part: str) -> tuple[int, ...]:
    """Return the widths to measure, each once.

    Raises:
        ConfigError: If a width, the mode or the part is none.
    """
    for name, value, allowed in (("mode", mode, MODES), ("part", part, PARTS)):
        if value not in allowed:
            msg = f"`{name}` must be one of {allowed}. Found: {value!r}."
            raise ConfigError(msg)
    widths = tuple(dict.fromkeys(bits))
    if not widths or any(type(b) is not int or not 2 <= b <= WIDEST_OPERAND for b in widths):
        msg = f"`bits` holds integers from 2 to {WIDEST_OPERAND}. Found: {bits!r}."
        raise ConfigError(msg)
    return widths


# --- layers that are measured -------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """Calls that have their widths together.

    Args:
        name: A pattern of ``overrides`` that matches them and nothing else.
        sites: Their site keys.
    """

    name: str
    sites: tuple[str, ...]


def units_of(instrumentation: Instrumentation, part: str) -> list[Unit]:
    """Return the layers of a planned model that have weights, or codes, of their own."""
    sites: dict[str, list[str]] = {}
    for site in instrumentation.sites:
        if is_measured(site, part):
            sites.setdefault(_unit_name(site, instrumentation), []).append(site.key)
    return [Unit(name, tuple(keys)) for name, keys in sites.items()]


def measured_layers(
    model: nn.Module, part: str, modules: Sequence[str] | None = None
) -> list[Unit]:
    """Return the layers of a planned model that are measured.

    Args:
        model: The model.
        part: What of them.
        modules: Globs on dotted paths; None takes all.

    Raises:
        ConfigError: If a glob matches nothing.
        UnsupportedError: If there is no such layer.
    """
    instrumentation = instrumentation_of(model)
    Selection(None, modules, None, QUANT_MARK).validate(model, instrumentation.sites)
    chosen = [
        unit
        for unit in units_of(instrumentation, part)
        if modules is None
        or any(matches(instrumentation.find(key), x) for key in unit.sites for x in modules)
    ]
    if not chosen:
        msg = (
            f"{type(model).__name__} has no layer to measure for part={part!r}"
            + (f" and modules={list(modules)}" if modules is not None else "")
            + ". `print(linger.summary(model))` shows what is quantized."
        )
        raise UnsupportedError(msg)
    return chosen


def is_measured(site: Site, part: str) -> bool:
    """Whether a site has something of that part whose width can be chosen."""
    if not site.quantized or site.merged or site.completes_fold:
        return False
    if site.has_parameters:
        return True
    return part != "weights" and (site.output is not None or bool(site.inputs))


def _unit_name(site: Site, instrumentation: Instrumentation) -> str:
    path, owner = site.node.owner, site.__dict__["owner"]
    makes = {
        (other.node.op, other.key.rpartition("/")[2])
        for other in instrumentation.sites
        if other.node.owner == path and other.quantized
    }
    alone = path and len(makes) == 1 and next(owner.children(), None) is None
    return glob.escape(path if alone else site.key)


def widths_for(part: str, bits: int, widths: Widths) -> Widths:
    """Return widths of a layer of which a part has another; a float result stays float."""
    changed = dict.fromkeys(_NAMES[part], bits)
    if widths.output_bits is None or widths.output_bits > WIDEST_OPERAND:
        changed.pop("output_bits", None)
    return dataclasses.replace(widths, **changed)


_NAMES: dict[str, tuple[str, ...]] = {
    "weights": ("weight_bits",),
    "activations": ("activation_bits", "output_bits"),
    "both": NAMES,
}


# --- trials -------------------------------------------------------------------------------------


class _Trials:
    """A plan of its own, on which widths are tried out.

    What is not under test has 16 bits, whose noise is some 50 dB below that of 8 bits: then every
    op runs on codes in every trial, also one that cannot be quantized alone, and ranges need be
    found only once.

    Args:
        model: The model, in evaluation mode, with its plan.
        forwards: Run it on a batch each.
        score: Evaluates it.
        part: What is tested.
        modules: Globs on the layers that are tested; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        forwards: Sequence[Forward],
        score: Callable[[], float],
        part: Part,
        modules: Sequence[str] | None,
    ) -> None:
        self.model = model
        self.part = part
        self._instrumentation = instrumentation_of(model)
        self._forwards = forwards
        self._score = score
        self.units = measured_layers(model, part, modules)

    def run(self, bits: Sequence[int], mode: Mode) -> list[SensitivityRow]:
        """Measure every layer at every width."""
        self._float_score()
        self._plan_wide()
        measure = self._one_at_a_time if mode == "one_at_a_time" else self._all_but_one
        trials = [(unit, width) for unit in self.units for width in bits]
        baselines: dict[int, float] = {}
        return [
            SensitivityRow(unit.name, width, measure(unit, width, baselines), self.part)
            for unit, width in with_progress(trials, "Measuring sensitivities")
        ]

    def _one_at_a_time(self, unit: Unit, bits: int, baselines: dict[int, float]) -> float:
        if WIDEST_OPERAND not in baselines:
            baselines[WIDEST_OPERAND] = self._scored({})
        return baselines[WIDEST_OPERAND] - self._scored({unit: bits})

    def _all_but_one(self, unit: Unit, bits: int, baselines: dict[int, float]) -> float:
        whole = dict.fromkeys(self.units, bits)
        if bits not in baselines:
            baselines[bits] = self._scored(whole)
        return self._scored({**whole, unit: WIDEST_OPERAND}) - baselines[bits]

    def _float_score(self) -> None:
        # On, so that whatever notes the calls of the model sees them.
        switches = self._instrumentation.switches
        switches.quantize, switches.system = True, "float"
        self._evaluated()
        switches.system = "fake"

    def _plan_wide(self) -> None:
        plan_again(self.model)
        self._instrumentation.switches.quantize = True
        self._wide = {
            site.key: widths_for("both", WIDEST_OPERAND, widths_of(site))
            for site in self._instrumentation.sites
            if site.quantized and not site.completes_fold
        }
        self._instrumentation.change_widths(self._wide)
        self._calibrate()

    def _calibrate(self) -> None:
        with learning_ranges(self.model):
            for forward in self._forwards:
                forward()

    @torch.no_grad()
    def _scored(self, bits: Mapping[Unit, int]) -> float:
        changed = {
            key: widths_for(self.part, width, self._wide[key])
            for unit, width in bits.items()
            for key in unit.sites
        }
        self._instrumentation.change_widths({**self._wide, **changed})
        self._search_ranges()
        return self._evaluated()

    def _search_ranges(self) -> None:
        """Find those ranges anew that a width has a say in, such as those of least error."""
        searching = [
            quantizer.estimator
            for site in self._instrumentation.sites
            for quantizer in site.quantizers()
            if _depends_on_width(site, quantizer.estimator)
        ]
        for estimator in searching:
            estimator.forget()
        if searching:
            self._calibrate()

    def _evaluated(self) -> float:
        self._instrumentation.thaw()
        with torch.no_grad():
            value = self._score()
        if not math.isfinite(value):
            msg = f"the metric is {value} of {type(self.model).__name__}: it must be finite."
            raise NonFiniteError(msg)
        return value


def _depends_on_width(site: Site, estimator: RangeEstimator) -> bool:
    """Whether a range looks at the grid, or narrow codes have a zero point and wide ones none."""
    statistic, config, platform = estimator.rule.statistic, site.config, site.platform
    if statistic is None or config is None or platform is None:
        return False
    return not statistic.extremes or symmetry_of(config, platform, MIN_BITS) == "affine"


# --- files --------------------------------------------------------------------------------------


def read_sensitivities(path: Path) -> Sensitivities:
    """Read a CSV file with the columns ``site``, ``bits``, ``drop``, and perhaps ``part``.

    Raises:
        ConfigError: If the file cannot be read, lacks a column, or holds something else.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read {str(path)!r}: {error}."
        raise ConfigError(msg) from error
    if not lines or not set(_COLUMNS) <= set(lines[0]):
        msg = f"{str(path)!r} needs a header with the columns {', '.join(_COLUMNS)}, and rows."
        raise ConfigError(msg)
    places = (f"line {number} of {str(path)!r}" for number in range(2, len(lines) + 2))
    return Sensitivities([_row(line, place) for line, place in zip(lines, places, strict=True)])


def _row(line: dict[str, str], place: str) -> SensitivityRow:
    try:
        part = line.get("part") or "both"
        row = SensitivityRow(line["site"], int(line["bits"]), float(line["drop"]), part)
    except (TypeError, ValueError) as error:
        msg = f"{place}: `bits` must be an integer and `drop` a number. Found: {line}."
        raise ConfigError(msg) from error
    if not row.site or row.bits < 1 or not math.isfinite(row.drop) or row.part not in PARTS:
        msg = (
            f"{place}: `site` must be named, `bits` positive, `drop` finite, and `part` one of "
            f"{PARTS}. Found: {line}."
        )
        raise ConfigError(msg)
    return row
