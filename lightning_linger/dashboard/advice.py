"""Which layers are worst, and what to do about each: rules as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_linger.dashboard.records import (
    EpochRecord,
    Layer,
    LayerError,
    OutputErrors,
    RunRecord,
)

# A grid of b bits that values of a normal distribution fill up to four standard deviations reaches
# 6.02 b - 7.3 dB (uniform noise of step^2 / 12).
_DECIBEL_PER_BIT = 6.02
_FILLED_GRID = -7.3
# Below that by more than this, a layer does not use its grid well.
_WASTE = 12.0
# An error that a layer was given outweighs its own by this much.
_INHERITED = 6.0
_SATURATED = 0.01
# A tenth of the signal: what few models bear in one layer.
_COARSE = 20.0
_WIDTHS = (8, 16)


@dataclass(frozen=True)
class Finding:
    """Everything a rule may look at.

    Args:
        layer: The layer.
        error: What was measured.
        exact: Whether integers must equal fake-quant.
        exponents: log2 of the step in the epochs so far.
        source: The upstream layer with the most noise of its own, None at the input.
    """

    layer: Layer
    error: LayerError
    exact: bool
    exponents: tuple[float, ...]
    source: LayerError | None

    @property
    def saturation(self) -> float:
        """Share of saturated values, 0 where it was not measured."""
        return self.error.saturation or 0.0

    @property
    def mismatch_rate(self) -> float:
        """Share of differing codes, 0 where it was not measured."""
        return self.error.mismatch_rate or 0.0

    @property
    def reachable(self) -> float:
        """SQNR in dB that the layer's narrowest grid reaches with values that fill it."""
        weight = self.layer.bits.partition("/")[0]
        bits = self.layer.output_bits or _WIDTHS[0]
        narrowest = min(bits, int(weight)) if weight.isdigit() else bits
        return _DECIBEL_PER_BIT * narrowest + _FILLED_GRID

    @property
    def module(self) -> str:
        """Dotted path of the module, as `overrides` takes it."""
        return self.layer.site.rsplit("/", 2)[0].partition("@")[0]

    @property
    def wider(self) -> int:
        """The next width of the output that targets know, bits."""
        bits = self.layer.output_bits or _WIDTHS[0]
        return next((width for width in _WIDTHS if width > bits), _WIDTHS[-1])

    @property
    def override(self) -> str:
        """The argument of QuantizeCallback that gives the layer more bits."""
        width = f"'output_bits': {self.wider}"
        if not self.layer.bits.startswith("-"):
            width += f", 'weight_bits': {self.wider}"
        return f"overrides={{'{self.module or 'type:' + self.layer.op}': {{{width}}}}}"


@dataclass(frozen=True)
class Rule:
    """One piece of advice.

    Args:
        name: Short name of what is wrong.
        applies: Whether a finding shows it.
        advice: What to say and to do.
    """

    name: str
    applies: Callable[[Finding], bool]
    advice: Callable[[Finding], str]


# The first rule that applies speaks.
RULES: tuple[Rule, ...] = (
    Rule(
        "integers differ",
        lambda f: f.exact and f.mismatch_rate > 0,
        lambda f: (
            f"{f.mismatch_rate:.2%} of the integer codes of {f.layer.label} differ from "
            "fake-quant. With power-of-two scales none may: please report it."
        ),
    ),
    Rule(
        "saturates",
        lambda f: f.saturation > _SATURATED,
        lambda f: (
            f"The activation of {f.layer.label} saturates {f.saturation:.1%}: let its range reach "
            "further (raise its output limit, percentile or fixed range, or use range='absmax'). "
            f"If the coarser step costs too much, use {f.wider} bits with {f.override}."
        ),
    ),
    Rule(
        "inherits",
        lambda f: (
            f.source is not None
            and f.error.isolated_sqnr - f.error.sqnr > _INHERITED
            and f.source.isolated_sqnr < f.error.isolated_sqnr
        ),
        lambda f: (
            f"{f.layer.label} adds {f.error.isolated_noise:.1%} noise itself but passes on "
            f"{f.error.noise:.1%}: look at {f.source.site if f.source else 'the input'} first, "
            "which makes most of it."
        ),
    ),
    Rule(
        "too coarse",
        lambda f: f.reachable - _WASTE <= f.error.isolated_sqnr < _COARSE,
        lambda f: (
            f"{f.layer.label} alone loses {f.error.isolated_noise:.0%} of its signal with "
            f"{f.layer.bits} bits (weight/input/output): give it {f.wider} with {f.override}."
        ),
    ),
    Rule(
        "wastes its grid",
        lambda f: f.error.isolated_sqnr < f.reachable - _WASTE,
        lambda f: (
            f"{f.layer.label} alone loses {f.error.isolated_noise:.1%} of its signal "
            f"({f.error.isolated_sqnr:.0f} dB, where its bits allow {f.reachable:.0f} dB): a few "
            "large values stretch its range, or its weights are uneven. Limit its output or its "
            f"weights with NormalizeCallback, or give it {f.wider} bits with {f.override}."
        ),
    ),
    Rule(
        "step jumps",
        lambda f: f.exact and len({round(e) for e in f.exponents[-4:]}) > 1,
        lambda f: (
            f"The step of {f.layer.label} moves between powers of two "
            f"({', '.join(f'2^{e:.0f}' for e in f.exponents[-4:])}): its range lies on a border. "
            "Limit its output just below it with NormalizeCallback(overrides=...)."
        ),
    ),
    Rule(
        "rounding ties",
        lambda f: f.mismatch_rate > 0,
        lambda f: (
            f"{f.mismatch_rate:.2%} of the integer codes of {f.layer.label} are rounding ties of "
            "free scales. No action, unless decisions change."
        ),
    ),
    Rule(
        "fine",
        lambda f: True,
        lambda f: (
            f"{f.layer.label} is as good as its bits allow "
            f"({f.error.isolated_noise:.1%} noise of its own)."
        ),
    ),
)


@dataclass(frozen=True)
class Advice:
    """What to do about one layer.

    Args:
        error: What was measured.
        rule: Name of the rule that speaks.
        text: What it says.
    """

    error: LayerError
    rule: str
    text: str


def advise(record: RunRecord, count: int | None = None) -> list[Advice]:
    """Return advice for the layers of the latest epoch, the worst first.

    Worst is what differs in integers although it must not, then what makes the most noise itself.

    Args:
        record: The run.
        count: How many layers; None for all.
    """
    latest = record.latest
    if latest is None:
        return []
    ranked = rank(latest, record.exact)[:count]
    sources = _sources(record, latest)
    found = []
    for error in ranked:
        exponents = tuple(
            row.exponent
            for epoch in record.measured
            for row in epoch.layers
            if row.site == error.site and row.exponent is not None
        )
        finding = Finding(
            record.layer(error.site), error, record.exact, exponents, sources.get(error.site)
        )
        rule = next(rule for rule in RULES if rule.applies(finding))
        found.append(Advice(error, rule.name, rule.advice(finding)))
    return found


def rank(epoch: EpochRecord, exact: bool) -> list[LayerError]:
    """Return the layers of an epoch, the worst first."""
    return sorted(
        epoch.layers,
        key=lambda row: (-(row.mismatch_rate or 0.0) if exact else 0.0, row.isolated_sqnr),
    )


def judge_outputs(outputs: OutputErrors) -> str:
    """Say what the errors of the model's output mean for the task."""
    sentences = []
    if outputs.decisions_changed is not None:
        sentences.append(
            f"Quantization changes {outputs.decisions_changed:.2%} of the decisions of the same "
            "weights in float; an accuracy cannot differ by more than that."
        )
    elif outputs.sqnr is not None:
        sentences.append(f"The output's SQNR against float is {outputs.sqnr:.1f} dB.")
    if outputs.mismatch_rate == 0:
        sentences.append("The integer model returns exactly what fake-quant returns.")
    elif outputs.mismatch_rate is not None:
        changed = outputs.integer_decisions_changed
        decisions = f", {changed:.2%} of its decisions" if changed is not None else ""
        sentences.append(
            f"{outputs.mismatch_rate:.2%} of the integer model's output values differ from "
            f"fake-quant{decisions}."
        )
    return " ".join(sentences)


def _sources(record: RunRecord, epoch: EpochRecord) -> dict[str, LayerError]:
    """Return, by site, the upstream layer with the most noise of its own."""
    errors = {row.site: row for row in epoch.layers}
    found: dict[str, LayerError] = {}
    for layer in record.layers:
        candidates = [found[site] for site in layer.inputs if site in found]
        candidates += [errors[site] for site in layer.inputs if site in errors]
        if candidates:
            found[layer.site] = min(candidates, key=lambda row: row.isolated_sqnr)
    return found


def markdown(advice: Sequence[Advice], outputs: OutputErrors) -> str:
    """Return the advice as a Markdown table, below what it means for the task."""
    lines = [
        judge_outputs(outputs),
        "",
        "| layer | noise | of its own | saturated | advice |",
        "|---|---|---|---|---|",
    ]
    for item in advice:
        row = item.error
        cells = (
            f"`{row.site}`",
            f"{row.noise:.1%}",
            f"{row.isolated_noise:.1%}",
            "" if row.saturation is None else f"{row.saturation:.1%}",
            f"**{item.rule}**: {item.text}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
