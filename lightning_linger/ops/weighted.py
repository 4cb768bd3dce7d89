"""What convolutions and linear layers share: weights, biases, folding, exact accumulation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.capture import can_read, capturing, without_autocast
from lightning_linger.core.fake_quantize import Scalar, fake_quantize, straight_through
from lightning_linger.core.images import is_raw
from lightning_linger.core.integer import (
    EXACT_FLOAT32,
    code_limits,
    float32_code_limits,
    payload_dtype,
)
from lightning_linger.core.limits import limited
from lightning_linger.core.quantizer import readable
from lightning_linger.core.ranges import LearnedScale
from lightning_linger.core.registry import Op
from lightning_linger.core.rounding import ROUNDINGS, Rounder, round_value
from lightning_linger.core.sites import Site, integer_codes
from lightning_linger.core.tags import WIDEST_OPERAND, Tag, tag_of, with_tag
from lightning_linger.ops.folding import (
    COMPLETE,
    TINY_FACTOR,
    Folded,
    batch_statistics,
    beta_of,
    full,
    gamma_of,
    mark_folded,
    running_bias,
    running_factor,
    running_statistics,
    snapshot,
    uses_batch_statistics,
)
from lightning_linger.ops.groups import group_steps


@dataclass(frozen=True)
class Parameters:
    """The effective weight and bias of a layer.

    Args:
        weight: Of the shape the torch function takes.
        bias: ``[C_out]`` or None.
        step: Step of the weight, 0-dim or ``[C_out]``; None if the weight is not quantized.
    """

    weight: Tensor
    bias: Tensor | None
    step: Scalar | None = None


@dataclass(frozen=True)
class Prepared:
    """A layer's parameters in evaluation, derived once.

    Args:
        weight: On the integer grid, real values; divided by the output's step if ``in_codes``.
        bias: Likewise, and half a code added if ``in_codes``.
        in_codes: Whether the layer gives its output in codes plus one half, so that rounding it
            up is a floor.
        codes: The weight's codes.
        bias_codes: The bias's codes, int32; None too where it is added to real results.
        steps: Steps of the weight, one or one per output channel.
        scale_x: Step of the input.
        bits_x: Width of the input.
        exact_in_float32: Whether every accumulator, bias and rounding half included, stays below
            2^24 for any input codes, so that float32 arithmetic is exact.
        result: What the output is rounded to, if ``in_codes``.
        validity: What it was derived from.
        source: The weight it was derived from, if that has no identity of its own.
    """

    weight: Tensor
    bias: Tensor | None
    in_codes: bool
    codes: Tensor
    bias_codes: Tensor | None
    steps: list[float]
    scale_x: float
    bits_x: int
    exact_in_float32: bool
    result: IntegerResult | None
    validity: tuple[Any, ...]
    source: Tensor | None


class WeightedOp(Op, ABC):
    """A linear map of the input with a weight and an optional bias."""

    needs_quantized_operand = False
    has_parameters = True
    learns_weight_ranges = True
    rounds_parts_apart = True
    # Of its result, counted from the end.
    channel_dim = -1

    def parameters(self, call: Any) -> list[Any]:
        """The weight."""
        return [call.weight]

    @torch.no_grad()
    def parameters_in_use(self, site: Site, call: Any, step_x: Scalar | None) -> Parameters:
        """Return the weight and bias that evaluation computes with, and the weight's step.

        Args:
            site: The site.
            call: Its bound call.
            step_x: Step of the input; None for the parameters before they are rounded.
        """
        return self._parameters(site, call, step_x)

    @abstractmethod
    def apply(self, call: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the torch function with other tensors in the place of the call's."""

    @abstractmethod
    def per_channel(self, call: Any, values: Tensor) -> Tensor:
        """View ``[C_out]`` values so that they broadcast to the weight."""

    @abstractmethod
    def channel_rows(self, call: Any, weight: Tensor) -> Tensor:
        """Return the weight as ``[C_out, N]``, a row for each output channel."""

    @abstractmethod
    def along_output(self, call: Any, values: Tensor) -> Tensor:
        """View ``[C_out]`` values so that they broadcast to the result."""

    def channel_reduce(self, call: Any, weight: Tensor, how: str) -> Tensor:
        """Reduce the absolute weight to ``[C_out]`` by ``amax`` or ``sum``."""
        rows = self.channel_rows(call, weight.abs())
        reduced: Tensor = getattr(rows, how)(dim=1)
        return reduced

    @abstractmethod
    def integer_kernel(
        self, site: Site, call: Any, x: Tensor, prepared: Prepared, result: IntegerResult
    ) -> Tensor:
        """Call the custom op of the family."""

    # --- the three number systems -----------------------------------------------------------

    def run_float(self, site: Site, call: Any) -> Tensor:
        """Run folded and limited, not quantized."""
        call = with_image(site, call)
        if site.active_fold is None:
            return self._run(site, call, call.input, None, call.input.dtype)
        with without_autocast(call.input.device.type):
            return self._run(site, call, full(call.input), None, call.input.dtype)

    def run_fake(self, site: Site, call: Any) -> Any:
        """Run on the integer grid in floating point."""
        call = with_image(site, call)
        with without_autocast(call.input.device.type):
            if site.gives_real_results and not site.training and self._has_integers(site):
                return self._evaluate_integers(site, call)
            x = site.operand(0, call.input)
            if x is None:
                return NotImplemented
            tag = tag_of(x)
            assert tag is not None  # `operand` returns tagged tensors
            if site.training:
                return self._run(site, call, full(x), tag.step, tag.dtype)
            return self._evaluate(site, call, full(x), tag)

    def run_integer(self, site: Site, call: Any) -> Any:
        """Run on the integers."""
        call = with_image(site, call)
        x = site.operand(0, call.input)
        if x is None:
            return NotImplemented
        tag = tag_of(x)
        assert tag is not None
        if site.gives_real_results:
            return self._real_result(site, call, integer_codes(x), tag)
        prepared = self._prepare(site, call, tag)
        result = integer_result(site, float(tag.step) * max(prepared.steps), tag)
        y = self.integer_kernel(site, call, integer_codes(x), prepared, result)
        y = with_tag(y, result.tag) if result.tag is not None else site.limit_output(y)
        return mark_folded(y, COMPLETE) if site.active_fold is not None else y

    # --- engines that leave the integers behind each layer ----------------------------------

    def _has_integers(self, site: Site) -> bool:
        return not capturing() or "weights" in site.prepared

    def _evaluate_integers(self, site: Site, call: Any) -> Any:
        """Run fake-quant in evaluation on the integers, which no other op sees."""
        codes = site.operand_codes(0, call.input)
        if codes is None:
            return NotImplemented
        tag = tag_of(codes)
        assert tag is not None  # codes are tagged
        value = self._real_result(site, call, integer_codes(codes), tag)
        if not torch.is_grad_enabled() or capturing():
            return value
        x = site.operand(0, call.input)
        assert x is not None  # it has codes
        parameters = self._parameters(site, call, tag.step)
        carrier = site.limit_output(self.apply(call, full(x), parameters.weight, parameters.bias))
        value = straight_through(value, carrier.to(value.dtype))
        return mark_folded(value, COMPLETE) if site.active_fold is not None else value

    def _real_result(self, site: Site, call: Any, codes: Tensor, tag: Tag) -> Tensor:
        """Return ``float32(accumulator) * (step_x * step_w) + bias``."""
        prepared = self._prepare(site, call, tag)
        result = IntegerResult(0.0, 0, 0, 0, None)
        y = self.integer_kernel(site, call, codes, prepared, result)
        if prepared.bias is not None:
            y = y + self.along_output(call, prepared.bias)
        y = site.limit_output(y).to(tag.dtype)
        return mark_folded(y, COMPLETE) if site.active_fold is not None else y

    # --- training ---------------------------------------------------------------------------

    def _run(
        self, site: Site, call: Any, x: Tensor, step_x: Scalar | None, dtype: torch.dtype
    ) -> Tensor:
        bn: Any = site.active_fold
        if bn is None or not (uses_batch_statistics(bn) and site.switches.fuse_mode != "frozen"):
            parameters = self._parameters(site, call, step_x)
            y = self._finish(site, call, x, parameters, step_x, dtype)
            return mark_folded(y, COMPLETE) if bn is not None else y
        if site.switches.fuse_mode == "batch":
            return self._run_batch_folded(site, call, x, step_x, dtype)
        return self._run_scaled(site, call, x, step_x, dtype)

    def _finish(
        self,
        site: Site,
        call: Any,
        x: Tensor,
        parameters: Parameters,
        step_x: Scalar | None,
        dtype: torch.dtype,
    ) -> Tensor:
        y = self.apply(call, x, parameters.weight, parameters.bias)
        quantized = step_x is not None
        # Without quantization or folding autocast may be on, and decides the dtype.
        wanted = dtype if quantized or site.active_fold is not None else y.dtype
        return finish(site, y, self._product(step_x, parameters.step), quantized, wanted)

    def _product(self, step_x: Scalar | None, step_w: Scalar | None) -> Scalar | None:
        """Return the (coarsest) step of the accumulator."""
        if step_x is None or step_w is None:
            return None
        product = step_x * step_w
        return product.amax() if isinstance(product, Tensor) else product

    def _run_batch_folded(
        self, site: Site, call: Any, x: Tensor, step_x: Scalar | None, dtype: torch.dtype
    ) -> Tensor:
        bn: Any = site.active_fold
        plain = self.apply(call, x, full(call.weight), None)
        mean, var = batch_statistics(plain)
        factor = gamma_of(bn) * torch.rsqrt(var + bn.eps)
        bias = beta_of(bn) - mean * factor
        if call.bias is not None:
            bias = bias + 0.0 * full(call.bias)  # see BatchNormOp: a gradient of zero, for DDP
        weight = full(call.weight) * self.per_channel(call, factor)
        parameters = self._constrained(site, call, weight, bias, step_x)
        y = self.apply(call, x, parameters.weight, parameters.bias)
        folded = Folded(
            site=site,
            conv_bias=call.bias,
            dtype=dtype,
            statistics=(mean.detach(), var.detach()),
            product=self._product(step_x, parameters.step),
            quantized=step_x is not None,
        )
        return mark_folded(y, folded)

    def _run_scaled(
        self, site: Site, call: Any, x: Tensor, step_x: Scalar | None, dtype: torch.dtype
    ) -> Tensor:
        bn: Any = site.active_fold
        with torch.no_grad():
            inv_sigma = torch.rsqrt(full(bn.running_var) + bn.eps)
            if capturing():
                inv_sigma = snapshot(inv_sigma)
            factor = gamma_of(bn) * inv_sigma
            faint = factor.abs() < TINY_FACTOR
        own_weight = full(call.weight)
        scaled = own_weight * self.per_channel(call, factor)
        constrained = self._constrained(site, call, scaled, None, step_x)
        silent = None
        if step_x is not None:
            faint = faint | (self.channel_reduce(call, constrained.weight.detach(), "amax") == 0)
            silent = faint
        scale = torch.where(faint, inv_sigma, factor)
        weight = constrained.weight
        if not _surely_none(faint):
            unfolded = own_weight * self.per_channel(call, inv_sigma)
            weight = torch.where(self.per_channel(call, faint), unfolded, weight)
        y = self.apply(call, x, weight, None)
        folded = Folded(
            site=site,
            dtype=dtype,
            scale=scale,
            conv_bias=call.bias,
            silent=silent,
            product=self._product(step_x, constrained.step),
            quantized=step_x is not None,
        )
        return mark_folded(y, folded)

    # --- parameters -------------------------------------------------------------------------

    def _parameters(self, site: Site, call: Any, step_x: Scalar | None) -> Parameters:
        weight = full(call.weight)
        bias = None if call.bias is None else full(call.bias)
        bn: Any = site.active_fold
        if bn is not None:
            mean, var = running_statistics(site, bn.running_mean, bn.running_var)
            factor = running_factor(bn, var)
            weight = weight * self.per_channel(call, factor)
            bias = running_bias(bn, mean, bias, factor)
        return self._constrained(site, call, weight, bias, step_x)

    def _constrained(
        self, site: Site, call: Any, weight: Tensor, bias: Tensor | None, step_x: Scalar | None
    ) -> Parameters:
        limits = site.active_limits
        if limits is not None:
            weight = limited(weight, limits.weight, limits.gradient)
            bias = limited(bias, limits.bias, limits.gradient) if bias is not None else None
        if step_x is None or site.weight_grid is None or site.config is None:
            return Parameters(weight, bias)
        grid = site.weight_grid
        in_codes = not site.gives_real_results
        finest = None
        if in_codes:
            finest = finest_for_bias(bias, step_x, site.config.bias_bits, bias_headroom(site))
        own = weight.detach()
        per_channel = site.granularity == "channel"
        rows = self.channel_rows(call, own) if per_channel else own.reshape(1, -1)
        step_w: Scalar
        steps: Scalar
        if site.has_groups:
            steps, step_w = group_steps(site, own, finest)
        else:
            step_w = site.held("weight", weight_step(site, rows, finest))
            steps = step_w
            if isinstance(step_w, Tensor) and step_w.dim() > 0:
                steps = self.per_channel(call, step_w)
        rounding = site.weight_rounding("weight")
        limits_w = (grid.qmin, grid.qmax)
        learned = site.learned_weight
        rounds = "weights" not in site.floating
        if rounds and learned is not None and site.training:
            several = learned.value.dim() > 0
            parameter = self.per_channel(call, learned.value) if several else learned.value
            weight = learned_on_grid(weight, steps, limits_w, rounding, learned, parameter)
        elif rounds:
            weight = on_grid(weight, steps, limits_w, rounding, site.clips_weights)
        site.note("weight", call.weight, weight, step_w)
        if bias is not None:
            limits_b = float32_code_limits(site.config.bias_bits)
            if in_codes and "biases" not in site.floating:
                bias = on_grid(bias, step_w * step_x, limits_b, grid.rounding)
            bias = site.with_rounded_gradient("bias", bias)
            site.note("bias", call.bias, bias, step_w * step_x)
        return Parameters(site.with_rounded_gradient("weight", weight), bias, step_w)

    # --- evaluation -------------------------------------------------------------------------

    def _evaluate(self, site: Site, call: Any, x: Tensor, tag: Tag) -> Tensor:
        if capturing() and "weights" not in site.prepared:
            parameters = self._parameters(site, call, tag.step)
            y = self._finish(site, call, x, parameters, tag.step, tag.dtype)
            return mark_folded(y, COMPLETE) if site.active_fold is not None else y
        prepared = self._prepare(site, call, tag)
        if site.fixed_point and tag.rounded and not site.floating:
            return self._evaluate_kernel(site, call, with_tag(x, tag), prepared, tag)
        weight, bias = prepared.weight, prepared.bias
        if torch.is_grad_enabled() and not capturing():
            differentiable = self._parameters(site, call, tag.step)
            weight, bias = differentiable.weight, differentiable.bias
        elif prepared.in_codes:
            return self._evaluate_codes(site, call, x, prepared, tag)
        if prepared.exact_in_float32 or x.dtype == torch.float64:
            y = self.apply(call, x, weight, bias)
        else:
            y = self.apply(
                call, x.double(), weight.double(), None if bias is None else bias.double()
            )
        y = finish(site, y, self._product(tag.step, max(prepared.steps)), True, tag.dtype)
        return mark_folded(y, COMPLETE) if site.active_fold is not None else y

    def _evaluate_kernel(
        self, site: Site, call: Any, x: Tensor, prepared: Prepared, tag: Tag
    ) -> Tensor:
        """Take the integer kernel's value, and the gradient of the real one."""
        result = integer_result(site, float(tag.step) * max(prepared.steps), tag)

        def real() -> Tensor:
            parameters = self._parameters(site, call, tag.step)
            return self.apply(call, x, parameters.weight, parameters.bias)

        with torch.no_grad():
            codes = self.integer_kernel(site, call, integer_codes(x), prepared, result)
        y = finish_codes(site, codes, result, tag.dtype, real)
        return mark_folded(y, COMPLETE) if site.active_fold is not None else y

    def _evaluate_codes(
        self, site: Site, call: Any, x: Tensor, prepared: Prepared, tag: Tag
    ) -> Tensor:
        result = prepared.result
        assert result is not None  # `in_codes` says so
        assert result.tag is not None  # codes have a step
        y = self.apply(call, x, prepared.weight, prepared.bias)
        y = y.floor_().clamp_(result.low, result.high).mul_(result.scale).to(tag.dtype)
        y = with_tag(y, result.tag)
        return mark_folded(y, COMPLETE) if site.active_fold is not None else y

    def _prepare(self, site: Site, call: Any, tag: Tag) -> Prepared:
        found: Prepared | None = site.prepared.get("weights")
        if found is not None and (capturing() or _is_valid(found, site, call)):
            return found
        step_x, bits_x = float(tag.step), tag.bits
        with torch.no_grad():
            parameters = self._parameters(site, call, step_x)
            step_w = torch.as_tensor(parameters.step)
            steps = self.per_channel(call, step_w) if step_w.dim() else step_w
            codes = torch.round(parameters.weight / steps)
            bias_codes = None
            if parameters.bias is not None and not site.gives_real_results:
                bias_codes = torch.round(parameters.bias.double() / (step_w.double() * step_x))
            bound = self.channel_reduce(call, codes.double(), "sum") * 2.0 ** (bits_x - 1)
            channels = bound.numel()
            if bias_codes is not None:
                bound = bound + bias_codes.abs()
            exact = self._fits_float32(site, bound.max().item(), step_x, step_w)
            weight, bias, in_codes, result = parameters.weight, parameters.bias, False, None
            if exact and self._gives_codes(site):
                step_o = self._output_step(site, step_x, step_w)
                weight, in_codes = weight / step_o, True
                result = integer_result(site, step_x * float(step_w.max()), tag)
                bias = weight.new_full((channels,), 0.5) if bias is None else bias / step_o + 0.5
            found = Prepared(
                weight=weight,
                bias=bias,
                in_codes=in_codes,
                codes=codes.to(payload_dtype(site.weight_code_bits)),
                bias_codes=None if bias_codes is None else bias_codes.to(torch.int32),
                steps=[float(s) for s in step_w.flatten()],
                scale_x=step_x,
                bits_x=bits_x,
                exact_in_float32=exact,
                result=result,
                validity=_validity(site, call),
                source=call.weight.clone() if site.weight_is_computed else None,
            )
        site.prepared["weights"] = found
        return found

    def _fits_float32(self, site: Site, bound: float, step_x: float, step_w: Tensor) -> bool:
        if torch.get_float32_matmul_precision() != "highest" and site.widest_operand > 8:
            return False
        half = 0.0
        if site.config is not None and site.config.output_bits == 32:
            half = bound + 1.0  # added to the accumulator itself, it takes a bit of its own
        if site.output is not None:
            # Codes are shifted to start at zero, and a half is added.
            offset = (2.0 ** (site.output.grid.bits - 1) + 0.5) * self._output_step(
                site, step_x, step_w
            )
            half = offset / (step_x * float(step_w.min()))
        return bound + half < EXACT_FLOAT32

    def _output_step(self, site: Site, step_x: float, step_w: Tensor) -> float:
        assert site.output is not None  # asked for quantized outputs only
        return float(site.output.step(minimum_step(site, step_x * float(step_w.max()))))

    def _gives_codes(self, site: Site) -> bool:
        """Whether dividing by the output step is exact and nothing needs the real values."""
        if site.output is None or site.output.grid.rounding != "half_up" or site.floating:
            return False
        limits = site.active_limits
        dynamic = (
            limits is not None and limits.output is not None and limits.output.kind != "static"
        )
        return site.output.grid.scale_kind == "power_of_two" and not dynamic


@dataclass(frozen=True)
class IntegerResult:
    """What an integer kernel has to produce.

    Args:
        scale: Step of the result; 0 asks for real values in float32.
        bits: Width of the result.
        low: Smallest code.
        high: Largest code.
        tag: Tag of the result, None for real values.
    """

    scale: float
    bits: int
    low: int
    high: int
    tag: Tag | None


def with_image(site: Site, call: Any) -> Any:
    """Return a call with a raw image normalized."""
    if not is_raw(call.input):
        return call
    return call._replace(input=site.image(call.input).to(call.weight.dtype))


def finest_for_bias(
    bias: Tensor | None, step_x: Scalar, bits: int, headroom: float = 1.0
) -> Tensor | None:
    """Return the finest weight step, per channel, at which the bias fits its codes.

    Args:
        bias: ``[C]``, or None.
        step_x: Step of the input.
        bits: Width of the bias.
        headroom: How many times the bias has to fit.
    """
    if bias is None:
        return None
    return bias.detach().abs().float() * headroom / (step_x * float32_code_limits(bits)[1])


def bias_headroom(site: Site) -> float:
    """Return what part of the bias codes is left to the sum: TFLite's converter keeps half."""
    return 2.0 if site.fixed_point else 1.0


def integer_result(site: Site, product: float, tag: Tag) -> IntegerResult:
    """Return what a kernel has to produce from an accumulator of step ``product``.

    Args:
        site: The layer.
        product: Step of the accumulator, the coarsest of its channels.
        tag: Tag of the input.
    """
    output = site.output
    if output is None:
        if site.config is not None and site.config.output_bits == 32:
            limits = _limited_codes(site, product, *code_limits(32))
            return IntegerResult(product, 32, *limits, Tag(product, 32, site.key, tag.dtype))
        return IntegerResult(0.0, 0, 0, 0, None)
    step = output.latest_step = float(output.step(minimum_step(site, product)))
    low, high = (int(bound) for bound in output.code_bounds(step))
    if not _only_caps(site):
        low, high = _limited_codes(site, step, low, high)
    return IntegerResult(step, output.grid.code_bits, low, high, output.tag(step, tag.dtype))


def _only_caps(site: Site) -> bool:
    """Whether an output limit cuts the observed range instead of the values (a static one)."""
    limits = site.active_limits
    return limits is None or limits.output is None or limits.output.kind == "static"


def _limited_codes(site: Site, step: float, low: int, high: int) -> tuple[int, int]:
    """Cut code bounds at the output limit; rounding is monotone, so this is limiting first."""
    bound = site.output_limit()
    if bound is None:
        return low, high
    # Without a tensor, whose values a graph capture would hide.
    lowest, highest = (round_value(edge / step, site.rounding) for edge in (-bound, bound))
    return max(low, lowest), min(high, highest)


def _accumulator_output(site: Site, y: Tensor, product: Scalar, dtype: torch.dtype) -> Tensor:
    """Round a result to the 32-bit grid of its accumulator, with the gradient of the identity."""
    with torch.no_grad():
        low, high = code_limits(32)
        codes = ROUNDINGS[site.rounding](y.double() / product)
        values = (codes.clamp_(low, high) * product).to(dtype)
    y = straight_through(values, y.to(dtype))
    return with_tag(y, Tag(product, 32, site.key, dtype))


def weight_step(
    site: Site, rows: Tensor, finest: Tensor | None = None, name: str = "weight"
) -> Scalar:
    """Return the step of a weight.

    Args:
        site: The site, whose weight grid and range estimator apply.
        rows: Detached weight, ``[1, N]`` for one step, ``[C, N]`` for one per channel.
        finest: ``[C]``: the finest step, because a bias has to fit its codes; None for no bound.
        name: Tells the weights of the site apart.

    Returns:
        ``[C]`` per channel; for one step a float where values can be read, else a 0-dim tensor.
    """
    grid = site.weight_grid
    assert grid is not None  # the planner gives one to every op that has parameters
    per_channel = site.granularity == "channel"
    finest = finest if finest is None or per_channel else finest.amax()
    learned = site.learned_scale(name)
    if learned is not None:
        step = learned_step(site, learned, rows)
        if finest is not None:
            step = torch.maximum(step, grid.step(finest * grid.qmax))
        return step if per_channel or not can_read(step) else step.item()
    reach = site.weight_reach(rows)
    if not per_channel:
        reach = reach[0]
    if finest is not None:
        reach = torch.maximum(reach, finest * grid.qmax)
    if per_channel:
        return grid.step(reach)
    return grid.step_value(reach.item()) if can_read(reach) else grid.step(reach)


def learned_step(site: Site, learned: LearnedScale, rows: Tensor) -> Tensor:
    """Return a learned step; the first training step with gradients takes it over."""
    if not learned.started:
        reach = site.weight_reach(rows)
        if not (site.moves_weight_ranges and torch.is_grad_enabled()):
            return learned.step_of(reach)
        learned.follow(reach)
        learned.start()
    return learned.step()


def on_grid(
    x: Tensor,
    step: Scalar,
    limits: tuple[int, int],
    rounding: str | Rounder,
    clips: bool = False,
) -> Tensor:
    """Round a parameter to its grid.

    Args:
        x: The parameter.
        step: Its step.
        limits: Smallest and largest code.
        rounding: How to round.
        clips: Whether its range may leave values out, which then have no gradient. Otherwise the
            range is the parameter's own absolute maximum, and the gradient is the identity.
    """
    usable = readable(step, x)
    if clips:
        return fake_quantize(x, usable, *limits, rounding)
    return straight_through(fake_quantize(x.detach(), usable, *limits, rounding), x)


def learned_on_grid(
    x: Tensor,
    step: Scalar,
    limits: tuple[int, int],
    rounding: str | Rounder,
    learned: LearnedScale,
    parameter: Tensor,
) -> Tensor:
    """Round a weight to its grid with gradients for it and for its learned range.

    Args:
        x: The weight.
        step: Its step.
        limits: Smallest and largest code.
        rounding: How to round.
        learned: The learned range.
        parameter: Its parameter in a shape that broadcasts to the weight.
    """
    usable = readable(step, x)
    rounded = fake_quantize(x.detach(), usable, *limits, rounding)
    if not torch.is_grad_enabled():
        return rounded
    return learned.carry(rounded, x, usable, *limits, parameter)


def minimum_step(site: Site, product: Scalar | None) -> Scalar | None:
    """Return the finest step a result may have, given the step of its accumulator."""
    return product if site.platform is not None and site.platform.right_shift_only else None


def finish(
    site: Site,
    y: Tensor,
    product: Scalar | None,
    quantized: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Limit and quantize the result of a layer.

    Args:
        site: The layer.
        y: Its result, float64 where float32 could not hold the accumulator.
        product: Step of the accumulator, None if not quantized.
        quantized: Whether the layer is quantized now.
        dtype: The dtype the model expects.
    """
    limits = site.active_limits
    static = limits is not None and limits.output is not None and limits.output.kind == "static"
    if not (quantized and site.output is not None and static):
        y = site.limit_output(y)
    if not quantized:
        if site.watching:
            site.watch_result(y)
        return y.to(dtype)
    if site.output is None:
        if site.config is not None and site.config.output_bits == 32 and product is not None:
            return _accumulator_output(site, y, product, dtype)
        return y.to(dtype)
    cap = limits.output.value if static and limits and limits.output else math.inf
    if site.learning:
        site.output.observe(y, cap)
    step = site.output.step(minimum_step(site, product))
    return site.output.round(y, step, dtype, overwrite=not capturing())


def finish_codes(
    site: Site,
    codes: Tensor,
    result: IntegerResult,
    dtype: torch.dtype,
    real: Callable[[], Tensor],
) -> Tensor:
    """Return what an integer kernel produced as the site's result, in evaluation.

    Args:
        site: The site.
        codes: Codes, or real values if ``result`` asks for them.
        result: What the kernel had to produce.
        dtype: The dtype the model expects.
        real: The float function, for its gradient.
    """
    integers = site.switches.system == "integer"
    if result.tag is None:
        value = site.limit_output(codes).to(dtype)
    elif integers:
        value = codes
    else:
        wide = codes.double() if result.bits > WIDEST_OPERAND else codes.to(dtype)
        value = (wide * result.scale).to(dtype)
    if torch.is_grad_enabled() and not integers:
        carrier = site.limit_output(real())
        if result.tag is not None:
            carrier = carrier.clamp(result.low * result.scale, result.high * result.scale)
        value = straight_through(value, carrier.to(dtype))
    return value if result.tag is None else with_tag(value, result.tag)


def versions_of(tensors: Iterable[Tensor | None]) -> tuple[tuple[int, int], ...]:
    """Return what changes when one of the tensors is replaced or written to."""
    return tuple(
        (t.data_ptr(), t._version) for t in tensors if t is not None and not t.is_inference()
    )


def _is_valid(found: Prepared, site: Site, call: Any) -> bool:
    same_weight = found.source is None or torch.equal(found.source, call.weight)
    return same_weight and found.validity == _validity(site, call)


def _validity(site: Site, call: Any) -> tuple[Any, ...]:
    bn: Any = site.active_fold
    tensors = [None if site.weight_is_computed else call.weight, call.bias]
    if bn is not None:
        tensors += [bn.weight, bn.bias, bn.running_mean, bn.running_var]
    return (versions_of(tensors), site.switches.fuse, site.switches.normalize)


def _surely_none(mask: Tensor) -> bool:
    # Reading a value would stall a GPU; there the general formula costs less.
    return can_read(mask) and not mask.any().item()
