"""What convolutions and linear layers share: folding, the three number systems, evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.capture import can_read, capturing, without_autocast
from lightning_linger.core.fake_quantize import Scalar, straight_through
from lightning_linger.core.images import is_raw
from lightning_linger.core.integer import float32_code_limits
from lightning_linger.core.limits import limited
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.registry import Op
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_held_by, with_tag
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
from lightning_linger.ops.parameters import (
    Parameters,
    bias_headroom,
    finest_for_bias,
    learned_on_grid,
    on_grid,
    weight_step,
)
from lightning_linger.ops.prepared import Prepared, is_valid, prepare_weights
from lightning_linger.ops.results import IntegerResult, finish, finish_codes, integer_result


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
            return self._run(site, call, call.input, None)
        with without_autocast(call.input.device.type):
            return self._run(site, call, full(call.input), None)

    def run_fake(self, site: Site, call: Any) -> Any:
        """Run on the integer grid in floating point."""
        call = with_image(site, call)
        with without_autocast(call.input.device.type):
            if site.gives_real_results and not site.training and self._has_integers(site):
                return self._evaluate_integers(site, call)
            x = site.operand(0, call.input)
            if x is None:
                return NotImplemented
            tag = tag_held_by(x)
            if site.training:
                return self._run(site, call, full(x), tag)
            return self._evaluate(site, call, full(x), tag)

    def run_integer(self, site: Site, call: Any) -> Any:
        """Run on the integers."""
        call = with_image(site, call)
        x = site.operand(0, call.input)
        if x is None:
            return NotImplemented
        tag = tag_held_by(x)
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
        tag = tag_held_by(codes)
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

    def _run(self, site: Site, call: Any, x: Tensor, tag: Tag | None) -> Tensor:
        """Run in float, or on a grid if the input has the tag of one."""
        bn: Any = site.active_fold
        step_x, dtype = (None, call.input.dtype) if tag is None else (tag.step, tag.dtype)
        if bn is None or not (uses_batch_statistics(bn) and site.switches.fuse_mode != "frozen"):
            parameters = self._parameters(site, call, step_x)
            y = self._finish(site, call, x, parameters, step_x, dtype)
            return mark_folded(y, COMPLETE) if bn is not None else y
        if site.switches.fuse_mode == "batch":
            return self._run_batch_folded(site, call, x, step_x, dtype)
        return self._run_scaled(site, call, x, tag, dtype)

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
        return finish(site, y, self._product(call, step_x, parameters.step), quantized, wanted)

    def _product(self, call: Any, step_x: Scalar | None, step_w: Scalar | None) -> Scalar | None:
        """Return the step of the accumulator, or those of its channels, along the result."""
        if step_x is None or step_w is None:
            return None
        product = step_x * step_w
        if isinstance(product, Tensor) and product.dim() > 0:
            return self.along_output(call, product)
        return product

    def _run_batch_folded(
        self, site: Site, call: Any, x: Tensor, step_x: Scalar | None, dtype: torch.dtype
    ) -> Tensor:
        bn: Any = site.active_fold
        plain = self.apply(call, x, full(call.weight), None)
        mean, var = batch_statistics(plain)
        factor = gamma_of(bn) * torch.rsqrt(var + bn.eps)
        bias = beta_of(bn) - mean * factor
        bias = _with_zero_gradient_for(call.bias, bias)
        weight = full(call.weight) * self.per_channel(call, factor)
        parameters = self._constrained(site, call, weight, bias, step_x)
        y = self.apply(call, x, parameters.weight, parameters.bias)
        folded = Folded(
            site=site,
            conv_bias=call.bias,
            dtype=dtype,
            statistics=(mean.detach(), var.detach()),
            product=self._product(call, step_x, parameters.step),
            quantized=step_x is not None,
        )
        return mark_folded(y, folded)

    def _run_scaled(
        self, site: Site, call: Any, x: Tensor, tag: Tag | None, dtype: torch.dtype
    ) -> Tensor:
        bn: Any = site.active_fold
        step_x = None if tag is None else tag.step
        with torch.no_grad():
            inv_sigma = torch.rsqrt(full(bn.running_var) + bn.eps)
            if capturing():
                inv_sigma = snapshot(inv_sigma)
            factor = gamma_of(bn) * inv_sigma
            faint = factor.abs() < TINY_FACTOR
        own_weight = full(call.weight)
        scaled = own_weight * self.per_channel(call, factor)
        beta, bias, limits = beta_of(bn), None, site.active_limits
        if step_x is not None or (limits is not None and limits.bias is not None):
            mean = full(bn.running_mean)
            own_bias = None if call.bias is None else call.bias.detach()
            bias = running_bias(bn, snapshot(mean) if capturing() else mean, own_bias, factor)
        constrained = self._constrained(site, call, scaled, bias, step_x)
        if bias is not None and constrained.bias is not None:
            # The batch has statistics of its own, but the chip's bias is that of the running ones.
            beta = straight_through(beta + (constrained.bias - bias), constrained.bias)
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
        rounded = tag is not None and tag.rounded and not site.float_operands
        folded = Folded(
            site=site,
            dtype=dtype,
            scale=scale,
            beta=_with_zero_gradient_for(call.bias, beta),
            conv_bias=call.bias,
            silent=silent,
            product=self._product(call, step_x, constrained.step),
            in_codes=rounded and not site.gives_real_results,
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
        if step_x is None or site.weights.grid is None or site.config is None:
            return Parameters(weight, bias)
        grid = site.weights.grid
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
            step_w = site.weights.held("weight", weight_step(site, rows, finest))
            steps = step_w
            if isinstance(step_w, Tensor) and step_w.dim() > 0:
                steps = self.per_channel(call, step_w)
        rounding = site.weight_rounding("weight")
        limits_w = (grid.qmin, grid.qmax)
        learned = site.weights.learned
        rounds = "weights" not in site.floating
        if rounds and learned is not None and site.training:
            several = learned.value.dim() > 0
            parameter = self.per_channel(call, learned.value) if several else learned.value
            weight = learned_on_grid(weight, steps, limits_w, rounding, learned, parameter)
        elif rounds:
            weight = on_grid(weight, steps, limits_w, rounding, site.weights.clips)
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
        if site.fixed_point and tag.rounded and not site.float_operands:
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
        y = finish(site, y, tag.step * max(prepared.steps), True, tag.dtype)
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
        if found is not None and (capturing() or is_valid(found, site, call)):
            return found
        with torch.no_grad():
            parameters = self._parameters(site, call, float(tag.step))
            found = prepare_weights(site, call, tag, parameters, self)
        site.prepared["weights"] = found
        return found


def _with_zero_gradient_for(parameter: Tensor | None, x: Tensor) -> Tensor:
    """Return ``x``, which a parameter does not move: DDP expects a gradient of it all the same."""
    return x if parameter is None else x + 0.0 * full(parameter)


def with_image(site: Site, call: Any) -> Any:
    """Return a call with a raw image normalized."""
    if not is_raw(call.input):
        return call
    return call._replace(input=site.image(call.input).to(call.weight.dtype))


def _surely_none(mask: Tensor) -> bool:
    # Reading a value would stall a GPU; there the general formula costs less.
    return can_read(mask) and not mask.any().item()
