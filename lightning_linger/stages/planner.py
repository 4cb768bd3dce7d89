"""Planning: one walk over the recorded dataflow decides where quantizers are, and creates them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.gradients import GradientQuantizer
from lightning_linger.core.graph import Node, TensorSpec
from lightning_linger.core.grid import Grid
from lightning_linger.core.instrumentation import Instrumentation
from lightning_linger.core.noise import Noise
from lightning_linger.core.parameter_ranges import ParameterRanges
from lightning_linger.core.platform import Platform, rounding_of, symmetry_of
from lightning_linger.core.quantizer import Quantizer, Window
from lightning_linger.core.ranges import LearnedScale, RangeRule
from lightning_linger.core.registry import op_of
from lightning_linger.core.rounding import STOCHASTIC
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import WIDEST_OPERAND
from lightning_linger.ops.activation import ClampOp, has_tensor_bounds, window_of
from lightning_linger.ops.norm import BatchNormOp
from lightning_linger.ops.weighted import WeightedOp
from lightning_linger.platforms import platform_of
from lightning_linger.stages.requirements import require_free_range, require_supported
from lightning_linger.stages.selection import Selection

# A sigmoid's 8-bit result no longer changes beyond.
SIGMOID_CAP = 8.0


class Planner:
    """Walks the recorded dataflow and gives every site its quantizers.

    Args:
        model: A prepared model.
        instrumentation: Of the model.
        config: How sites are quantized that nothing else is said of.
        selection: Which sites, and what is said of them.
    """

    def __init__(
        self,
        model: nn.Module,
        instrumentation: Instrumentation,
        config: QuantConfig,
        selection: Selection,
    ) -> None:
        self.model = model
        self.instrumentation = instrumentation
        self.graph = instrumentation.graph
        self.config = config
        self.selection = selection
        self.constants: set[int] = set()
        self.device = next(
            (t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu")
        )

    def run(self) -> None:
        """Plan, again until no result is left that a float call writes into in place."""
        released: set[str] = set()
        while True:
            for site in self.instrumentation.sites:
                self._reset(site, released)
            for run in self.graph.runs:
                self._walk(run.nodes)
            found = {key for run in self.graph.runs for key in self._written_plainly(run.nodes)}
            if found <= released:
                break
            released |= found
        for site in self.instrumentation.sites:
            if site.quantized and site.output is not None:
                self._look_ahead(site)
        self._share_noise()
        self.instrumentation.learned = [
            module for module in self.instrumentation.modules() if isinstance(module, LearnedScale)
        ]

    def _share_noise(self) -> None:
        """Give what rounds stochastically the model's random numbers."""
        noisy = [
            site
            for site in self.instrumentation.sites
            if site.config is not None and site.config.rounding == STOCHASTIC
        ]
        noise = Noise(self.config.seed).train(self.model.training) if noisy else None
        self.instrumentation.noise = noise
        for site in noisy:
            site.__dict__["noise"] = noise
            for module in site.modules():
                if isinstance(module, Quantizer | GradientQuantizer):
                    module.__dict__["noise"] = noise

    def _reset(self, site: Site, released: set[str]) -> None:
        site.released = site.key in released
        site.config, site.platform, site.output = None, None, None
        site.weights = ParameterRanges(site.key).train(self.model.training)
        site.statistics = None
        site.inputs, site.parts, site.operand_bits = nn.ModuleDict(), nn.ModuleDict(), {}
        site.gradients = nn.ModuleDict()
        # New ranges move, and new quantizers round.
        site.freeze(frozenset())
        site.leave_float(frozenset())
        site.__dict__["noise"] = None
        site.merged, site.weight_is_computed, site.why_float = False, False, "not reached"

    def _walk(self, nodes: list[Node]) -> None:
        on_grid: set[int] = set()
        self.constants = {spec.value for node in nodes for spec in node.inputs if spec.constant}
        for node in nodes:
            if all(spec.value in self.constants for spec in node.inputs):
                self.constants |= {spec.value for spec in node.outputs}
            op = op_of(node.op)
            if op is None:
                continue
            if not op.has_site:
                quantized = bool(node.inputs) and node.inputs[0].value in on_grid
            else:
                quantized = self._plan(self.instrumentation.find(node.key), node, on_grid)
            if quantized and not self._is_released(node):
                on_grid |= {spec.value for spec in op.quantized_results(node.outputs)}

    def _written_plainly(self, nodes: list[Node]) -> Iterator[str]:
        """Find the sites into whose result a call that is not quantized writes in place."""
        producers = {spec.value: node for node in nodes for spec in node.outputs}
        for node in nodes:
            if node.written is None or self._runs_quantized(node):
                continue
            source = producers.get(node.written)
            while source is not None:
                op = op_of(source.op)
                if op is not None and op.has_site:
                    if self.instrumentation.find(source.key).quantized:
                        yield source.key
                    break
                source = producers.get(source.inputs[0].value) if op is not None else None

    def _is_released(self, node: Node) -> bool:
        op = op_of(node.op)
        has_site = op is not None and op.has_site
        return has_site and self.instrumentation.find(node.key).released

    def _runs_quantized(self, node: Node) -> bool:
        op = op_of(node.op)
        if op is None or not op.has_site:
            return op is not None
        return self.instrumentation.find(node.key).quantized

    def _plan(self, site: Site, node: Node, on_grid: set[int]) -> bool:
        """Plan one site; return whether its result is on the grid."""
        call = site.op.bind(*node.args, **_without_inplace(node.kwargs))
        if site.completes_fold:
            return self._complete_folded(site, node)
        fields, reason = self.selection.resolve(self.model, site)
        operands = [x for x in site.op.operands(call) if isinstance(x, TensorSpec)]
        reason = reason or self._obstacle(site, call, operands, on_grid)
        config = self.config.override(dict(fields or {}))
        platform = platform_of(config.platform)
        if platform.layers_only and not isinstance(site.op, WeightedOp):
            reason = reason or f"platform {platform.name!r} quantizes layers only"
        kept = platform.stays_float.get(site.op.variant(call))
        if kept is not None:
            reason = reason or f"platform {platform.name!r}: {kept}"
        if reason is not None or fields is None:
            site.config, site.why_float = None, reason
            return False
        require_supported(site, call, config, platform)
        site.config, site.platform, site.why_float = config, platform, None
        if site.has_parameters:
            site.weights.grid = _weight_grid(config, platform)
            site.weights.rule = RangeRule.parse_weight(config.weight_range)
            self._add_statistics(site, config)
            self._add_learned_weights(site, call)
            self._add_parameter_gradients(site, call)
        self._add_parts(site, call, config, platform)
        self._add_input_quantizers(site, call, config, platform, on_grid)
        if site.op.scale_source(platform) == "inputs":
            return True
        bits = config.output_bits
        if bits is not None and bits <= WIDEST_OPERAND and site.output is None:
            known = site.op.output_range(call, config, platform)
            require_free_range(site, known, platform, fields)
            site.output = self._quantizer(site, site.key, bits, known)
        return bits is not None and bits <= WIDEST_OPERAND

    def _obstacle(
        self, site: Site, call: Any, operands: list[TensorSpec], on_grid: set[int]
    ) -> str | None:
        obstacle = site.op.obstacle(call)
        if obstacle is not None:
            return obstacle
        if self.graph.is_aliased(site.key):
            return "works in place on a value that is read again under its old name"
        for weight in site.op.parameters(call):
            if weight.value not in self.constants:
                return "its weight is computed from the input"
            site.weight_is_computed |= not weight.constant
        if not all(spec.floating for spec in operands):
            return "an operand holds integers, not activations"
        layer = site.has_parameters or not site.op.needs_quantized_operand
        if not layer and not any(spec.value in on_grid for spec in operands):
            return "no operand is quantized"
        return None

    def _folded_layer(self, node: Node) -> Site | None:
        for site in self.instrumentation.sites:
            if site.fold is not None:
                consumer = self.graph.sole_consumer(site.key)
                if consumer is not None and consumer.key == node.key:
                    return site
        return None

    def _complete_folded(self, site: Site, node: Node) -> bool:
        layer = self._folded_layer(node)
        if layer is None or layer.config is None:
            site.why_float = "folded into a layer that stays float"
            return False
        site.config, site.platform, site.why_float = layer.config, layer.platform, None
        return layer.output is not None

    def _add_input_quantizers(
        self, site: Site, call: Any, config: QuantConfig, platform: Platform, on_grid: set[int]
    ) -> None:
        for position, operand in enumerate(site.op.operands(call)):
            name = str(position)
            bits = site.op.operand_bits(position, call, config, platform)
            if bits != config.activation_bits:
                site.operand_bits[position] = bits
            plain = isinstance(operand, TensorSpec) and operand.value not in on_grid
            if plain and name not in site.inputs:
                site.inputs[name] = self._quantizer(site, f"{site.key}:input{position}", bits)

    def _add_parts(self, site: Site, call: Any, config: QuantConfig, platform: Platform) -> None:
        for name, part in site.op.parts(call, config, platform).items():
            bits = config.activation_bits if part.bits is None else part.bits
            site.parts[name] = self._quantizer(site, f"{site.key}:{name}", bits, part.range)

    def _quantizer(
        self,
        site: Site,
        name: str,
        bits: int,
        known_range: float | tuple[float, float] | None = None,
    ) -> Quantizer:
        config, platform = site.config, site.platform
        assert config is not None  # the plan has just set both
        assert platform is not None
        if isinstance(known_range, tuple):  # the engine fixes whether there is a zero point, too
            config = dataclasses.replace(config, symmetry=None)
        scale = config.scale or platform.scale
        rounding = rounding_of(config, platform)
        # A range that is known, like a sigmoid's, comes with the step of its function.
        strict = config.strict_maximum and known_range is None
        grid = Grid(
            bits,
            scale,
            rounding,
            strict=strict,
            exclusive=platform.exclusive_powers,
            symmetry=symmetry_of(config, platform, bits),
        )
        kind = config.range if known_range is None else known_range
        learns, factor = site.op.learns_ranges, config.data_scale
        quantizer = Quantizer(name, grid, kind, learns=learns, factor=factor)
        quantizer.gradient = self._gradient(site, name)
        quantizer.train(self.model.training)
        return quantizer.to(self.device)

    def _gradient(self, site: Site, name: str) -> GradientQuantizer | None:
        config, platform = site.config, site.platform
        assert config is not None  # the plan has just set both
        assert platform is not None
        if config.gradient_bits is None:
            return None
        scale, rounding = config.scale or platform.scale, rounding_of(config, platform)
        bits, range_ = config.gradient_bits, config.gradient_range
        quantizer = GradientQuantizer(name, bits, scale, rounding, range_, site.switches)
        return quantizer.train(self.model.training).to(self.device)

    def _add_parameter_gradients(self, site: Site, call: Any) -> None:
        for name in (*(site.op.learned_weights(call) or ["weight"]), "bias"):
            quantizer = self._gradient(site, f"{site.key}:{name}")
            if quantizer is not None:
                site.gradients[name] = quantizer

    def _add_statistics(self, site: Site, config: QuantConfig) -> None:
        normalizes = site.fold is not None or isinstance(site.op, BatchNormOp)
        if config.statistics_bits is None or site.weights.grid is None or not normalizes:
            return
        ranges = ParameterRanges(site.key).train(self.model.training)
        ranges.grid = dataclasses.replace(
            site.weights.grid, bits=config.statistics_bits, narrow=False
        )
        ranges.rule = RangeRule.parse_weight(config.statistics_range)
        site.statistics = ranges

    def _add_learned_weights(self, site: Site, call: Any) -> None:
        rule, grid = site.weights.rule, site.weights.grid
        if rule is None or grid is None or rule.learned is None:
            return
        for name, outputs in site.op.learned_weights(call).items():
            channels = outputs if site.granularity == "channel" else None
            learned = LearnedScale(rule.learned, grid, channels).to(self.device)
            if name == "weight":
                site.weights.learned = learned
            else:
                site.weights.learned_parts[name] = learned

    # --- looking ahead ----------------------------------------------------------------------

    def _look_ahead(self, site: Site) -> None:
        """Let the quantizer before a clamping activation see only what passes it."""
        quantizer = site.output
        key = site.key
        follower = self.graph.sole_consumer(key)
        if site.fold is not None and follower is not None:
            follower = self.graph.sole_consumer(follower.key)
        if quantizer is None or follower is None or not self._may_look_ahead(site):
            return
        if follower.op == "sigmoid":
            quantizer.window = quantizer.window & Window(cap=SIGMOID_CAP)
            return
        if follower.key not in self.instrumentation:
            return
        clamp = self.instrumentation.find(follower.key)
        if isinstance(clamp.op, ClampOp) and clamp.quantized:
            call = clamp.op.bind(*follower.args, **_without_inplace(follower.kwargs))
            window = window_of(call)
            if window.low <= 0.0 <= window.high and not has_tensor_bounds(call):
                quantizer.window = quantizer.window & window
                clamp.merged = True

    def _may_look_ahead(self, site: Site) -> bool:
        config = site.config
        if config is None or not site.op.takes_window:
            return False
        if isinstance(site.op, BatchNormOp) or site.fold is not None:
            return config.ahead_bn_relu
        if site.op.kind == "linear":
            return config.ahead_linear_relu
        return config.ahead_conv_relu if isinstance(site.op, WeightedOp) else True


def _weight_grid(config: QuantConfig, platform: Platform) -> Grid:
    scale = config.scale or platform.scale
    if (config.granularity or platform.granularity) == "channel":
        scale = platform.channel_scale or scale
    return Grid(
        config.weight_bits,
        scale,
        rounding_of(config, platform),
        platform.narrow_weights if config.narrow_weights is None else config.narrow_weights,
        config.strict_maximum,
        exclusive=platform.exclusive_powers,
    )


def _without_inplace(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "inplace"}
