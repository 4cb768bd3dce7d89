"""Frozen configuration dataclasses. Every field is a plain value that YAML can hold."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.core.grid import MAX_BITS, MIN_BITS, ScaleKind, Symmetry
from lightning_linger.core.ranges import RangeRule
from lightning_linger.core.rounding import ROUNDINGS, STOCHASTIC, TrainingRounding

Granularity = Literal["tensor", "channel", "input_channel"]
FuseMode = Literal["running", "batch", "frozen"]
FUSE_MODES: tuple[FuseMode, ...] = ("running", "batch", "frozen")
LimitGradient = Literal["zero", "pull"]
RNNFusion = bool | Literal["compiled"]


@dataclass(frozen=True)
class QuantConfig:
    """How a site is quantized.

    Args:
        platform: Name of the target, see :mod:`lightning_linger.platforms`.
        weight_bits: Width of weights, 2 to 16.
        activation_bits: Width that a site's *input* must have, 2 to 16; where a producer has
            another width the value is requantized.
        output_bits: Width of a site's own output, 2 to 32; None gives float results from integer
            inputs and weights.
        bias_bits: Width of biases at scale ``step_x * step_w``, 8 to 32.
        scale: ``power_of_two`` or ``free``; None takes the platform's.
        granularity: Of weight scales: ``tensor``, ``channel`` (of the output), ``input_channel``,
            or a number of input channels that share a scale in each output channel; None takes the
            platform's. The last two are for linear layers and convolutions with power-of-two
            scales, where a weight is an integer of up to 16 bits; other weights have one scale.
        symmetry: Of activations of up to 8 bits: ``symmetric`` around zero, or ``affine``, with two
            ends and a zero point; None takes the platform's. Weights, and wider activations, are
            symmetric.
        rounding: None takes the platform's. ``stochastic`` rounds up or down by chance in training
            and as the platform in evaluation, integers and export.
        narrow_weights: Whether weights leave out their most negative code; None takes the
            platform's.
        strict_maximum: Whether a power-of-two step keeps the end of a range within the codes, where
            by default a range of exactly a power of two keeps every bit and its end saturates.
        seed: Of stochastic rounding.
        range: Range estimator of activations, e.g. ``ema_absmax``, ``mean_mse`` or ``99.9%``
            (see :mod:`lightning_linger.core.ranges`), a number for a fixed range, or ``lsq``,
            ``tqt`` or ``pact`` to learn it.
        data_scale: What the ranges that activations ask for are multiplied with (Cambricon); not
            those of weights, and not those given as a number.
        weight_range: Range estimator of weights, without ``ema_``, ``mean_`` or ``last_``: a weight
            is always seen whole. Beyond its range a weight is clipped and has no gradient. ``lsq``
            and ``tqt`` learn it; batch norms, selections and products with a weight keep the
            estimator that learning starts from.
        gradient_bits: Width of gradients, 2 to 16; None leaves them in float. The gradients of
            activations are rounded where they enter the layer that made them, those of weights and
            biases of layers before the mask of clipped values.
        gradient_range: Range estimator of gradients, or a number for a fixed range.
        statistics_bits: Width of the running mean and variance of batch norms, folded or not, each
            on a grid of its own, in evaluation, integers and export; training moves them in float.
            None leaves them in float.
        statistics_range: Their range estimator, of the names of ``weight_range``; not learned.
        ahead_conv_relu: A convolution whose only consumer is a ReLU spends its codes on the
            positive side (linger).
        ahead_bn_relu: The same for a batch norm, folded or not.
        ahead_linear_relu: The same for a linear layer.
        strict_platform: Make an op that the platform's engine cannot run an error at set-up.
        fused_rnn: A recurrent layer multiplies its whole input sequence with the input weights at
            once, and steps through time for the recurrent part only; False does everything step by
            step, with the same bits and less memory; ``"compiled"`` compiles the steps too, again
            with the same bits (see :func:`lightning_linger.fused_rnn`).
    """

    platform: str = "venusa"
    weight_bits: int = 8
    activation_bits: int = 8
    output_bits: int | None = 8
    bias_bits: int = 32
    scale: ScaleKind | None = None
    granularity: Granularity | int | None = None
    symmetry: Symmetry | None = None
    rounding: TrainingRounding | None = None
    range: str | float = "ema_absmax"
    weight_range: str | float = "absmax"
    gradient_bits: int | None = None
    gradient_range: str | float = "last_absmax"
    ahead_conv_relu: bool = True
    ahead_bn_relu: bool = True
    ahead_linear_relu: bool = True
    strict_platform: bool = False
    fused_rnn: RNNFusion = True
    narrow_weights: bool | None = None
    strict_maximum: bool = False
    seed: int = 0
    statistics_bits: int | None = None
    statistics_range: str | float = "absmax"
    data_scale: float = 1.0

    def __post_init__(self) -> None:
        require_bits("weight_bits", self.weight_bits, MIN_BITS, 16)
        require_bits("activation_bits", self.activation_bits, MIN_BITS, 16)
        require_bits("bias_bits", self.bias_bits, 8, MAX_BITS)
        if self.output_bits is not None:
            require_bits("output_bits", self.output_bits, MIN_BITS, MAX_BITS)
        if self.statistics_bits is not None:
            require_bits("statistics_bits", self.statistics_bits, MIN_BITS, 16)
        if self.gradient_bits is not None:
            require_bits("gradient_bits", self.gradient_bits, MIN_BITS, 16)
        _require_choice("scale", self.scale, ("power_of_two", "free", None))
        if type(self.granularity) is not int or self.granularity < 1:
            choices = ("tensor", "channel", "input_channel", None)
            _require_choice("granularity", self.granularity, choices, "or a group size")
        _require_choice("symmetry", self.symmetry, ("symmetric", "affine", None))
        _require_choice("rounding", self.rounding, (*ROUNDINGS, STOCHASTIC, None))
        _require_choice("narrow_weights", self.narrow_weights, (True, False, None))
        _require_choice("strict_maximum", self.strict_maximum, (True, False))
        if type(self.data_scale) not in (int, float) or not 0 < self.data_scale < math.inf:
            msg = f"`data_scale` must be a positive number. Found: {self.data_scale!r}."
            raise ConfigError(msg)
        if type(self.seed) is not int or self.seed < 0:
            msg = f"`seed` must be a non-negative integer. Found: {self.seed!r}."
            raise ConfigError(msg)
        check_fusion(self.fused_rnn)
        RangeRule.parse(self.range)
        RangeRule.parse_weight(self.weight_range)
        if RangeRule.parse_weight(self.statistics_range, "`statistics_range`").learned is not None:
            msg = f"`statistics_range` cannot be learned. Found: {self.statistics_range!r}."
            raise ConfigError(msg)
        if RangeRule.parse(self.gradient_range, "`gradient_range`").learned is not None:
            msg = f"`gradient_range` cannot be learned. Found: {self.gradient_range!r}."
            raise ConfigError(msg)

    def override(self, fields: dict[str, Any]) -> "QuantConfig":
        """Return a copy with some fields replaced, after checking their names."""
        changed: QuantConfig = override(self, fields)
        return changed


@dataclass(frozen=True)
class Limit:
    """An upper bound for absolute values.

    Args:
        kind: ``static`` (the value itself), ``mean`` (a multiple of the mean absolute value) or
            ``percentile`` (of the absolute values, 0 to 100).
        value: The bound, the multiple, or the percentile.
    """

    kind: Literal["static", "mean", "percentile"]
    value: float

    @staticmethod
    def parse(spec: "float | str | Limit") -> "Limit":
        """Read ``8.0`` (static), ``"7*mean"`` or ``"99.9%"``."""
        if isinstance(spec, Limit):
            limit = spec
        elif isinstance(spec, int | float) and not isinstance(spec, bool):
            limit = Limit("static", float(spec))
        elif isinstance(spec, str) and (
            found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*\*\s*mean", spec)
        ):
            limit = Limit("mean", float(found[1]))
        elif isinstance(spec, str) and (found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", spec)):
            limit = Limit("percentile", float(found[1]))
        else:
            msg = f"a limit is a positive number, '7*mean' or '99.9%'. Found: {spec!r}."
            raise ConfigError(msg)
        top = 100.0 if limit.kind == "percentile" else math.inf
        if not 0 < limit.value <= top or math.isinf(limit.value):
            msg = f"a {limit.kind} limit must be in (0, {top}]. Found: {limit.value}."
            raise ConfigError(msg)
        return limit


@dataclass(frozen=True)
class NormalizeConfig:
    """Range limits of the constrained float stage (linger's ``normalize_layers``).

    Args:
        weight: Limit of weights: a number, ``"7*mean"`` (a multiple of the mean absolute value),
            ``"99.9%"`` (a percentile), or None for no limit.
        bias: Limit of biases, likewise.
        output: Limit of layer outputs, likewise; a dynamic one is averaged over training steps.
        gradient: Outside a limit the gradient is ``zero``, or linger's constant ``pull`` of
            +-0.01 back inside.
    """

    weight: float | str | None = 8.0
    bias: float | str | None = None
    output: float | str | None = 8.0
    gradient: LimitGradient = "zero"

    def __post_init__(self) -> None:
        for spec in (self.weight, self.bias, self.output):
            if spec is not None:
                Limit.parse(spec)
        _require_choice("gradient", self.gradient, ("zero", "pull"))

    def override(self, fields: dict[str, Any]) -> "NormalizeConfig":
        """Return a copy with some fields replaced, after checking their names."""
        changed: NormalizeConfig = override(self, fields)
        return changed


@dataclass(frozen=True)
class FuseConfig:
    """How batch norms are folded into the layer before them.

    Args:
        mode: ``running`` (one convolution with the running statistics, batch norm on its output),
            ``batch`` (fold with the batch's statistics, two convolutions; linger's way) or
            ``frozen`` (running statistics, which no longer move).
    """

    mode: FuseMode = "running"

    def __post_init__(self) -> None:
        _require_choice("mode", self.mode, FUSE_MODES)


def override(config: Any, fields: dict[str, Any]) -> Any:
    """Return ``dataclasses.replace(config, **fields)`` with a readable error for a wrong name."""
    known = [field.name for field in dataclasses.fields(config)]
    for name in fields:
        if name not in known:
            msg = (
                f"{type(config).__name__} has no field {name!r}. Similar: "
                f"{near_matches(name, known)}."
            )
            raise ConfigError(msg)
    return dataclasses.replace(config, **fields)


def check_fusion(value: RNNFusion) -> RNNFusion:
    """Return a value of ``fused_rnn``, and refuse any other."""
    if type(value) is not bool and value != "compiled":
        msg = f"`fused_rnn` must be True, False or 'compiled'. Found: {value!r}."
        raise ConfigError(msg)
    return value


def require_bits(name: str, bits: object, low: int, high: int) -> None:
    """Refuse what is no width from ``low`` to ``high``."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not low <= bits <= high:
        msg = f"`{name}` must be an integer from {low} to {high}. Found: {bits!r}."
        raise ConfigError(msg)


def _require_choice(
    name: str, value: object, choices: tuple[object, ...], also: str | None = None
) -> None:
    if value not in choices:
        more = "" if also is None else f", {also}"
        msg = f"`{name}` must be one of {choices}{more}. Found: {value!r}."
        raise ConfigError(msg)
