"""A site: one call of one op in one module, with everything the stages attach to it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_linger.core.capture import can_read, capturing
from lightning_linger.core.config import Granularity, QuantConfig
from lightning_linger.core.distributed import mean_over_ranks
from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.float32_state import Float32State
from lightning_linger.core.gradients import GradientQuantizer
from lightning_linger.core.images import RawImages
from lightning_linger.core.integer import quantize
from lightning_linger.core.limits import Limits, apply_bound, bound_of, is_within
from lightning_linger.core.noise import Noise
from lightning_linger.core.parameter_ranges import ParameterRanges
from lightning_linger.core.payload import real_values
from lightning_linger.core.platform import rounding_of
from lightning_linger.core.quantizer import Quantizer
from lightning_linger.core.ranges import EMA_WEIGHT
from lightning_linger.core.requantize import requantized
from lightning_linger.core.rounding import Rounder, Rounding
from lightning_linger.core.switches import FloatPart, FrozenPart, RoundedParameter, Switches
from lightning_linger.core.tags import WIDEST_OPERAND, Tag, tag_of, with_tag

if TYPE_CHECKING:
    from lightning_linger.core.graph import Node
    from lightning_linger.core.platform import Platform
    from lightning_linger.core.registry import Op


class Site(Float32State):
    """One call site and what the stages attached to it.

    Attributes:
        key: ``module.path/op/k``.
        node: The recorded call.
        op: Its meaning.
        switches: What is on in the model.
        config: How it is quantized; None while it is not (or never) quantized.
        platform: The target whose arithmetic applies.
        inputs: Quantizers of operands that arrive as plain floats, by position.
        parts: Quantizers inside the op, by name.
        gradients: Gradient quantizers of the weights, by name, and of all biases.
        output: Quantizer of the result, if the result has a range of its own.
        weights: What its weights are rounded to.
        raw_images: Normalizes raw images, None where none are taken.
        fold: The batch norm folded into this layer, if any.
        noise: Random numbers of stochastic rounding, None without.
        completes_fold: For a batch norm: the layer before it has taken it in.
        merged: For an activation: its clamping happens in the quantizer before it.
        released: A plain op writes into the result in place: it leaves the grid as a copy.
        weight_is_computed: The weight is a function of parameters (a parametrization), made anew in
            each forward.
        operand_bits: Width of operands, where it is not the configured one, by position.
        seen: Tags of the operands in the latest training forward.
        limits: Range limits of the constrained float stage.
        floating: The parts that are not rounded, though they are planned to be.
        why_float: Why the site is not quantized, if so.
    """

    output_bound: Tensor

    def __init__(self, node: Node, op: Op, owner: nn.Module, switches: Switches) -> None:
        super().__init__()
        self.key = node.key
        self.node = node
        self.op = op
        self.switches = switches
        # Kept out of `_modules`: the site does not own the layer.
        self.__dict__["owner"] = owner
        self.__dict__["fold"] = None
        self.__dict__["noise"] = None
        self.config: QuantConfig | None = None
        self.platform: Platform | None = None
        self.inputs = nn.ModuleDict()
        self.parts = nn.ModuleDict()
        self.gradients = nn.ModuleDict()
        self.operand_bits: dict[int, int] = {}
        self.output: Quantizer | None = None
        self.weights = ParameterRanges(node.key)
        self.statistics: ParameterRanges | None = None
        self.completes_fold = False
        self.merged = False
        self.limits: Limits | None = None
        self.why_float: str | None = None
        self.prepared: dict[str, Any] = {}
        self.seen: dict[int, Tag | None] = {}
        self.released = False
        self.raw_images: RawImages | None = None
        self.weight_is_computed = False
        self._frozen: frozenset[FrozenPart] = frozenset()
        self.floating: frozenset[FloatPart] = frozenset()

    @property
    def quantized(self) -> bool:
        """Whether the quantize stage has a plan for this site."""
        return self.config is not None

    @property
    def recorded_call(self) -> Any:
        """The call as it was recorded, with specs in the place of tensors."""
        kwargs = {name: x for name, x in self.node.kwargs.items() if name != "inplace"}
        return self.op.bind(*self.node.args, **kwargs)

    @property
    def has_parameters(self) -> bool:
        """Whether the call has weights of the model."""
        return self.op.has_parameters or bool(self.op.parameters(self.recorded_call))

    def quantizers(self) -> list[Quantizer]:
        """Return the activation quantizers of this site."""
        inside = (*self.inputs.values(), *self.parts.values())
        own = [q for q in inside if isinstance(q, Quantizer)]
        return own + ([self.output] if self.output is not None else [])

    @property
    def learning(self) -> bool:
        """Whether the forward that runs now moves the ranges of this site."""
        if not (self.training and self.switches.learning) or "activations" in self._frozen:
            return False
        # What is not rounded needs a range once, for the scale that biases have.
        return "activations" not in self.floating or not all(q.known for q in self.quantizers())

    @property
    def watching(self) -> bool:
        """Whether this float forward moves the ranges, ahead of quantization."""
        switches = self.switches
        ahead = switches.watch and not switches.quantize and switches.system == "fake"
        return ahead and self.quantized and self.learning

    def watch_operands(self, operands: list[Any]) -> None:
        """Move the ranges of operands by a float forward."""
        for position, x in enumerate(operands):
            if isinstance(x, Tensor) and str(position) in self.inputs:
                quantizer: Any = self.inputs[str(position)]
                quantizer.watch(x)

    def watch_result(self, y: Tensor) -> None:
        """Move the range of the result by a float forward."""
        if self.output is not None:
            limit = None if self.active_limits is None else self.active_limits.output
            static = limit is not None and limit.kind == "static"
            self.output.watch(y, limit.value if limit is not None and static else math.inf)

    @property
    def ready(self) -> bool:
        """Whether every quantizer knows its range, or is about to learn it in this forward."""
        if self.learning or "ready" in self.prepared:
            return True
        ready = all(quantizer.known for quantizer in self.quantizers())
        if ready:
            self.prepared["ready"] = True
        return ready

    def system(self) -> str | None:
        """Return the number system the site runs in now, None for the plain torch function."""
        switches = self.switches
        if self.training and self.prepared:
            self.prepared.clear()
        if (
            switches.quantize
            and self.config is not None
            and switches.system != "float"
            and self.ready
        ):
            return switches.system
        if self.watching:
            return "float"
        if switches.fuse and (self.fold is not None or self.completes_fold):
            return "float"
        if switches.normalize and self.limits is not None:
            return "float"
        return None

    @property
    def active_fold(self) -> nn.Module | None:
        """The batch norm to fold now, None while folding is off."""
        fold: Any = self.__dict__["fold"]
        return fold if self.switches.fuse else None

    @property
    def active_limits(self) -> Limits | None:
        """The limits to apply now."""
        return self.limits if self.switches.normalize else None

    def limit_output(self, y: Tensor) -> Tensor:
        """Clamp a result into its limit; a dynamic limit moves in training, then stays."""
        limits = self.active_limits
        if limits is None or limits.output is None:
            return y
        if limits.output.kind == "static":
            if is_within(y, limits.output.value):
                return y
            if limits.gradient == "zero":
                return y.clamp(-limits.output.value, limits.output.value)
            return apply_bound(y, y.new_tensor(limits.output.value), limits.gradient)
        if self.learning:
            batch = mean_over_ranks(bound_of(y, limits.output), y.numel())
            moved = torch.lerp(self.output_bound, batch, EMA_WEIGHT)
            self.output_bound.copy_(torch.where(self.output_bound > 0, moved, batch))
        elif can_read(self.output_bound) and not self.output_bound.item() > 0:
            return y
        return apply_bound(y, self.output_bound.to(y.dtype), limits.gradient)

    def output_limit(self) -> float | None:
        """Return the bound :meth:`limit_output` applies in evaluation, None if there is none."""
        limits = self.active_limits
        if limits is None or limits.output is None:
            return None
        if limits.output.kind == "static":
            return limits.output.value
        if "output_limit" not in self.prepared:
            # Read once: a graph capture could not.
            bound = float(self.output_bound.item())
            self.prepared["output_limit"] = bound if bound > 0 else None
        found: float | None = self.prepared["output_limit"]
        return found

    def image(self, raw: Tensor) -> Tensor:
        """Return a raw image normalized, in float32.

        Raises:
            ConfigError: If nobody said how.
        """
        if self.raw_images is None:
            msg = (
                f"`{self.key}` got uint8. It takes raw images if it is the first convolution and "
                "`firstconv` is passed to `linger.calibrate`; normalize them otherwise."
            )
            raise ConfigError(msg)
        image: Tensor = self.raw_images(raw)
        return image

    def operand(self, position: int, x: Tensor) -> Tensor | None:
        """Return an operand on the integer grid, in the site's input width.

        A tagged tensor of the right width passes as it is; another width is requantized with its
        own step shifted; a plain tensor goes through the site's input quantizer.

        Returns:
            The tagged tensor, or None if the operand is plain and was not planned to be.
        """
        tag = tag_of(x)
        if tag is None and self.switches.recomputing:
            # Reentrant checkpointing detaches what it repeats from: take the tag of the first time.
            tag = self.seen.get(position)
            x = x if tag is None else with_tag(x, tag)
        elif self.training and not capturing():
            self.seen[position] = tag
        if tag is not None and tag.bits <= WIDEST_OPERAND:
            bits = self.width_of_operand(position, tag.width)
            return x if tag.width == bits else self.requantized(x, tag, bits)
        name = str(position)
        if name not in self.inputs:
            if torch.compiler.is_dynamo_compiling() and not self.op.needs_quantized_operand:
                msg = (
                    f"`{self.key}`: its operand has lost its quantization in torch.compile, which "
                    "hides calls of `F.pad` from function modes. Pad within the convolution or the "
                    "pool, or leave this module eager."
                )
                raise UnsupportedError(msg)
            return None
        quantizer: Any = self.inputs[name]
        return self.quantized_input(quantizer, x)

    def operand_codes(self, position: int, x: Tensor) -> Tensor | None:
        """Return an operand as codes in any number system, see :meth:`operand`."""
        name = str(position)
        if tag_of(x) is not None or name not in self.inputs:
            return self.operand(position, x)
        quantizer: Any = self.inputs[name]
        return self._quantized_codes(quantizer, x)

    def width_of_operand(self, position: int, default: int) -> int:
        """Return the width that an operand must have."""
        if self.config is None:
            return default
        return self.operand_bits.get(position, self.config.activation_bits)

    def part(self, name: str) -> Quantizer:
        """Return a quantizer inside the op."""
        part: Any = self.parts[name]
        assert isinstance(part, Quantizer)  # the planner puts nothing else there
        return part

    def requantized(self, x: Tensor, tag: Tag, bits: int) -> Tensor:
        """Round a tagged tensor to another width at the step shifted by the difference in bits."""
        return requantized(
            x,
            tag,
            bits,
            site=self.key,
            rounding=self.rounding,
            platform=self.platform_name,
            fake=self.switches.system == "fake",
            training=self.training,
        )

    @property
    def rounding(self) -> Rounding:
        """Rounding rule of results."""
        if self.config is None or self.platform is None:
            return "half_up"
        return rounding_of(self.config, self.platform)

    def weight_rounding(self, name: str) -> str | Rounder:
        """Return how parameters are rounded in the forward that runs now.

        Args:
            name: Tells the parameters of the site apart.
        """
        noise: Noise | None = self.__dict__["noise"]
        if noise is None or not noise.training:
            return self.rounding
        return noise.rounder(f"{self.key}:{name}", shared=True)

    @property
    def granularity(self) -> Granularity | int:
        """Granularity of weight scales."""
        if self.config is not None and self.config.granularity is not None:
            return self.config.granularity
        return self.platform.granularity if self.platform else "tensor"

    def with_rounded_gradient(self, name: str, parameter: Tensor) -> Tensor:
        """Return a parameter with its gradient rounded, if it is to be.

        Args:
            name: ``bias``, or what tells the weights of the site apart.
            parameter: On its grid.
        """
        if name not in self.gradients:
            return parameter
        rounded: Tensor = self.gradients[name](parameter)
        return rounded

    def note(self, name: str, source: Tensor | None, values: Tensor, step: Scalar) -> None:
        """Tell who collects parameters what one is rounded to (see :class:`RoundedParameter`)."""
        if self.switches.rounded is not None:
            steps = torch.as_tensor(step, dtype=torch.float32).detach()
            self.switches.rounded.append(
                RoundedParameter(self.key, name, source, values.detach(), steps)
            )

    @property
    def moves_weight_ranges(self) -> bool:
        """Whether a training forward that runs now moves the ranges of weights."""
        return self.training and self.switches.learning and not self.weights.frozen

    @property
    def frozen(self) -> frozenset[FrozenPart]:
        """The parts whose ranges stay what they are."""
        weights: frozenset[FrozenPart] = frozenset({"weights"} if self.weights.frozen else ())
        return self._frozen | weights

    def freeze(self, parts: frozenset[FrozenPart]) -> None:
        """Keep the ranges of some parts, and let those of the others move."""
        self._frozen = parts - {"weights"}
        for quantizer in self.quantizers():
            if quantizer.learned is not None:
                quantizer.learned.requires_grad_("activations" not in parts)
        self.weights.freeze("weights" in parts)
        if self.statistics is not None:
            self.statistics.freeze("statistics" in parts)
        for node in self.gradient_quantizers():
            node.frozen = "gradients" in parts
        self.thaw()

    def gradient_quantizers(self) -> list[GradientQuantizer]:
        """Return what rounds the gradients of its parameters and activations."""
        return [module for module in self.modules() if isinstance(module, GradientQuantizer)]

    def leave_float(self, parts: frozenset[FloatPart]) -> None:
        """Round everything but some parts."""
        self.floating = parts
        for quantizer in self.quantizers():
            quantizer.rounds = "activations" not in parts
        self.thaw()

    @property
    def float_operands(self) -> frozenset[FloatPart]:
        """The parts left in float that integers are made of: statistics go into rounded weights."""
        return self.floating - {"statistics"}

    @property
    def passes_float(self) -> bool:
        """Whether the result is that of the float function, because the op cannot part them."""
        apart = self.op.rounds_parts_apart
        return not apart and self.output is not None and "activations" in self.floating

    @property
    def active_statistics(self) -> ParameterRanges | None:
        """What the running statistics of a batch norm are rounded to now, None for float."""
        quantized = self.switches.quantize and self.switches.system != "float"
        return self.statistics if quantized and "statistics" not in self.floating else None

    @property
    def gives_real_results(self) -> bool:
        """Whether the target leaves the integers behind each layer and adds biases there."""
        return self.platform is not None and self.platform.layers_only

    @property
    def has_groups(self) -> bool:
        """Whether parts of the weight along its input dimension have scales of their own."""
        grouped = self.granularity == "input_channel" or isinstance(self.granularity, int)
        return grouped and self.op.groups_weights

    @property
    def weight_code_bits(self) -> int:
        """Width of the weight's integers, which have the step of the finest group."""
        return WIDEST_OPERAND if self.has_groups else self.weights.bits

    @property
    def widest_operand(self) -> int:
        """Width of the widest operand of the accumulation."""
        return max(self.weight_code_bits, self.config.activation_bits if self.config else 8)

    @property
    def fixed_point(self) -> bool:
        """Whether scales are 32-bit multipliers and shifts, whose rounding no float repeats."""
        return self.platform is not None and self.platform.fixed_point

    @property
    def rounds_twice(self) -> bool:
        """Whether the engine rounds a product before it shifts it, and then again."""
        rounding = None if self.platform is None else self.platform.multiplier_rounding
        return self.fixed_point and rounding == "double"

    @property
    def platform_name(self) -> str:
        """Name of the platform, for the attributes of integer ops."""
        return self.platform.name if self.platform else ""

    def quantized_input(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        """Round a plain tensor with an input quantizer in the current number system."""
        if self.switches.system != "integer":
            rounded: Tensor = quantizer(x, learn=self.learning)
            return rounded
        return self._quantized_codes(quantizer, x)

    def _quantized_codes(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        x = real_values(x)
        step = float(quantizer.step())
        low, high = quantizer.code_bounds(step)
        grid = quantizer.grid
        codes = quantize(
            x.float(), step, grid.code_bits, int(low), int(high), grid.rounding, self.platform_name
        )
        return with_tag(codes, quantizer.tag(step, x.dtype))

    def thaw(self) -> None:
        """Forget everything derived from weights and ranges."""
        self.prepared.clear()

    def train(self, mode: bool = True) -> Site:
        """Switch mode; what evaluation has prepared is dropped."""
        self.thaw()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.thaw()

    def extra_repr(self) -> str:
        """Show the key."""
        return self.key
