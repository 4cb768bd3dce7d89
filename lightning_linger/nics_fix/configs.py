"""Fix configurations as plain data: what has which width, scale and method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.nics_fix.items import (
    Item,
    QuantizeMethod,
    half_range,
    items_of,
    numbered,
    step_of_half_range,
)
from lightning_linger.nics_fix.methods import (
    apply_gradient_methods,
    apply_methods,
    method_now,
    read_method,
)

Config = dict[str, Any]
FixConfigs = dict[str, dict[str, Config]]

FIELDS = ("method", "scale", "bitwidth", "range_method")


class LoadReport(NamedTuple):
    """What did not fit, as ``module: item``."""

    missing: list[str]
    unexpected: list[str]


def get_fix_configs(model: nn.Module, grad: bool = False, data_only: bool = False) -> FixConfigs:
    """Return how every item of a quantized model is put on a grid.

    ``{"net.0": {"weight": {"method": 1, "scale": 0.5, "bitwidth": 8, "range_method": 0}, ...}}``.
    The scale is NICS-fix's, the half-range 2^x: the step is ``scale / 2^(bitwidth - 1)``, and both
    are exact. Where there is a zero point it is the two ends of the range. It is a list where a
    weight has one for each channel, and None where there is none yet, or, for a bias, where it is
    that of the accumulator.

    Args:
        model: A quantized model.
        grad: Return how gradients are rounded, where they are.
        data_only: Return plain numbers, which JSON and YAML hold exactly; otherwise the scales are
            float32 tensors.
    """
    configs: FixConfigs = {}
    for item in items_of(model):
        config = _gradient_config(item, model) if grad else _config(item)
        if config is None:
            continue
        if data_only and isinstance(config["scale"], Tensor):
            config["scale"] = config["scale"].tolist()
        configs.setdefault(item.module, {})[item.name] = config
    return configs


def load_fix_configs(
    model: nn.Module,
    configs: Mapping[str, Mapping[str, Mapping[str, Any]]],
    grad: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Give the items of a model the methods and scales of :func:`get_fix_configs`.

    The next forward uses the scales. Under ``FIX_AUTO`` in training they move on from there, and
    those of weights follow the weight anew.

    Args:
        model: A model that is quantized with the same widths.
        configs: By module and item; a configuration may leave out what is to stay.
        grad: Whether they are those of gradients.
        strict: Whether modules and items that only one side has are an error.

    Returns:
        What did not fit.

    Raises:
        ConfigError: If something does not fit, or a value is none that the item can have. Nothing
            is changed then.
    """
    items = {(item.module, item.name): item for item in items_of(model)}
    given = _flat(configs)
    _resolve_weights(items, given)
    if grad:
        items = {key: item for key, item in items.items() if item.gradient is not None}
    report = LoadReport(
        [item.label for key, item in items.items() if key not in given],
        [f"{module}: {name}" for module, name in given if (module, name) not in items],
    )
    if strict and (report.missing or report.unexpected):
        msg = (
            f"the fix configs do not fit the model. Missing: {report.missing[:5]}; not in the "
            f"model: {report.unexpected[:5]}. Pass strict=False to load the rest."
        )
        raise ConfigError(msg)
    loads = [
        _Load.read(items[key], dict(config), grad) for key, config in given.items() if key in items
    ]
    wanted = {
        (load.item.module, load.item.name): load.method for load in loads if load.method is not None
    }
    if grad:
        apply_gradient_methods(items.values(), wanted)
    else:
        apply_methods(model, items.values(), wanted)
    for load in loads:
        load.apply(grad)
    instrumentation_of(model).thaw()
    return report


@contextlib.contextmanager
def fix_configs_as(
    model: nn.Module,
    configs: Mapping[str, Mapping[str, Mapping[str, Any]]],
    grad: bool = False,
) -> Iterator[nn.Module]:
    """Use other configurations for the forwards inside, e.g. for one, and then those of before.

    Methods, scales and ranges are restored to the bit, also after an error. Run a backward inside
    too, if gradients are concerned.

    Args:
        model: A quantized model.
        configs: Of some modules and items.
        grad: Whether they are those of gradients.
    """
    instrumentation = instrumentation_of(model)
    quantize = instrumentation.switches.quantize
    before = [_SiteState(site) for site in instrumentation.sites]
    try:
        unexpected = load_fix_configs(model, configs, grad, strict=False).unexpected
        if unexpected:
            msg = f"the model has no {', '.join(unexpected)}."
            raise ConfigError(msg)
        yield model
    finally:
        instrumentation.switches.quantize = quantize
        for state in before:
            state.restore()
        instrumentation.thaw()


class _SiteState:
    """All that a configuration changes of a site."""

    def __init__(self, site: Any) -> None:
        self.site = site
        self.frozen, self.floating = site.frozen, site.floating
        parameters = [x for x in (site.weights, site.statistics) if x is not None]
        self.latest_steps = [(ranges, dict(ranges.latest_steps)) for ranges in parameters]
        self.gradients = [(node, node.active, node.frozen) for node in site.gradient_quantizers()]
        self.latest = [(quantizer, quantizer.latest_step) for quantizer in site.quantizers()]
        self.tensors = {name: x.detach().clone() for name, x in site.state_dict().items()}

    def restore(self) -> None:
        """Bring it back."""
        site = self.site
        site.freeze(self.frozen)
        site.leave_float(self.floating)
        site.load_state_dict(self.tensors)
        for ranges, steps in self.latest_steps:
            ranges.latest_steps = steps
        for node, active, frozen in self.gradients:
            node.active, node.frozen = active, frozen
        for quantizer, step in self.latest:
            quantizer.latest_step = step


class _Load(NamedTuple):
    """A configuration that was checked, for an item.

    With a zero point the steps are the two ends of the range.
    """

    item: Item
    method: QuantizeMethod | None
    steps: list[float] | None

    @staticmethod
    def read(item: Item, config: Config, grad: bool) -> _Load:
        """Check a configuration."""
        node = item.gradient
        bits = node.grid.bits if grad and node is not None else item.bitwidth
        unknown = [field for field in config if field not in FIELDS]
        if unknown:
            msg = f"`{item.label}` has no field {unknown[0]!r}. Fields: {', '.join(FIELDS)}."
            raise ConfigError(msg)
        if config.get("bitwidth", bits) != bits:
            msg = (
                f"`{item.label}` has {bits} bits here and {config['bitwidth']} in the fix configs. "
                "Quantize the model with the same widths first."
            )
            raise ConfigError(msg)
        method = config.get("method")
        wanted = None if method is None else read_method(method, f"`{item.label}`")
        range_here = (
            numbered(node.estimator.kind) if grad and node is not None else item.range_method
        )
        if config.get("range_method", range_here) != range_here:
            msg = (
                f"`{item.label}` has range method {range_here!r} here and "
                f"{config['range_method']!r} in the fix configs. Quantize with the same first."
            )
            raise ConfigError(msg)
        scale = config.get("scale")
        if scale is None or (item.kind == "bias" and not grad):
            return _Load(item, wanted, None)
        scales = _numbers(scale, item.label)
        if item.quantizer is not None and item.quantizer.grid.affine and not grad:
            if len(scales) != 2 or not scales[0] <= 0.0 <= scales[1]:
                msg = f"`{item.label}`: a scale is two ends around zero. Found: {scale!r}."
                raise ConfigError(msg)
            return _Load(item, wanted, scales)
        if not all(0 < one < float("inf") for one in scales):
            msg = f"`{item.label}`: a scale is a positive number. Found: {scale!r}."
            raise ConfigError(msg)
        here = 1 if grad else item.scales
        if here is not None and len(scales) != here:
            msg = f"`{item.label}` has {here} scales here and {len(scales)} in the fix configs."
            raise ConfigError(msg)
        grid = node.grid if grad and node is not None else item.grid
        steps = [step_of_half_range(one, grid) for one in scales]
        for step in steps:
            grid.absmax_of(step)
        return _Load(item, wanted, steps)

    def apply(self, grad: bool) -> None:
        """Set the scale."""
        item, steps = self.item, self.steps
        if steps is None:
            return
        if grad:
            assert item.gradient is not None  # others are unexpected
            absmax = item.gradient.grid.absmax_of(steps[0])
            item.gradient.estimator.adopt(-absmax, absmax)
        elif item.quantizer is not None:
            if item.quantizer.estimator.fixed:
                return
            if item.quantizer.grid.affine:
                item.quantizer.estimator.adopt(*steps)
                item.quantizer.thaw()
            else:
                item.quantizer.adopt_step(steps[0])
        else:
            step = torch.tensor(steps if len(steps) > 1 else steps[0])
            if item.ranges.frozen:
                item.ranges.hold(item.weight_name, step)
            item.ranges.latest_steps[item.weight_name] = step if len(steps) > 1 else steps[0]


def _flat(
    configs: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return configurations by module and item, after checking their form."""
    inner = configs.values() if isinstance(configs, Mapping) else [None]
    whole = all(
        isinstance(items, Mapping) and all(isinstance(one, Mapping) for one in items.values())
        for items in inner
    )
    if not whole:
        msg = (
            "fix configs are {module: {item: {field: value}}}, as `get_fix_configs` returns them. "
            f"Found: {configs!r:.200}"
        )
        raise ConfigError(msg)
    return {(m, name): config for m, items in configs.items() for name, config in items.items()}


def _numbers(scale: Any, label: str) -> list[float]:
    try:
        found: list[float] = torch.as_tensor(scale, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"`{label}`: a scale is a number, or a list of numbers. Found: {scale!r}."
        raise ConfigError(msg) from error
    return found


def _resolve_weights(
    items: dict[tuple[str, str], Item], given: Mapping[tuple[str, str], Any]
) -> None:
    """Name the weights of a model that has not run yet as the configurations name them."""
    for module in {module for module, _ in given}:
        item = items.get((module, "weight"))
        if item is None or item.site.weights.latest_steps or (module, "weight") in given:
            continue
        known = {name for owner, name in items if owner == module}
        own = [name for owner, name in given if owner == module and name not in known]
        names = [name for name in own if name.endswith(" weight")]
        if names:
            del items[(module, "weight")]
            items.update({(module, n): Item(module, n, "weight", item.site) for n in names})


def _config(item: Item) -> Config:
    return {
        "method": int(item.method),
        "scale": item.scale(),
        "bitwidth": item.bitwidth,
        "range_method": item.range_method,
    }


def _gradient_config(item: Item, model: nn.Module) -> Config | None:
    node, method = item.gradient, method_now(item, model, grad=True)
    if node is None or method is None:
        return None
    step = node.grid.step(node.estimator.absmax()) if node.estimator.known else None
    return {
        "method": int(method),
        "scale": None if step is None else half_range(step, node.grid.bits),
        "bitwidth": node.grid.bits,
        "range_method": numbered(node.estimator.kind),
    }
