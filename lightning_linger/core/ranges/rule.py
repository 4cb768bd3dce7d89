"""The name of a range estimator, taken apart."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_linger.core.errors import ConfigError
from lightning_linger.core.ranges.learned import LEARNED
from lightning_linger.core.ranges.statistics import STATISTICS, Statistic, percentile_statistic

Accumulation = Literal["all", "ema", "mean", "catch", "last"]

ACCUMULATIONS: dict[Accumulation, str] = {
    "all": "all batches together",
    "ema": "a moving average of the batches with weight 0.1, starting from the first",
    "mean": "the mean of the batches",
    "catch": "the mean of the batches with the first one counted twice, as CATCH computes it",
    "last": "the batch at hand",
}

RANGE_NAMES: tuple[str, ...] = tuple(STATISTICS)

_PREFIXED = re.compile(r"(?:(ema|mean|catch|last)_)?(.+)")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class RangeRule:
    """A statistic of values, and how batches come together.

    Args:
        name: As it was written.
        statistic: What a batch asks for; None for a fixed range.
        accumulation: How batches come together.
        fixed: The ends of a fixed range.
        learned: How the range is learned behind its first value, a name of ``LEARNED``.
    """

    name: str | float | tuple[float, float]
    statistic: Statistic | None
    accumulation: Accumulation = "all"
    fixed: tuple[float, float] | None = None
    learned: str | None = None

    @staticmethod
    def parse(spec: str | float | tuple[float, float], what: str = "`range`") -> RangeRule:
        """Read ``absmax``, ``ema_mse``, ``mean_99.9%`` or a positive number.

        Args:
            spec: The name: an accumulation (``ema_``, ``mean_``, ``catch_``, ``last_``, or nothing
                for all batches together) and a statistic. Or the absolute maximum of a fixed range,
                or its two ends.
            what: Names the argument in an error.

        Raises:
            ConfigError: If there is no such estimator.
        """
        if isinstance(spec, tuple):
            return RangeRule(spec, None, fixed=spec)
        if isinstance(spec, int | float) and not isinstance(spec, bool):
            if 0 < spec < math.inf:
                return RangeRule(spec, None, fixed=(-float(spec), float(spec)))
            raise ConfigError(_message(what, spec))
        if isinstance(spec, str) and spec in LEARNED:
            return replace(RangeRule.parse(LEARNED[spec].start), name=spec, learned=spec)
        found = _PREFIXED.fullmatch(spec) if isinstance(spec, str) else None
        if found is None:
            raise ConfigError(_message(what, spec))
        accumulation: Any = found[1] or "all"  # the pattern lets nothing else through
        percent = _PERCENT.fullmatch(found[2])
        if percent is not None and 0 < float(percent[1]) <= 100:
            return RangeRule(spec, percentile_statistic(float(percent[1])), accumulation)
        if found[2] not in STATISTICS:
            raise ConfigError(_message(what, spec))
        return RangeRule(spec, STATISTICS[found[2]], accumulation)

    @staticmethod
    def parse_weight(spec: str | float, what: str = "`weight_range`") -> RangeRule:
        """Read the rule of a weight, which is seen whole: without an accumulation.

        Args:
            spec: The name, or the absolute maximum of a fixed range.
            what: Names the argument in an error.

        Raises:
            ConfigError: If there is no such estimator for weights.
        """
        rule = RangeRule.parse(spec, what)
        if rule.learned is not None:
            start = LEARNED[rule.learned].weight_start
            if start is None:
                msg = f"{what}: {spec!r} is for activations; 'lsq' and 'tqt' are for both."
                raise ConfigError(msg)
            return replace(RangeRule.parse(start), name=spec, learned=rule.learned)
        if rule.accumulation != "all":
            msg = f"{what} sees one tensor, not batches: drop the prefix. Found: {spec!r}."
            raise ConfigError(msg)
        return rule

    @property
    def pools(self) -> bool:
        """Whether a histogram of all batches is kept."""
        return self.accumulation == "all" and self.statistic is not None and self.statistic.pools

    @property
    def clips(self) -> bool:
        """Whether the range may leave values out."""
        return self.statistic is None or not self.statistic.extremes


def _message(what: str, found: object) -> str:
    return (
        f"{what} must be a positive number, a percentile like '99.9%', or one of {RANGE_NAMES}, "
        "where 'ema_', 'mean_', 'catch_' or 'last_' in front say how batches come together, or "
        f"learned: {tuple(LEARNED)}. Found: {found!r}."
    )
