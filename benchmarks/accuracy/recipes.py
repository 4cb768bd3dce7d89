"""How a network is quantized: schemes, methods of finding ranges and bit widths, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import lightning_linger as linger
from benchmarks.accuracy.tasks import TASKS, Task

Flow = Literal["float", "PTQ", "QAT", "peer"]
Fields = Mapping[str, Any]
# What stands still in the last part of QAT.
Still = Literal["nothing", "statistics", "statistics and ranges"]

BITS = (8, 6, 4, 3, 2)
# The input, the weights of the first and last layer, and the logits, as in LSQ's tables.
OUTER_BITS = 8


def changed_fields(config: linger.QuantConfig) -> Fields:
    """Return the platform and what else of a configuration is not as by default."""
    fields, default = dataclasses.asdict(config), dataclasses.asdict(linger.QuantConfig())
    changed = {name: value for name, value in fields.items() if value != default[name]}
    return {"platform": config.platform, **changed}


SCHEMES: dict[str, Fields] = {
    "linger": changed_fields(linger.preset("linger")),
    "onnxruntime": changed_fields(linger.QuantConfig(platform="onnxruntime")),
    "tflite": changed_fields(linger.preset("tflite")),
    "cambricon": changed_fields(linger.preset("cambricon")),
    "nics_fix": changed_fields(linger.preset("nics_fix", stochastic=True, gradient_bits=16)),
}

# Ranges of activations and of weights.
METHODS: dict[Flow, dict[str, Fields]] = {
    "PTQ": {
        "absmax": {"range": "absmax", "weight_range": "absmax"},
        "ema_absmax": {"range": "ema_absmax", "weight_range": "absmax"},
        "minmax": {"range": "minmax", "weight_range": "absmax"},
        "mean_minmax": {"range": "mean_minmax", "weight_range": "absmax"},
        "three_sigma": {"range": "mean_three_sigma", "weight_range": "three_sigma"},
        "99.9%": {"range": "99.9%", "weight_range": "99.9%"},
        "mse": {"range": "mse", "weight_range": "mse"},
        "kl": {"range": "kl", "weight_range": "mse"},
        "l1": {"range": "l1", "weight_range": "l1"},
    },
    "QAT": {
        "absmax": {"range": "ema_absmax", "weight_range": "absmax"},
        "last_absmax": {"range": "last_absmax", "weight_range": "absmax"},
        "99.9%": {"range": "ema_99.9%", "weight_range": "99.9%"},
        "mse": {"range": "ema_mse", "weight_range": "mse"},
        "pact": {"range": "pact", "weight_range": "mse"},
        "tqt": {"range": "tqt", "weight_range": "tqt"},
        "lsq": {"range": "lsq", "weight_range": "lsq"},
    },
}
LEARNED = ("lsq", "tqt")
LEARNED_ACTIVATIONS = (*LEARNED, "pact")
BOTH = ("linger", "onnxruntime")


@dataclass(frozen=True)
class Recipe:
    """One way from a trained float network to a quantized one.

    Args:
        scheme: What sets the arithmetic: a name of ``SCHEMES``, ``float``, or a peer.
        flow: ``float`` (more epochs without quantization), ``PTQ`` (of that float network), ``QAT``
            (the same epochs with quantization) or ``peer`` (another library's QAT).
        method: How ranges are found.
        bits: Of everything but the ends; 32 for float.
        fields: What of the configuration differs from the default.
        still: What stands still from ``Task.frozen_from`` on, ranges that are learned included;
            None for what the protocol says.
    """

    scheme: str
    flow: Flow
    method: str
    bits: int
    fields: Fields = field(default_factory=dict, compare=False)
    still: Still | None = None

    @property
    def name(self) -> str:
        """Key of its results."""
        name = f"{self.scheme} {self.flow} {self.method} {self.bits}"
        return name if self.still is None else f"{name}, still: {self.still}"

    @property
    def protocol(self) -> Still:
        """What stands still as long as ``still`` says nothing else."""
        trains_few_bits = self.flow in ("QAT", "peer") and self.bits < OUTER_BITS
        if not trains_few_bits:
            return "nothing"
        return "statistics" if self.method in LEARNED_ACTIVATIONS else "statistics and ranges"

    def with_still(self, still: Still) -> Recipe:
        """Return the recipe with something else that stands still."""
        return self if still == self.protocol else dataclasses.replace(self, still=still)

    def statistics_frozen_from(self, task: Task) -> int | None:
        """Return the first epoch in which statistics of batch norms stand still, None for none."""
        return None if (self.still or self.protocol) == "nothing" else task.frozen_from

    def ranges_frozen_from(self, task: Task) -> int | None:
        """Return the first epoch in which ranges stand still, None for none."""
        everything = (self.still or self.protocol) == "statistics and ranges"
        return task.frozen_from if everything else None

    def overrides(self, task: Task, prefix: str) -> dict[str, Fields]:
        """Return what the first and last layer differ in."""
        last: Fields = {"weight_bits": OUTER_BITS}
        if self.fields.get("output_bits") is not None:
            last = {**last, "output_bits": OUTER_BITS}
        layers = {f"{prefix}{task.last}": last}
        if task.first is not None:
            first: Fields = {"weight_bits": OUTER_BITS, "activation_bits": OUTER_BITS}
            layers[f"{prefix}{task.first}"] = first
        return layers


FLOAT = Recipe("float", "float", "", 32)


def ours(scheme: str, flow: Flow, method: str, bits: int) -> Recipe:
    """Return a recipe of this library."""
    widths: Fields = dict.fromkeys(("weight_bits", "activation_bits", "output_bits"), bits)
    if SCHEMES[scheme].get("output_bits", bits) is None:
        widths = {**widths, "output_bits": None}
    fields = {**SCHEMES[scheme], **METHODS[flow][method], **widths}
    if flow == "PTQ":
        # Neither acts without training.
        fields |= {"rounding": None, "gradient_bits": None}
    return Recipe(scheme, flow, method, bits, fields)


def peer(name: str, bits: int) -> Recipe:
    """Return a recipe of another library."""
    return Recipe(name, "peer", PEERS[name], bits)


# Which ranges the other libraries' recipes have.
PEERS: dict[str, str] = {"torchao": "ema minmax", "brevitas": "learned"}


@dataclass(frozen=True)
class Step:
    """A part of the run: recipes for some tasks.

    Args:
        tasks: Names of tasks.
        recipes: What is done for each of their seeds.
    """

    tasks: tuple[str, ...]
    recipes: tuple[Recipe, ...]


def _all(
    schemes: tuple[str, ...], flow: Flow, methods: tuple[str, ...], bits: tuple[int, ...] = BITS
) -> tuple[Recipe, ...]:
    return tuple(
        ours(scheme, flow, method, width)
        for scheme in schemes
        for method in methods
        for width in bits
    )


def _peers(names: Iterable[str], bits: tuple[int, ...]) -> tuple[Recipe, ...]:
    return tuple(peer(name, width) for name in names for width in bits)


NETWORKS = ("digits", "sequence", "attention", "kws")
# `tflite` leaves the LSTM, and what attention does between its layers, in float.
CONVOLUTIONAL = ("digits", "kws")
MAIN_BITS, OTHER_BITS = (8, 4), (6, 3, 2)
FURTHER_PTQ = ("ema_absmax", "three_sigma", "99.9%", "kl", "l1")

# One network, one scheme and these ranges and widths show what standing still is worth.
FROZEN_TASK, FROZEN_SCHEME, FROZEN_METHODS = "kws", "onnxruntime", ("absmax", "lsq")
STILL: tuple[Still, ...] = get_args(Still)
FROZEN = tuple(
    recipe.with_still(still)
    for recipe in _all((FROZEN_SCHEME,), "QAT", FROZEN_METHODS, MAIN_BITS)
    for still in STILL
)

# What matters most comes first, so that a run that is cut short has it.
PLAN: tuple[Step, ...] = (
    Step(NETWORKS, (FLOAT, *_all(BOTH, "PTQ", ("absmax", "mse")))),
    Step(NETWORKS, _all(BOTH, "QAT", ("absmax", "lsq"), MAIN_BITS)),
    Step(CONVOLUTIONAL, _all(("tflite",), "QAT", ("absmax", "lsq"), MAIN_BITS)),
    Step(("digits",), _peers(PEERS, MAIN_BITS)),
    Step(("kws",), _peers(("torchao",), BITS)),
    Step(("kws_long",), (FLOAT, *_all(BOTH, "PTQ", ("absmax", "mse"), MAIN_BITS))),
    Step(("kws_long",), _all((*BOTH, "tflite"), "QAT", ("lsq",), MAIN_BITS)),
    Step(("kws_long",), _all(BOTH, "QAT", ("tqt",), MAIN_BITS)),
    Step(("kws_long",), _peers(("torchao",), MAIN_BITS)),
    Step(NETWORKS, _all(BOTH, "QAT", ("absmax", "lsq"), OTHER_BITS)),
    Step(CONVOLUTIONAL, _all(("tflite",), "QAT", ("absmax", "lsq"), OTHER_BITS)),
    Step(("digits",), _peers(PEERS, OTHER_BITS)),
    Step(NETWORKS, _all(BOTH, "PTQ", FURTHER_PTQ)),
    Step(CONVOLUTIONAL, _all(("tflite",), "PTQ", ("absmax", "mse", *FURTHER_PTQ))),
    Step(tuple(TASKS), _all(("cambricon",), "PTQ", ("minmax", "mean_minmax"), (8,))),
    Step(NETWORKS, _all(BOTH, "QAT", ("tqt",))),
    Step(NETWORKS, _all(("nics_fix",), "QAT", ("last_absmax",))),
    Step(NETWORKS, _all(BOTH, "QAT", ("pact", "99.9%", "mse"))),
    Step(CONVOLUTIONAL, _all(("tflite",), "QAT", ("99.9%", "mse"))),
    Step((FROZEN_TASK,), tuple(recipe for recipe in FROZEN if recipe.still is not None)),
)
