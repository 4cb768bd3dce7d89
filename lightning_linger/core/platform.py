"""What a target does differently, as data; the targets are in `lightning_linger.platforms`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_linger.core.config import Granularity, QuantConfig
from lightning_linger.core.fixed_point import FixedPointRounding
from lightning_linger.core.grid import WIDEST_AFFINE, ScaleKind, Symmetry
from lightning_linger.core.rounding import Rounding

Rescale = Literal["shift", "multiply", "fixed_point"]
Addition = Literal["round_operands", "round_sum", "left_shift"]
Averaging = Literal["scaled", "divided"]


@dataclass(frozen=True)
class Platform:
    """The arithmetic of a target and the defaults it asks for.

    Args:
        name: Name users write.
        scale: Default kind of scale.
        granularity: Default granularity of weight scales.
        rounding: Rounding wherever a result is brought to fewer bits.
        narrow_weights: Weights leave out their most negative code.
        rescale: How an accumulator is brought to the output scale: ``shift`` (exact, power-of-two
            scales, right shifts only: a result is never finer than its operands), ``multiply`` (a
            float32 multiplier, as onnxruntime's integer kernels do) or ``fixed_point`` (a 32-bit
            multiplier and a shift, TFLite; see :mod:`lightning_linger.core.fixed_point`).
        add: ``round_operands`` rounds each operand to the output scale, saturates, then adds with
            saturation (LUNA); ``round_sum`` rounds once; ``left_shift`` brings operands to a common
            scale with 20 more bits, in fixed point (TFLite).
        symmetry: Of activations of up to 8 bits.
        multiplier_rounding: How a fixed-point product is rounded.
        averaging: How a fixed-point mean divides: ``scaled`` puts the count into the multiplier,
            ``divided`` divides behind it (TFLite's older kernel for images).
        zero_point: What the engine adds to an 8-bit code to store it. Integers do not notice, but
            onnxruntime adds it to some results in float32 before it rounds them, which costs bits.
        curves: Which engine's own kernels compute the curves (sigmoid, softmax, square roots):
            ``venus``, ``arcs`` or ``venusa`` (see :mod:`lightning_linger.ops.luna`), ``tflite``
            (:mod:`lightning_linger.ops.tflite`) or ``tflite_float`` (its tables in floating point);
            ``table`` means that tables over codes and exact integer steps take their place.
        layers_only: Integers exist inside convolutions and linear layers only: their results are
            real numbers, biases are added to these in float32, and all other ops stay float.
        channel_scale: Scale kind of weights with one scale per channel, None for that of all.
        exclusive_powers: How a power-of-two step covers a range that is itself a power of two, see
            :class:`lightning_linger.core.grid.Grid`.
        unseen_step: Step of an input whose range calibration has not seen, or has seen as zero;
            None leaves such a site in float.
        unsupported: Ops its engine cannot run, and what to use instead.
        stays_float: Ops that are never quantized for it, and why.
        dialect: Export dialect the target reads, empty where no file is made for it.
        engine_name: How the dialect spells the target.
    """

    name: str
    scale: ScaleKind
    granularity: Granularity
    rounding: Rounding
    narrow_weights: bool
    rescale: Rescale
    add: Addition
    dialect: str
    engine_name: str
    zero_point: int = 0
    curves: str = "table"
    layers_only: bool = False
    channel_scale: ScaleKind | None = None
    exclusive_powers: bool = False
    unseen_step: float | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict)
    symmetry: Symmetry = "symmetric"
    multiplier_rounding: FixedPointRounding = "double"
    averaging: Averaging = "scaled"
    stays_float: Mapping[str, str] = field(default_factory=dict)

    @property
    def right_shift_only(self) -> bool:
        """Whether a result may not be finer than the accumulator it comes from."""
        return self.rescale == "shift"

    @property
    def fixed_point(self) -> bool:
        """Whether scales are 32-bit multipliers and shifts."""
        return self.rescale == "fixed_point"


def rounding_of(config: QuantConfig, platform: Platform) -> Rounding:
    """Return the rule of evaluation, integers and export: the platform's, or a chosen one."""
    chosen = config.rounding
    return platform.rounding if chosen is None or chosen == "stochastic" else chosen


def symmetry_of(config: QuantConfig, platform: Platform, bits: int) -> Symmetry:
    """Return whether activations of a width have a zero point: the platform's way, or a chosen one.

    Codes of more bits than a zero point goes with have none.
    """
    return (config.symmetry or platform.symmetry) if bits <= WIDEST_AFFINE else "symmetric"


_KNOWN: dict[str, Platform] = {}


def register_platform(platform: Platform) -> Platform:
    """Make the arithmetic of a target known to the integer ops, which carry its name."""
    _KNOWN[platform.name] = platform
    return platform


def arithmetic_of(name: str) -> Platform | None:
    """Return the target that an integer op names, None for a name that nobody registered.

    A recorder may have put a label of its own behind a ``#``.
    """
    return _KNOWN.get(name.partition("#")[0])


def fixed_point_of(name: str) -> Platform | None:
    """Return the target that an integer op names if it works in fixed point, else None."""
    platform = arithmetic_of(name)
    return platform if platform is not None and platform.fixed_point else None
