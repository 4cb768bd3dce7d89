"""Range estimators: what range of real values a quantizer has to cover."""

from lightning_linger.core.ranges.estimator import EMA_WEIGHT, RangeEstimator
from lightning_linger.core.ranges.learned import LEARNED, LearnedScale
from lightning_linger.core.ranges.learned_affine import LearnedRange
from lightning_linger.core.ranges.rule import ACCUMULATIONS, RANGE_NAMES, RangeRule
from lightning_linger.core.ranges.statistics import STATISTICS, Statistic

__all__ = [
    "ACCUMULATIONS",
    "EMA_WEIGHT",
    "LEARNED",
    "RANGE_NAMES",
    "STATISTICS",
    "LearnedRange",
    "LearnedScale",
    "RangeEstimator",
    "RangeRule",
    "Statistic",
]
