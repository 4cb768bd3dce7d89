"""What NICS-fix gives a configuration of its own: weights, biases and activations of a module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from torch import Tensor, nn

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.gradients import GradientQuantizer
from lightning_linger.core.grid import Grid
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.parameter_ranges import ParameterRanges
from lightning_linger.core.quantizer import Quantizer
from lightning_linger.core.sites import Site
from lightning_linger.core.switches import FloatPart, FrozenPart
from lightning_linger.presets.nics_fix import STATISTICS

Kind = Literal["weight", "bias", "activation", "buffer"]
KINDS: tuple[Kind, ...] = ("weight", "bias", "activation", "buffer")


class QuantizeMethod(IntEnum):
    """What happens to a value, with NICS-fix's names and numbers."""

    FIX_NONE = 0
    FIX_AUTO = 1
    FIX_FIXED = 2


PARTS: dict[Kind, FloatPart] = {
    "weight": "weights",
    "bias": "biases",
    "activation": "activations",
    "buffer": "statistics",
}
# The part whose ranges move or stand still; the scale of a bias follows that of the weight.
RANGES: dict[Kind, FrozenPart] = {
    "weight": "weights",
    "bias": "weights",
    "activation": "activations",
    "buffer": "statistics",
}

_WEIGHT, _SUFFIX = "weight", " weight"
BUFFERS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Item:
    """One value that is put on a grid.

    Args:
        module: Dotted path of the module; where it makes several calls, the key of the call.
        name: ``weight``, ``bias`` or ``activation``; ``input0`` for what a layer rounds before it
            reads it; ``running_mean`` and ``running_var`` for buffers of a batch norm that are
            rounded; an op with several weights or inner results has a name for each, like
            ``query weight`` and ``query``.
        kind: Which of the four it is.
        site: The call.
        quantizer: Of an activation.
    """

    module: str
    name: str
    kind: Kind
    site: Site
    quantizer: Quantizer | None = None

    @property
    def label(self) -> str:
        """The name in messages."""
        return f"{self.module}: {self.name}"

    @property
    def weight_name(self) -> str:
        """What its site calls the weight."""
        return self.name.removesuffix(_SUFFIX)

    @property
    def grid(self) -> Grid:
        """What its values are rounded to, a bias aside."""
        grid = self.ranges.grid if self.quantizer is None else self.quantizer.grid
        assert grid is not None  # only what is rounded has items
        return grid

    @property
    def ranges(self) -> ParameterRanges:
        """The ranges of a parameter."""
        found = self.site.statistics if self.kind == "buffer" else self.site.weights
        assert found is not None  # only rounded buffers are items
        return found

    @property
    def gradient(self) -> GradientQuantizer | None:
        """What rounds its gradient, if it is to be rounded."""
        if self.quantizer is not None:
            return self.quantizer.gradient
        nodes: dict[str, Any] = dict(self.site.gradients.items())
        return nodes.get(self.weight_name if self.kind == "weight" else self.kind)

    @property
    def bitwidth(self) -> int:
        """Width of its codes."""
        return self.config.bias_bits if self.kind == "bias" else self.grid.bits

    @property
    def config(self) -> QuantConfig:
        """How its call is quantized."""
        assert self.site.config is not None  # only quantized calls have items
        return self.site.config

    @property
    def method(self) -> QuantizeMethod:
        """What happens to it now."""
        site = self.site
        if not site.switches.quantize or PARTS[self.kind] in site.floating:
            return QuantizeMethod.FIX_NONE
        given = self.quantizer is not None and self.quantizer.estimator.fixed
        fixed = given or RANGES[self.kind] in site.frozen
        return QuantizeMethod.FIX_FIXED if fixed else QuantizeMethod.FIX_AUTO

    @property
    def range_method(self) -> int | str:
        """The number of its range method, or the name of an estimator that NICS-fix has not."""
        if self.quantizer is not None:
            return numbered(self.quantizer.estimator.kind)
        of_buffer = self.kind == "buffer"
        return numbered(self.config.statistics_range if of_buffer else self.config.weight_range)

    @property
    def scales(self) -> int | None:
        """How many scales it has without a zero point; None for a weight that was never rounded."""
        if self.quantizer is not None:
            return 1
        step = self.ranges.step_in_use(self.weight_name)
        return None if step is None else step.numel()

    def scale(self) -> Tensor | None:
        """Return NICS-fix's scale: its half-range, 0-dim or one per channel, or both ends.

        It is what the range asks for: a platform that only shifts right may use a coarser one. None
        while there is none, and for a bias.
        """
        if self.quantizer is None:
            step = self.ranges.step_in_use(self.weight_name)
            return None if step is None or self.kind == "bias" else half_range(step, self.bitwidth)
        if not self.quantizer.known:
            return None
        if self.quantizer.grid.affine:
            return self.quantizer.estimator.range.clone()
        return half_range(self.quantizer.wanted_step().detach().clone(), self.bitwidth)


def items_of(model: nn.Module) -> list[Item]:
    """Return the items of a quantized model in the order of its calls."""
    instrumentation = instrumentation_of(model)
    sites = [site for site in instrumentation.sites if site.quantized]
    if not sites:
        msg = (
            "the model is not quantized. Call `linger.quantize(model, linger.preset('nics_fix'))`."
        )
        raise ConfigError(msg)
    calls = Counter(_path(site) for site in sites)
    found: list[Item] = []
    for site in sites:
        module = _path(site) if calls[_path(site)] == 1 and site.node.owner else site.key
        found += _items(site, module)
    return found


def gradient_method(node: GradientQuantizer, instrumentation: Instrumentation) -> QuantizeMethod:
    """Return what happens to a gradient now."""
    if not (instrumentation.switches.quantize and node.active):
        return QuantizeMethod.FIX_NONE
    fixed = node.frozen or node.estimator.fixed
    return QuantizeMethod.FIX_FIXED if fixed else QuantizeMethod.FIX_AUTO


def item_of_weight(name: str) -> str:
    """Return the item of a weight, apart from an inner result of the same name."""
    return name if name == _WEIGHT else name + _SUFFIX


def numbered(range: str | float | tuple[float, float]) -> int | str:
    """Return the number of a range method, or its name if it has none."""
    names = {name: int(method) for method, name in STATISTICS.items()}
    return names.get(str(range).removeprefix("last_"), str(range))


def half_range(step: Tensor, bits: int) -> Tensor:
    """Return NICS-fix's scale of a step: 2^x, where the values begin to saturate."""
    return step * 2.0 ** (bits - 1)


def step_of_half_range(scale: float, grid: Grid) -> float:
    """Return the step of a scale."""
    return scale / 2.0 ** (grid.bits - 1)


def _path(site: Site) -> str:
    invocation = f"@{site.node.invocation}" if site.node.invocation else ""
    return f"{site.node.owner}{invocation}"


def _items(site: Site, module: str) -> Iterator[Item]:
    if site.weights.grid is not None and not site.completes_fold:
        for name in [*site.weights.latest_steps] or [_WEIGHT]:
            yield Item(module, item_of_weight(name), "weight", site)
        if site.statistics is not None:
            for name in BUFFERS:
                yield Item(module, name, "buffer", site)
        if _has_bias(site):
            yield Item(module, "bias", "bias", site)
    for position, quantizer in site.inputs.items():
        assert isinstance(quantizer, Quantizer)
        yield Item(module, f"input{position}", "activation", site, quantizer)
    for name, quantizer in site.parts.items():
        assert isinstance(quantizer, Quantizer)
        yield Item(module, name, "activation", site, quantizer)
    if site.output is not None:
        yield Item(module, "activation", "activation", site, site.output)


def _has_bias(site: Site) -> bool:
    if site.fold is not None or getattr(site.recorded_call, "bias", None) is not None:
        return True
    return any("bias" in name for name, _ in site.owner.named_parameters(recurse=False))
