"""A width per layer under a budget, with the least sum of sensitivities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn

from lightning_linger.analysis.knapsack import Option, least_loss
from lightning_linger.analysis.layers import Data, Layer
from lightning_linger.analysis.measures import MEASURES
from lightning_linger.analysis.planning import planned, walked
from lightning_linger.analysis.sensitivity import SensitivityRow, Unit, units_of, widths_for
from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.core.instrumentation import Instrumentation
from lightning_linger.core.logs import logger
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import WIDEST_OPERAND
from lightning_linger.core.widths import Widths, widths_of
from lightning_linger.platforms.limits import limits_of
from lightning_linger.platforms.rules import Engine, Limits

Cost = Literal["weight_bytes", "mac_bits"]
COSTS: tuple[Cost, ...] = ("weight_bytes", "mac_bits")

_WIDTH_MEASURES = ("weight_bits", "operand_bits", "result_bits")
_NO_ENGINE = Engine(share_memory=0)
_NAMES = {"weight_bytes": "bytes of weights", "mac_bits": "bits of multiplications"}

# Drop of the metric, by layer and width.
_Measured = dict[Unit, dict[int, float]]


def choose_bits(
    model: nn.Module,
    rows: Iterable[SensitivityRow],
    budget: float,
    cost: Cost = "weight_bytes",
    platform: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Choose a width per layer: the least sum of sensitivities within a budget, exactly.

    Args:
        model: A prepared model, planned to be quantized or not; it is left as it was.
        rows: Sensitivities, all of one part: of weights, activations, or both. Widths are chosen
            among those that were measured and that the platform allows.
        budget: What the whole model may take; layers that were not measured count with the widths
            they have.
        cost: ``weight_bytes``: bytes of weights, each of exactly its width. (Engines that store
            narrower weights in whole bytes gain nothing by them.) ``mac_bits``: multiplications of
            one sample, each times the widths of its two operands.
        platform: Name of the target; None takes the one that the model is quantized for, else
            ``venusa``.

    Returns:
        Overrides for :class:`QuantizeCallback`, :func:`quantize` or :func:`change_bits`: fields per
        layer, those in which its plan already differs from the model's included.

    Raises:
        ConfigError: If a row names no layer, no width is allowed, or the budget is too small; the
            message says what the smallest possible is.
    """
    rows = list(rows)
    parts = {row.part for row in rows}
    check_budget(budget)
    if cost not in COSTS:
        msg = f"`cost` must be one of {COSTS}. Found: {cost!r}."
        raise ConfigError(msg)
    if len(parts) != 1:
        msg = (
            "`rows` holds the sensitivities of one part, which has the widths that are chosen. "
            f"Found: {sorted(parts) or 'no row'}."
        )
        raise ConfigError(msg)
    with planned(model, platform) as (instrumentation, target):
        measured = _by_unit(instrumentation, rows)
        costs = _Costs(instrumentation, walked(instrumentation, target).layers, cost)
        (part,) = parts
        _drop_refused(measured, part, costs, limits_of(target.name))
        chosen = _least_loss(measured, part, costs, budget)
        return {
            unit.name: _fields(instrumentation, unit, part, bits) for unit, bits in chosen.items()
        }


def check_budget(budget: float) -> None:
    """Raise a ConfigError if a budget is no number of bytes or bits."""
    if not isinstance(budget, int | float) or not 0 < budget < math.inf:
        msg = f"`budget` must be a positive number. Found: {budget!r}."
        raise ConfigError(msg)


def require_budget(
    model: nn.Module,
    units: Sequence[Unit],
    bits: Sequence[int],
    part: str,
    budget: float,
    cost: Cost = "weight_bytes",
) -> None:
    """Check, before anything is measured, that there are widths within a budget.

    Args:
        model: A planned model.
        units: The layers that will be measured.
        bits: At these widths.
        part: What of them.
        budget: What the whole model may take.
        cost: What is counted; see :func:`choose_bits`.

    Raises:
        ConfigError: If no width is allowed, or the budget is too small.
    """
    undecided = dict.fromkeys(bits, 0.0)
    with planned(model) as (instrumentation, target):
        costs = _Costs(instrumentation, walked(instrumentation, target).layers, cost)
        measured = {unit: dict(undecided) for unit in units}
        _drop_refused(measured, part, costs, limits_of(target.name))
        _indices(measured, part, costs, budget)


def _by_unit(instrumentation: Instrumentation, rows: Sequence[SensitivityRow]) -> _Measured:
    units = units_of(instrumentation, rows[0].part)
    found: _Measured = {}
    for row in rows:
        named = [unit for unit in units if _is_named(unit, row.site, instrumentation)]
        if len(named) != 1:
            msg = (
                f"`{row.site}` names no layer of this model whose {row.part} can have a width. "
                f"Similar: {near_matches(row.site, [unit.name for unit in units])}."
            )
            raise ConfigError(msg)
        drops = found.setdefault(named[0], {})
        if row.bits in drops:
            msg = f"`rows` holds `{row.site}` at {row.bits} bits twice. Keep one of them."
            raise ConfigError(msg)
        drops[row.bits] = row.drop
    return found


def _is_named(unit: Unit, name: str, instrumentation: Instrumentation) -> bool:
    owners = {instrumentation.find(key).node.owner for key in unit.sites}
    return name in (unit.name, *unit.sites, *owners)


def _drop_refused(measured: _Measured, part: str, costs: _Costs, limits: Limits) -> None:
    """Leave out the widths that a platform does not run."""
    for unit, drops in measured.items():
        allowed = [bits for bits in sorted(drops) if costs.allows(limits, unit, part, bits)]
        if not allowed:
            msg = (
                f"`{unit.name}`: platform {limits.platform!r} allows none of the measured widths "
                f"{sorted(drops)} of {part}. Measure others; `linger.check` names the limits."
            )
            raise ConfigError(msg)
        measured[unit] = {bits: drops[bits] for bits in allowed}


def _least_loss(measured: _Measured, part: str, costs: _Costs, budget: float) -> dict[Unit, int]:
    """Choose a width per layer."""
    chosen = {
        unit: list(drops)[index]
        for (unit, drops), index in zip(
            measured.items(), _indices(measured, part, costs, budget), strict=True
        )
    }
    spent = costs.of_others(measured) + sum(
        costs.of(unit, part, bits) for unit, bits in chosen.items()
    )
    logger.info(
        "chose widths of %d layers: %s of %s %s, sum of drops %.4g",
        len(chosen),
        costs.shown(spent),
        f"{budget:,.0f}",
        costs.name,
        sum(measured[unit][bits] for unit, bits in chosen.items()),
    )
    return chosen


def _indices(measured: _Measured, part: str, costs: _Costs, budget: float) -> list[int]:
    """Return the position of the width that is chosen of each layer."""
    # Floats are fractions of powers of two: with one denominator they are whole numbers.
    scale = max(
        drop.as_integer_ratio()[1] for drops in measured.values() for drop in drops.values()
    )
    classes = [
        [Option(costs.of(unit, part, bits), _whole(drop, scale)) for bits, drop in drops.items()]
        for unit, drops in measured.items()
    ]
    fixed = costs.of_others(measured)
    indices = least_loss(classes, int(budget * costs.per_unit) - fixed)
    if indices is None:
        least = fixed + sum(min(option.cost for option in options) for options in classes)
        msg = (
            f"`budget` of {budget:,.0f} {costs.name} cannot be kept: the smallest possible is "
            f"{costs.shown(least)}, with every measured layer at its narrowest."
        )
        raise ConfigError(msg)
    return indices


def _whole(drop: float, scale: int) -> int:
    """Return a drop as a whole number of ``1 / scale``: floats are fractions of powers of two."""
    numerator, denominator = drop.as_integer_ratio()
    return numerator * (scale // denominator)


def _fields(instrumentation: Instrumentation, unit: Unit, part: str, bits: int) -> dict[str, Any]:
    """Return what an override says of a layer, which replaces any that the plan has for it."""
    site = instrumentation.find(unit.sites[0])
    assert site.config is not None  # only quantized sites are measured
    plan = instrumentation.plans["quantize"]
    own = {
        name: value
        for name, value in dataclasses.asdict(site.config).items()
        if value != plan.get(name, getattr(QuantConfig, name))
    }
    after = dataclasses.asdict(widths_for(part, bits, widths_of(site)))
    return {**own, **{name: after[name] for name in _FIELDS[part] if _has_codes(name, site)}}


_FIELDS = {
    "weights": ("weight_bits",),
    "activations": ("activation_bits", "output_bits"),
    "both": ("weight_bits", "activation_bits", "output_bits"),
}


def _has_codes(name: str, site: Site) -> bool:
    if name == "weight_bits":
        return site.has_parameters
    bits = widths_of(site).output_bits
    return name != "output_bits" or (bits is not None and bits <= WIDEST_OPERAND)


class _Costs:
    """What layers cost at their widths, in whole numbers.

    Args:
        instrumentation: Of the model.
        layers: What runs.
        cost: What is counted.

    Attributes:
        name: What the budget is counted in.
        per_unit: How many of these numbers are one of the budget.
    """

    def __init__(
        self, instrumentation: Instrumentation, layers: Sequence[Layer], cost: Cost
    ) -> None:
        self.name = {"weight_bytes": "bytes of weights", "mac_bits": "bits of multiplications"}[
            cost
        ]
        self.per_unit = 8 if cost == "weight_bytes" else 1
        self._counts_bytes = cost == "weight_bytes"
        self._instrumentation = instrumentation
        self._layers: dict[str, list[Layer]] = {}
        for layer in layers:
            self._layers.setdefault(layer.site, []).append(layer)

    def of(self, unit: Unit, part: str | None, bits: int = 0) -> int:
        """Return the cost of a layer of which a part has a width; None leaves it as it is."""
        costs = []
        for key in unit.sites:
            widths = widths_of(self._instrumentation.find(key))
            widths = widths if part is None else widths_for(part, bits, widths)
            costs.append(sum(self._cost(layer, widths) for layer in self._layers.get(key, ())))
        # Calls of one module have their weights in common, and multiply one after the other.
        return max(costs) if self._counts_bytes else sum(costs)

    def shown(self, cost: int) -> str:
        """Return a cost in units of the budget, rounded up."""
        return f"{-(-cost // self.per_unit):,}"

    def of_others(self, units: Iterable[Unit]) -> int:
        """Return the cost of all layers but some."""
        measured = {key for unit in units for key in unit.sites}
        everything = units_of(self._instrumentation, "both")
        return sum(self.of(unit, None) for unit in everything if not measured & set(unit.sites))

    def _cost(self, layer: Layer, widths: Widths) -> int:
        if self._counts_bytes:
            return layer.weight_elements * widths.weight_bits
        other = widths.weight_bits if layer.weights else widths.activation_bits
        return layer.macs * widths.activation_bits * other

    def allows(self, limits: Limits, unit: Unit, part: str, bits: int) -> bool:
        """Whether a platform runs a layer at a width."""
        layers = [layer for key in unit.sites for layer in self._layers.get(key, ())]
        return not any(_is_refused(limits, layer, part, bits) for layer in layers)


def _is_refused(limits: Limits, layer: Layer, part: str, bits: int) -> bool:
    """Whether a rule is broken by the width: one that would be broken anyhow is not."""
    changed = _with_bits(layer, part, bits)
    engine = limits.engine or _NO_ENGINE
    for rule in limits.rules:
        if rule.measure in _WIDTH_MEASURES and rule.applies_to(layer.kind, layer.traits):
            before, after = (MEASURES[rule.measure](x, engine) for x in (layer, changed))
            if after is not None and after != before and not rule.allowed.admits(after.value):
                return True
    return False


def _with_bits(layer: Layer, part: str, bits: int) -> Layer:
    def codes(data: Data) -> Data:
        narrow = data.bits is not None and data.bits <= WIDEST_OPERAND
        return dataclasses.replace(data, bits=bits) if narrow else data

    if part != "activations":
        layer = dataclasses.replace(layer, weight_bits=bits)
    if part != "weights":
        inputs, outputs = (tuple(map(codes, side)) for side in (layer.inputs, layer.outputs))
        layer = dataclasses.replace(layer, inputs=inputs, outputs=outputs)
    return layer
