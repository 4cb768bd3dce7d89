"""What a rule of `linger.check` is made of.

A rule looks at one measure of the layers of some kinds, and says which values are allowed. Kinds
and measures are those of :mod:`lightning_linger.analysis.layers` and
:mod:`lightning_linger.analysis.measures`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

# `error`: the model cannot be deployed; `warning`: it can, at a price, or with a result that nobody
# compared; `note`: what whoever packs it has to know.
Severity = Literal["error", "warning", "note"]
# How it is known: results of the engine, what the packer does, sources that were read and not run,
# or that this library's own export refuses it.
Evidence = Literal["engine", "packer", "sources", "export"]

# Kinds of layers whose weights are read from a buffer that is filled ahead of time.
PREFETCHED = ("conv", "conv1d", "deconv", "linear", "layer_norm", "lstm")
CONVOLUTIONS = ("conv", "conv1d", "deconv")
# Kinds of layers that compute on codes of 8 bits.
NARROW = (
    *(*CONVOLUTIONS, "linear", "matmul", "max_pool", "avg_pool", "softmax", "log_softmax"),
    *("layer_norm", "add", "mul", "cat", "lstm"),
)
CURVES = ("sigmoid", "tanh")


# --- allowed values -----------------------------------------------------------------------------


class Allowed(Protocol):
    """A set of values, whose text completes a sentence."""

    def admits(self, value: Any) -> bool:
        """Whether a value is in it; a tuple is if all its entries are."""


@dataclass(frozen=True)
class Between:
    """Whole numbers from ``least`` to ``most``, as in ``1 to 5``."""

    least: int
    most: int

    def admits(self, value: Any) -> bool:
        """Whether all numbers are inside."""
        return all(self.least <= number <= self.most for number in _entries(value))

    def __str__(self) -> str:
        return f"{self.least} to {self.most}"


@dataclass(frozen=True)
class AtLeast:
    """Numbers from ``least``."""

    least: int

    def admits(self, value: Any) -> bool:
        """Whether no number is smaller."""
        return all(number >= self.least for number in _entries(value))

    def __str__(self) -> str:
        return f"{self.least}"


@dataclass(frozen=True)
class AtMost:
    """Numbers up to ``most``."""

    most: int

    def admits(self, value: Any) -> bool:
        """Whether no number is larger."""
        return all(number <= self.most for number in _entries(value))

    def __str__(self) -> str:
        return f"{self.most}"


@dataclass(frozen=True)
class OneOf:
    """One of some values, as in ``1, 2 or 4``."""

    values: tuple[Any, ...]

    def admits(self, value: Any) -> bool:
        """Whether a value, or every entry of a tuple, is among them."""
        return value in self.values or (
            isinstance(value, tuple) and all(entry in self.values for entry in value)
        )

    def __str__(self) -> str:
        *most, last = map(str, self.values)
        return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True)
class Never:
    """Nothing: whatever the rule applies to is a finding."""

    def admits(self, value: Any) -> bool:
        """No."""
        return False

    def __str__(self) -> str:
        return "never"


def _entries(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


# --- rules --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One limit of one engine.

    Args:
        name: What it is called in findings, unique within a platform.
        layers: Kinds of layers it applies to, or ``model``.
        measure: What is looked at.
        allowed: Which values are fine.
        sentence: What is allowed; ``{allowed}`` stands for the values.
        remedy: What to do about a finding.
        severity: How bad a finding is.
        when: Traits that a layer must have for the rule to apply.
        unless: Traits with which the rule does not apply.
        evidence: How it is known.
    """

    name: str
    layers: tuple[str, ...]
    measure: str
    allowed: Allowed
    sentence: str
    remedy: str
    severity: Severity = "error"
    when: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    evidence: Evidence = "packer"

    @property
    def text(self) -> str:
        """The sentence with its values."""
        return self.sentence.format(allowed=self.allowed)

    def applies_to(self, kind: str, traits: frozenset[str]) -> bool:
        """Whether the rule is about layers of a kind with these traits."""
        return (
            kind in self.layers and traits.issuperset(self.when) and not traits & set(self.unless)
        )


@dataclass(frozen=True)
class Workspace:
    """What layers of an engine need beside their operands and results, in bytes per element.

    Args:
        linear: Per element of a linear layer's input and of its result.
        softmax: Per element of a softmax's input and per value along its axis.
        average: Per result of an average pool over a power of two of values; others take 8.
        curve: Per element of a sigmoid's input.
        recurrent_weights: Whether the weights of an LSTM are copied there.
        most: Some layers work in pieces of so many bytes.
    """

    linear: tuple[int, int] = (1, 0)
    softmax: tuple[int, int] = (6, 4)
    average: int = 4
    curve: int = 4
    recurrent_weights: bool = True
    most: int = 65536


@dataclass(frozen=True)
class Engine:
    """Sizes of an engine, in bytes where nothing else is said.

    Args:
        share_memory: What activations, workspace and prefetched weights share.
        psram: What all weights, and activations that are too large for the former, share.
        kernel: Largest kernel of a convolution.
        dilated_kernel: Largest kernel of one with dilation.
        line_kernel: Largest kernel of a transposed or a one-dimensional convolution, and of a
            maximum pool.
        padding: Most zeros at an edge.
        dilations: Allowed dilations.
        rows: What as many input rows as the kernel is high may take.
        depthwise_rows: The same for a depthwise convolution.
        padded_rows: The same with channels rounded up further, as the engine stores them.
        padded_depthwise_rows: The same for a depthwise convolution.
        channels: To what channels are rounded up when the packer looks at rows.
        padded_channels: To what they are rounded up in memory.
        padded_depthwise_channels: The same for a depthwise convolution.
        columns: To what columns are rounded up in memory, times the stride.
        weights: What the weights of one pass of a convolution may take.
        depthwise_weights: What all weights of a depthwise convolution may take, None for no limit.
        outputs: What the results of one pass of a convolution may take.
        weight_channels: To what output channels are rounded up in weights.
        depthwise_weight_channels: The same for a depthwise convolution.
        depthwise_weight_rows: To what rows of a depthwise kernel are rounded up.
        large_pool: Pools with a larger kernel are computed without the rows' limit.
        features: Most input features of a linear layer.
        external_split: Whether a convolution with more weights becomes several, one after another.
        largest_activation: Activations with more bytes lie in PSRAM.
        workspace: What layers need beside operands and results.
    """

    share_memory: int
    psram: int = 8 << 20
    kernel: int = 5
    dilated_kernel: int = 12
    line_kernel: int = 12
    padding: int = 11
    dilations: tuple[int, ...] = (1, 2, 4, 8)
    rows: int = 65536
    depthwise_rows: int = 32768
    padded_rows: int = 65536
    padded_depthwise_rows: int = 32768
    channels: int = 2
    padded_channels: int = 8
    padded_depthwise_channels: int = 8
    columns: int = 8
    weights: int = 32768
    depthwise_weights: int | None = None
    outputs: int = 65536
    weight_channels: int = 2
    depthwise_weight_channels: int = 8
    depthwise_weight_rows: int = 1
    large_pool: int = 7
    features: int = 81920
    external_split: bool = False
    largest_activation: int = 640 << 10
    workspace: Workspace = field(default_factory=Workspace)


@dataclass(frozen=True)
class Limits:
    """What is known about deploying on one platform.

    Args:
        platform: Name of the platform.
        rules: Its rules.
        engine: Sizes of its engine, None where there is no memory plan to estimate.
        about: Sentences for the page of limits.
    """

    platform: str
    rules: tuple[Rule, ...]
    engine: Engine | None = None
    about: str = ""
    by_name: dict[str, Rule] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        found = {rule.name: rule for rule in self.rules}
        if len(found) != len(self.rules):
            msg = f"two rules of platform {self.platform!r} have one name."
            raise ValueError(msg)
        object.__setattr__(self, "by_name", found)


RESULT_SIZE = Rule(
    "result_size",
    ("result_size",),
    "op",
    Never(),
    "the size of a result does not depend on values",
    "use `masked_fill` or `where`, or choose outside the model",
    evidence="export",
)


def setting_rules(platform: str, granularity: str | None, rounding: str) -> tuple[Rule, ...]:
    """Return which settings of the quantize stage a platform can take."""
    scales = Rule(
        "granularity",
        ("setting",),
        "granularity",
        OneOf((granularity,)),
        "weights have one scale per {allowed}",
        "leave `granularity` to the platform",
        evidence="export",
    )
    return (
        *([] if granularity is None else [scales]),
        Rule(
            "rounding",
            ("setting",),
            "rounding",
            OneOf((rounding,)),
            "results are rounded {allowed}",
            "leave `rounding` to the platform",
            evidence="engine",
        ),
        other_platform(platform),
    )


def other_platform(platform: str) -> Rule:
    """Return the rule that a model is quantized for the platform it is checked for."""
    return Rule(
        "other_platform",
        ("setting",),
        "platform",
        OneOf((platform,)),
        "the model is quantized for the platform that it is checked for",
        "quantize it for this platform",
        severity="warning",
        evidence="export",
    )
