"""Whether a model can be deployed, told before it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_linger.analysis.layers import Layer
from lightning_linger.analysis.measures import MEASURES, Measured
from lightning_linger.analysis.memory import MODEL_MEASURES, Plan, plan_memory
from lightning_linger.analysis.planning import planned, walked
from lightning_linger.core.instrumentation import Instrumentation
from lightning_linger.core.sites import Site
from lightning_linger.core.table import Table
from lightning_linger.platforms.limits import limits_of
from lightning_linger.platforms.rules import Engine, Limits, Rule, Severity

# Where a finding is about the model as a whole.
MODEL = "<model>"

_ORDER: tuple[Severity, ...] = ("error", "warning", "note")
_NO_ENGINE = Engine(share_memory=0)


@dataclass(frozen=True)
class Finding:
    """One thing that stands in the way, costs something, or has to be known.

    Args:
        site: Site key, ``<model>`` for the whole.
        rule: Name of the rule, see the page of platform limits.
        found: What the model has.
        allowed: What the rule allows.
        severity: ``error``: it cannot be deployed; ``warning``: it can, at a price, or with a
            result that nobody compared; ``note``: what whoever packs it has to know.
        remedy: What to do.
    """

    site: str
    rule: str
    found: str
    allowed: str
    severity: Severity
    remedy: str


class Findings(Table[Finding]):
    """The findings of a check, errors first, which print as a table; none if all is well.

    Args:
        findings: The findings.
        platform: Name of the platform.
    """

    row_type = Finding

    def __init__(self, findings: Iterable[Finding], platform: str) -> None:
        super().__init__(sorted(findings, key=lambda finding: _ORDER.index(finding.severity)))
        self.platform = platform

    @property
    def deployable(self) -> bool:
        """Whether no finding is an error."""
        return not self.of("error")

    def of(self, severity: Severity) -> list[Finding]:
        """Return the findings of one severity."""
        return [finding for finding in self if finding.severity == severity]

    def __str__(self) -> str:
        """Return a plain-text table under a line that sums it up."""
        summary = self.summary()
        return f"{summary}\n{super().__str__()}" if len(self) else summary

    def summary(self) -> str:
        """Return how many findings there are, in one line."""
        counts = [(len(self.of(severity)), severity) for severity in _ORDER]
        named = [f"{count} {severity}{'s' * (count > 1)}" for count, severity in counts if count]
        verdict = "can be deployed" if self.deployable else "cannot be deployed"
        return f"{self.platform}: {verdict}" + (f" ({', '.join(named)})" if named else "")


def check(
    model: nn.Module,
    platform: str | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
) -> Findings:
    """Check a model against everything that is known about a target.

    Nothing runs but the forward that finds the sites of a plain model, and the model is left as it
    was. A model that is not quantized yet is checked as `QuantizeCallback` would quantize it: with
    8 bits, batch norms folded.

    Args:
        model: A prepared model, quantized or not, or a plain one together with example inputs.
            Sizes are those of the inputs it was prepared with.
        platform: Name of the target; None takes the one that the model is quantized for, else
            ``venusa``.
        example_inputs: Positional inputs of one forward, for a plain model.
        example_kwargs: Keyword inputs.

    Returns:
        The findings, which are a list of :class:`Finding`; empty if all is well.

    Raises:
        ConfigError: If the platform is unknown, or a plain model comes without example inputs.
        UnsupportedError: If nothing in the model can be quantized.
    """
    with planned(model, platform, example_inputs, example_kwargs) as (instrumentation, target):
        limits = limits_of(target.name)
        walk = walked(instrumentation, target)
        findings = [
            *_of_settings(limits, instrumentation),
            *_of_layers(limits, walk.layers),
        ]
        if limits.engine is not None:
            findings += _of_model(limits, plan_memory(walk, limits.engine))
        return Findings(dict.fromkeys(findings), target.name)


def _of_layers(limits: Limits, layers: Iterable[Layer]) -> Iterator[Finding]:
    engine = limits.engine or _NO_ENGINE
    for layer in layers:
        for rule in limits.rules:
            if rule.applies_to(layer.kind, layer.traits):
                found = MEASURES[rule.measure](layer, engine)
                if found is not None and not rule.allowed.admits(found.value):
                    yield _finding(layer.site, rule, found, layer.facts.get("instead", ""))


def _of_model(limits: Limits, plan: Plan) -> Iterator[Finding]:
    for rule in limits.rules:
        if "model" in rule.layers:
            found = MODEL_MEASURES[rule.measure](plan)
            if not rule.allowed.admits(found.value):
                yield _finding(MODEL, rule, found)


def _of_settings(limits: Limits, instrumentation: Instrumentation) -> Iterator[Finding]:
    """Look at how sites are quantized; a setting that is the same everywhere is one finding."""
    quantized = [site for site in instrumentation.sites if site.quantized]
    for rule in limits.rules:
        if "setting" not in rule.layers:
            continue
        found = {site.key: _setting(rule.measure, site) for site in quantized}
        if len(set(found.values())) == 1:
            found = {MODEL: found.popitem()[1]}
        for place, value in found.items():
            if not rule.allowed.admits(value):
                yield _finding(place, rule, Measured(value, value))


def _setting(name: str, site: Site) -> str:
    if name == "platform":
        return site.platform_name
    if name == "granularity" and not site.has_parameters:
        return "tensor"
    return str(getattr(site, name))


def _finding(site: str, rule: Rule, found: Measured, instead: str = "") -> Finding:
    return Finding(
        site=site,
        rule=rule.name,
        found=found.text,
        allowed=rule.text,
        severity=rule.severity,
        remedy=instead or rule.remedy,
    )
