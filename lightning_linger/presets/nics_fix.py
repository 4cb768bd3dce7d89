"""NICS-fix's fixed-point training: scales 2^x, ranges of each batch, gradients on a grid."""

from enum import IntEnum
from typing import Any

from lightning_linger.core.config import QuantConfig, require_bits
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.grid import MIN_BITS
from lightning_linger.core.tags import WIDEST_OPERAND


class RangeMethod(IntEnum):
    """How the range of a tensor is chosen, with NICS-fix's names and numbers."""

    RANGE_MAX = 0
    RANGE_3SIGMA = 1
    RANGE_MAX_TENPERCENT = 2
    RANGE_SWEEP = 3


STATISTICS: dict[RangeMethod, str] = {
    RangeMethod.RANGE_MAX: "absmax",
    RangeMethod.RANGE_3SIGMA: "three_sigma",
    RangeMethod.RANGE_MAX_TENPERCENT: "top_tenth",
    RangeMethod.RANGE_SWEEP: "l1",
}


def nics_fix_config(
    bitwidth: int = 8,
    range_method: int = RangeMethod.RANGE_MAX,
    stochastic: bool = False,
    float_scale: bool = False,
    **fields: Any,
) -> QuantConfig:
    """Return NICS-fix's configuration; ``gradient_bits=16`` puts gradients on a grid too.

    Args:
        bitwidth: Of weights, inputs and results.
        range_method: Number of a :class:`RangeMethod`, for every kind of value.
        stochastic: Whether training rounds up or down by chance; nearest otherwise.
        float_scale: Whether scales are of any value.
        **fields: Of :class:`QuantConfig`.

    Raises:
        ConfigError: If a value is not allowed.
    """
    require_bits("bitwidth", bitwidth, MIN_BITS, WIDEST_OPERAND)
    if isinstance(range_method, bool) or range_method not in list(RangeMethod):
        msg = f"`range_method` must be one of {[*map(int, RangeMethod)]}. Found: {range_method!r}."
        raise ConfigError(msg)
    for name, value in (("stochastic", stochastic), ("float_scale", float_scale)):
        if not isinstance(value, bool):
            msg = f"`{name}` must be True or False. Found: {value!r}."
            raise ConfigError(msg)
    statistic = STATISTICS[RangeMethod(range_method)]
    engine = {"platform": "onnxruntime", "granularity": "tensor"} if float_scale else {}
    return QuantConfig().override(
        {
            **engine,
            **dict.fromkeys(("weight_bits", "activation_bits", "output_bits"), bitwidth),
            "range": f"last_{statistic}",
            "weight_range": statistic,
            "gradient_range": f"last_{statistic}",
            "statistics_range": statistic,
            "rounding": "stochastic" if stochastic else None,
            **dict.fromkeys(("ahead_conv_relu", "ahead_bn_relu", "ahead_linear_relu"), False),
            **fields,
        }
    )
