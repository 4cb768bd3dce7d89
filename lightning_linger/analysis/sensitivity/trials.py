"""Trying out a width at one layer, or at all but one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from lightning_linger.analysis.sensitivity.table import PARTS, Part, SensitivityRow
from lightning_linger.analysis.sensitivity.units import Unit, measured_layers, widths_for
from lightning_linger.core.errors import ConfigError, NonFiniteError
from lightning_linger.core.grid import MIN_BITS
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.platform import symmetry_of
from lightning_linger.core.progress import with_progress
from lightning_linger.core.ranges import RangeEstimator
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import WIDEST_OPERAND
from lightning_linger.core.widths import widths_of
from lightning_linger.simulate.divergence import Forward
from lightning_linger.stages.calibrate import learning_ranges
from lightning_linger.stages.trial import plan_again

Mode = Literal["one_at_a_time", "all_but_one"]

MODES: tuple[Mode, ...] = ("one_at_a_time", "all_but_one")


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


class Trials:
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
