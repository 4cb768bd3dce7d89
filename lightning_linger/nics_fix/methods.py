"""Which values are left in float, have a moving scale, or a fixed one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.sites import Site
from lightning_linger.core.switches import FloatPart, FrozenPart
from lightning_linger.nics_fix.items import (
    KINDS,
    PARTS,
    RANGES,
    Item,
    Kind,
    QuantizeMethod,
    gradient_method,
    items_of,
)
from lightning_linger.stages.learned import learned_ranges
from lightning_linger.stages.quantize import switch_quantize
from lightning_linger.stages.selection import QUANT_MARK, TYPE_PREFIX, Selection, is_type, matches

Methods = Mapping[str, int]


def set_fix_method(
    model: nn.Module,
    method: int | None = None,
    by_type: Mapping[type[nn.Module] | str, Methods] | None = None,
    by_name: Mapping[str, Methods] | None = None,
    grad: bool = False,
) -> nn.Module:
    """Say what happens to values, or to gradients, from now on. Returns the model.

    ``FIX_NONE`` leaves a value in float, ``FIX_AUTO`` lets its scale follow the data in training,
    ``FIX_FIXED`` keeps the scale it has. For each item a name goes before a type, and a type before
    the method of all. ``FIX_NONE`` for all switches the quantization of the model off, any other
    method switches it on.

    Args:
        model: A quantized model.
        method: Of all items; None leaves those alone that neither a type nor a name says more of.
        by_type: Maps a module type, its name or an op kind to methods of ``weight``, ``bias``,
            ``activation`` and ``buffer`` (the running statistics of a batch norm).
        by_name: Maps a glob on dotted paths to methods.
        grad: Set the methods of gradients instead.

    Raises:
        ConfigError: If a method, an item, a name or a type does not exist.
        UnsupportedError: If ``FIX_NONE`` is asked for a part that its op cannot leave in float.
    """
    items = items_of(model)
    chosen = _Choice.read(model, method, by_type, by_name)
    chosen.require_used(items)
    wanted = {
        (item.module, item.name): found
        for item in items
        if (found := chosen.method_of(item)) is not None
    }
    if grad:
        apply_gradient_methods(items, wanted)
        return model
    everything = set(wanted.values())
    if everything == {QuantizeMethod.FIX_NONE} and len(wanted) == len(items):
        return switch_quantize(model, on=False)
    apply_methods(model, items, wanted)
    return model


Wanted = Mapping[tuple[str, str], QuantizeMethod]


def apply_methods(model: nn.Module, items: Iterable[Item], wanted: Wanted) -> None:
    """Give the values of a model their methods, after checking that all of them can be had."""
    per_site: dict[str, tuple[Site, dict[Kind, QuantizeMethod]]] = {}
    for item in items:
        method = wanted.get((item.module, item.name))
        if method is None:
            continue
        _, methods = per_site.setdefault(item.site.key, (item.site, {}))
        if methods.setdefault(item.kind, method) != method:
            msg = (
                f"`{item.label}`: all {item.kind} items of a call have one method. Found "
                f"{int(methods[item.kind])} and {int(method)}."
            )
            raise ConfigError(msg)
        if method is QuantizeMethod.FIX_NONE:
            _require_float_form(item)
    if not per_site:
        return
    if not instrumentation_of(model).switches.quantize:
        _wake(model, items, per_site)
    for site, methods in per_site.values():
        _apply(site, methods)
    for parameter in learned_ranges(model).values():
        if not parameter.requires_grad:
            parameter.grad = None
    instrumentation_of(model).thaw()


def apply_gradient_methods(items: Iterable[Item], wanted: Wanted) -> None:
    """Give gradients their methods.

    Raises:
        ConfigError: If a gradient is to be rounded that was not planned to be.
    """
    chosen = [(item, wanted[key]) for item in items if (key := (item.module, item.name)) in wanted]
    for item, method in chosen:
        if item.gradient is None and method is not QuantizeMethod.FIX_NONE:
            msg = f"`{item.label}` has no gradient on a grid. Quantize with `gradient_bits`."
            raise ConfigError(msg)
    for item, method in chosen:
        node = item.gradient
        if node is not None:
            node.active = method is not QuantizeMethod.FIX_NONE
            node.frozen = method is QuantizeMethod.FIX_FIXED


def method_now(item: Item, model: nn.Module, grad: bool) -> QuantizeMethod | None:
    """Return what happens to an item now, None for a gradient that is never rounded."""
    if not grad:
        return item.method
    node = item.gradient
    return None if node is None else gradient_method(node, instrumentation_of(model))


def read_method(method: int, where: str) -> QuantizeMethod:
    """Return a method by its number.

    Raises:
        ConfigError: If there is none.
    """
    if isinstance(method, bool | str) or method not in list(QuantizeMethod):
        known = ", ".join(f"{m.name} ({int(m)})" for m in QuantizeMethod)
        msg = f"{where}: a method is one of {known}. Found: {method!r}."
        raise ConfigError(msg)
    return QuantizeMethod(method)


def _wake(
    model: nn.Module,
    items: Iterable[Item],
    chosen: Mapping[str, tuple[Site, Mapping[Kind, QuantizeMethod]]],
) -> None:
    """Switch quantization on for what is chosen, with everything else in float as it was."""
    others = {item.site.key: item for item in items if item.site.key not in chosen}
    for item in others.values():
        _require_float_form(item)
    switch_quantize(model, on=True)
    for item in others.values():
        item.site.leave_float(frozenset(PARTS.values()))


def _require_float_form(item: Item) -> None:
    site = item.site
    if site.op.rounds_parts_apart:
        return
    if not site.parts and not site.has_parameters and site.op.output_scale == "observed":
        return
    msg = (
        f"`{item.label}`: {site.op.kind} has no form with a part in float. Take FIX_NONE for all, "
        f"or leave it in float from the start with overrides={{{site.node.owner!r}: None}}."
    )
    raise UnsupportedError(msg)


def _apply(site: Site, methods: Mapping[Kind, QuantizeMethod]) -> None:
    floating: set[FloatPart] = set(site.floating)
    frozen: set[FrozenPart] = set(site.frozen)
    for kind, method in methods.items():
        part = PARTS[kind]
        floating.discard(part)
        if method is QuantizeMethod.FIX_NONE:
            floating.add(part)
        elif kind != "bias":
            frozen.discard(RANGES[kind])
            if method is QuantizeMethod.FIX_FIXED:
                frozen.add(RANGES[kind])
    gradients = [item.frozen for item in site.gradient_quantizers()]
    site.freeze(frozenset(frozen))
    for node, kept in zip(site.gradient_quantizers(), gradients, strict=True):
        node.frozen = kept
    for ranges in (site.weights, site.statistics):
        if ranges is not None and ranges.frozen:
            # The scale that the latest forward had, not that of what an optimizer made of a weight.
            for name, step in ranges.latest_steps.items():
                ranges.hold(name, step)
    site.leave_float(frozenset(floating))


@dataclass(frozen=True)
class _Choice:
    """Methods by name, by type, and of all, in this order of precedence."""

    method: QuantizeMethod | None
    by_type: Mapping[type[nn.Module] | str, Mapping[str, QuantizeMethod]]
    by_name: Mapping[str, Mapping[str, QuantizeMethod]]

    @staticmethod
    def read(
        model: nn.Module,
        method: int | None,
        by_type: Mapping[type[nn.Module] | str, Methods] | None,
        by_name: Mapping[str, Methods] | None,
    ) -> _Choice:
        """Check and convert what a user has given."""
        types, names = by_type or {}, by_name or {}
        patterns = [*names, *(TYPE_PREFIX + _name(wanted) for wanted in types)]
        validated = Selection(None, None, dict.fromkeys(patterns), QUANT_MARK)
        validated.validate(model, instrumentation_of(model).sites)
        return _Choice(
            None if method is None else read_method(method, "`method`"),
            {wanted: _read_methods(m, _name(wanted)) for wanted, m in types.items()},
            {pattern: _read_methods(m, pattern) for pattern, m in names.items()},
        )

    def require_used(self, items: Iterable[Item]) -> None:
        """Check that every item that was named is there."""
        here: set[Kind]
        for pattern, methods in self.by_name.items():
            here = {item.kind for item in items if matches(item.site, pattern)}
            _require_items(pattern, methods, here)
        for wanted, methods in self.by_type.items():
            here = {item.kind for item in items if is_type(item.site, wanted)}
            _require_items(_name(wanted), methods, here)

    def method_of(self, item: Item) -> QuantizeMethod | None:
        """Return the method that was given for an item."""
        names = sorted((name for name in self.by_name if matches(item.site, name)), key=len)
        types = [wanted for wanted in self.by_type if is_type(item.site, wanted)]
        # The longest pattern is the most specific one.
        found = [self.by_name[name] for name in reversed(names)]
        found += [self.by_type[wanted] for wanted in types]
        for methods in found:
            if item.kind in methods:
                return methods[item.kind]
        return self.method


def _read_methods(methods: Methods, where: str) -> dict[str, QuantizeMethod]:
    if not isinstance(methods, Mapping):
        msg = f"{where!r} needs a method for each item, e.g. {{'weight': 2}}. Found: {methods!r}."
        raise ConfigError(msg)
    for item in methods:
        if item not in KINDS:
            msg = f"{where!r} has no item {item!r}. Items: {', '.join(KINDS)}."
            raise ConfigError(msg)
    return {item: read_method(method, f"{where!r}.{item}") for item, method in methods.items()}


def _require_items(where: str, wanted: Iterable[str], here: set[Kind]) -> None:
    for kind in wanted:
        if kind not in here:
            msg = f"{where!r} has no item {kind!r} that is quantized. Found: {sorted(here)}."
            raise ConfigError(msg)


def _name(wanted: type[nn.Module] | str) -> str:
    return wanted if isinstance(wanted, str) else wanted.__name__
