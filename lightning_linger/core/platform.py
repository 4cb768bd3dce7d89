"""What a target does differently, as data; the targets are in `lightning_linger.platforms`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_linger.core.config import Granularity, QuantConfig
from lightning_linger.core.grid import ScaleKind
from lightning_linger.core.rounding import Rounding


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
            scales, right shifts only: a result is never finer than its operands) or ``multiply``
            (a float32 multiplier, as onnxruntime's integer kernels do).
        add: ``round_operands`` rounds each operand to the output scale, saturates, then adds with
            saturation (LUNA); ``round_sum`` rounds once.
        zero_point: What the engine adds to an 8-bit code to store it. Integers do not notice, but
            onnxruntime adds it to some results in float32 before it rounds them, which costs bits.
        curves: Which engine's own kernels compute the curves (sigmoid, softmax, square roots):
            ``venus``, ``arcs`` or ``venusa`` (see :mod:`lightning_linger.ops.luna`); ``table``
            means that tables over codes and exact integer steps take their place.
        layers_only: Integers exist inside convolutions and linear layers only: their results are
            real numbers, biases are added to these in float32, and all other ops stay float.
        channel_scale: Scale kind of weights with one scale per channel, None for that of all.
        exclusive_powers: How a power-of-two step covers a range that is itself a power of two, see
            :class:`lightning_linger.core.grid.Grid`.
        unseen_step: Step of an input whose range calibration has not seen, or has seen as zero;
            None leaves such a site in float.
        unsupported: Ops its engine cannot run, and what to use instead.
        dialect: Export dialect the target reads.
        engine_name: How the dialect spells the target.
    """

    name: str
    scale: ScaleKind
    granularity: Granularity
    rounding: Rounding
    narrow_weights: bool
    rescale: str
    add: str
    dialect: str
    engine_name: str
    zero_point: int = 0
    curves: str = "table"
    layers_only: bool = False
    channel_scale: ScaleKind | None = None
    exclusive_powers: bool = False
    unseen_step: float | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict)

    @property
    def right_shift_only(self) -> bool:
        """Whether a result may not be finer than the accumulator it comes from."""
        return self.rescale == "shift"


def rounding_of(config: QuantConfig, platform: Platform) -> Rounding:
    """Return the rule of evaluation, integers and export: the platform's, or a chosen one."""
    chosen = config.rounding
    return platform.rounding if chosen is None or chosen == "stochastic" else chosen


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
