"""Batch norm: the rest of a folded layer, or a scale and a shift of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.capture import capturing, without_autocast
from lightning_linger.core.integer import (
    EXACT_FLOAT32,
    float32_code_limits,
    integer_op,
    payload_dtype,
)
from lightning_linger.core.limits import limited
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.registry import Op, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_held_by, tag_of, with_tag
from lightning_linger.ops.conv import finish_accumulator, is_wide
from lightning_linger.ops.folding import (
    Folded,
    batch_statistics,
    folded_of,
    full,
    normalize_scaled,
    running_statistics,
    update_running,
)
from lightning_linger.ops.parameters import bias_headroom, finest_for_bias, not_finer, on_grid
from lightning_linger.ops.prepared import versions_of
from lightning_linger.ops.results import (
    IntegerResult,
    finish,
    finish_codes,
    integer_result,
    minimum_step,
)


class BatchNormCall(NamedTuple):
    """Bound arguments of ``F.batch_norm``."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    cudnn_enabled: bool = True


@integer_op("linger::scale_shift")
def integer_scale_shift(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_x: float,
    scale_w: Sequence[float],
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
    exact_in_float32: bool,
) -> Tensor:
    """Return ``x * weight[c] + bias[c]`` on codes ``[N, C, ...]``, brought to the output scale.

    The arguments are those of ``linger::conv``; ``weight`` and ``bias`` are ``[C]``.
    """
    dtype = torch.float32 if exact_in_float32 else torch.float64
    shape = (1, -1, *([1] * (x.dim() - 2)))
    acc = x.to(dtype) * weight.to(dtype).view(shape) + bias.to(dtype).view(shape)
    return finish_accumulator(
        acc,
        scale_x,
        scale_w,
        scale_o,
        bits_o,
        low,
        high,
        rounding,
        platform,
        x.dim() - 2,
        is_wide(bits_x),
    )


@integer_scale_shift.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_x: float,
    scale_w: Sequence[float],
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    *_: object,
) -> Tensor:
    dtype = torch.float32 if scale_o == 0.0 else payload_dtype(bits_o)
    return x.new_empty(x.shape, dtype=dtype)


_PREPARED = "affine"


@dataclass(frozen=True)
class PreparedAffine:
    """Scale and shift of a batch norm in evaluation, derived once.

    Args:
        alpha: ``[C]`` scale on the grid, real values.
        beta: ``[C]`` shift on the grid, real values.
        codes: The scale's codes.
        bias_codes: The shift's codes, int32.
        steps: Steps of the scale, one or one per channel.
        exact_in_float32: Whether no accumulator can reach 2^24.
        validity: What it was derived from.
    """

    alpha: Tensor
    beta: Tensor
    codes: Tensor
    bias_codes: Tensor
    steps: list[float]
    exact_in_float32: bool
    validity: tuple[Any, ...]


class BatchNormOp(Op):
    """``F.batch_norm``.

    Behind a folded layer it completes that layer. On its own it is a per-channel scale and shift,
    whose scale is quantized like a weight (linger's ``BatchNorm2dInt``); in training both come from
    the batch's statistics, with gradients through them.
    """

    has_parameters = True
    rounds_parts_apart = True
    needs_quantized_operand = False

    def bind(self, *args: Any, **kwargs: Any) -> BatchNormCall:
        """Bind the arguments of ``F.batch_norm`` or ``torch.batch_norm``."""
        if len(args) == 9:  # torch.batch_norm(x, weight, bias, mean, var, ...)
            x, weight, bias, mean, var, *rest = args
            args = (x, mean, var, weight, bias, *rest)
        return BatchNormCall(*args, **kwargs)

    def obstacle(self, call: BatchNormCall) -> str | None:
        """Without running statistics there is nothing to put into the integer model."""
        if call.running_mean is None:
            return "a batch norm without running statistics normalizes by the batch at run time"
        return None

    def run_float(self, site: Site, call: BatchNormCall) -> Any:
        """Complete a folded layer, or limit scale, shift and output."""
        folded = folded_of(call.input)
        if folded is not None:
            return self._complete(call, folded)
        limits = site.active_limits
        if limits is None:
            return NotImplemented
        alpha, beta = self._affine(site, call)
        alpha = limited(alpha, limits.weight, limits.gradient)
        beta = limited(beta, limits.bias, limits.gradient)
        y = _scale_shift(call.input, alpha, beta)
        return finish(site, y, None, quantized=False, dtype=call.input.dtype)

    def run_fake(self, site: Site, call: BatchNormCall) -> Any:
        """Complete a folded layer, or scale and shift on the grid."""
        folded = folded_of(call.input)
        if folded is not None:
            return self._complete(call, folded)
        with without_autocast(call.input.device.type):
            x = site.operand(0, call.input)
            tag = tag_of(x)
            if x is None or tag is None:
                return NotImplemented
            x, step_x = full(x), tag.step
            if site.training or (capturing() and _PREPARED not in site.prepared):
                alpha, beta, step_a = self._quantized_affine(site, call, x, step_x)
                y = _scale_shift(x, alpha, beta)
                return finish(site, y, _along_channels(step_x * step_a, x), True, tag.dtype)
            prepared = self._prepare(site, call, tag)
            if site.fixed_point and tag.rounded and not site.float_operands:
                return self._evaluate_codes(site, call, with_tag(x, tag), prepared)
            alpha, beta = prepared.alpha, prepared.beta
            if torch.is_grad_enabled() and not capturing():
                alpha, beta, _ = self._quantized_affine(site, call, x, step_x)
            if not prepared.exact_in_float32:
                x, alpha, beta = x.double(), alpha.double(), beta.double()
            y = _scale_shift(x, alpha, beta)
            return finish(site, y, step_x * max(prepared.steps), True, tag.dtype)

    def run_integer(self, site: Site, call: BatchNormCall) -> Any:
        """Scale and shift codes."""
        if folded_of(call.input) is not None:
            return call.input
        x = site.operand(0, call.input)
        if x is None:
            return NotImplemented
        tag = tag_held_by(x)
        prepared = self._prepare(site, call, tag)
        result = integer_result(site, float(tag.step) * max(prepared.steps), tag)
        y = self._kernel(site, x, prepared, result)
        return site.limit_output(y) if result.tag is None else with_tag(y, result.tag)

    def _evaluate_codes(
        self, site: Site, call: BatchNormCall, x: Tensor, prepared: PreparedAffine
    ) -> Tensor:
        """Take the integer kernel's value, and the gradient of the real one."""
        tag = tag_held_by(x)
        result = integer_result(site, float(tag.step) * max(prepared.steps), tag)

        def real() -> Tensor:
            alpha, beta, _ = self._quantized_affine(site, call, x, tag.step)
            return _scale_shift(x, alpha, beta)

        with torch.no_grad():
            codes = self._kernel(site, x, prepared, result)
        return finish_codes(site, codes, result, tag.dtype, real)

    def _kernel(
        self, site: Site, x: Tensor, prepared: PreparedAffine, result: IntegerResult
    ) -> Tensor:
        tag = tag_held_by(x)
        return integer_scale_shift(
            integer_codes(x),
            prepared.codes,
            prepared.bias_codes,
            float(tag.step),
            prepared.steps,
            result.scale,
            tag.bits,
            site.weights.bits,
            result.bits,
            result.low,
            result.high,
            site.rounding,
            site.platform_name,
            prepared.exact_in_float32,
        )

    # --- folded -----------------------------------------------------------------------------

    def _complete(self, call: BatchNormCall, folded: Folded) -> Tensor:
        site = folded.site
        if site is None:
            return call.input
        y = call.input
        count = y.numel() // y.shape[1]
        if count < 2:
            msg = (
                f"`{site.key}`: expected more than 1 value per channel when training, got input "
                f"size {tuple(y.shape)}."
            )
            raise ValueError(msg)
        if folded.statistics is not None:
            statistics = folded.statistics
        else:
            gamma = full(call.weight) if call.weight is not None else y.new_ones(y.shape[1])
            y, mean, var = normalize_scaled(y, folded, gamma, call.eps)
            statistics = (mean, var)
        if call.running_mean is not None and call.running_var is not None:
            update_running(
                call.running_mean,
                call.running_var,
                statistics,
                folded.conv_bias,
                count,
                call.momentum,
            )
        return finish(site, y, folded.product, folded.quantized, folded.dtype)

    # --- standalone -------------------------------------------------------------------------

    def _affine(self, site: Site, call: BatchNormCall) -> tuple[Tensor, Tensor]:
        if call.training:
            mean, var = batch_statistics(call.input)
            count = call.input.numel() // call.input.shape[1]
            if call.running_mean is not None and call.running_var is not None:
                update_running(
                    call.running_mean, call.running_var, (mean, var), None, count, call.momentum
                )
        else:
            assert call.running_mean is not None
            assert call.running_var is not None
            mean, var = running_statistics(site, call.running_mean, call.running_var)
        alpha = torch.rsqrt(var + call.eps)
        if call.weight is not None:
            alpha = alpha * full(call.weight)
        beta = -mean * alpha
        return alpha, beta if call.bias is None else beta + full(call.bias)

    def _quantized_affine(
        self, site: Site, call: BatchNormCall, x: Tensor, step_x: Any
    ) -> tuple[Tensor, Tensor, Any]:
        alpha, beta = self._affine(site, _with_rounded_gradients(site, call._replace(input=x)))
        limits = site.active_limits
        if limits is not None:
            alpha = limited(alpha, limits.weight, limits.gradient)
            beta = limited(beta, limits.bias, limits.gradient)
        grid = site.weights.grid
        assert grid is not None
        assert site.config is not None
        by_channel = site.granularity == "channel"
        reach = site.weights.reach(
            alpha.detach().reshape(-1, 1) if by_channel else alpha.detach()[None]
        )
        finest = finest_for_bias(beta, step_x, site.config.bias_bits, bias_headroom(site))
        if finest is not None and not by_channel:
            finest = finest.amax()
        step_a = not_finer(grid, grid.step(reach if by_channel else reach[0]), finest)
        step_a = torch.as_tensor(site.weights.held("weight", step_a))
        if "weights" not in site.floating:
            limits_a = (grid.qmin, grid.qmax)
            alpha = on_grid(alpha, step_a, limits_a, grid.rounding, site.weights.clips)
        if "biases" not in site.floating:
            limits_b = float32_code_limits(site.config.bias_bits)
            beta = on_grid(beta, step_a * step_x, limits_b, grid.rounding)
        return alpha, beta, step_a

    @torch.no_grad()
    def _prepare(self, site: Site, call: BatchNormCall, tag: Tag) -> PreparedAffine:
        found: PreparedAffine | None = site.prepared.get(_PREPARED)
        tensors = (call.weight, call.bias, call.running_mean, call.running_var)
        if found is not None and (capturing() or found.validity == versions_of(tensors)):
            return found
        step_x = float(tag.step)
        evaluated = call._replace(training=False)
        alpha, beta, step_a = self._quantized_affine(site, evaluated, call.input, step_x)
        step_a = torch.as_tensor(step_a)
        codes = torch.round(alpha / step_a)
        bias_codes = torch.round(beta.double() / (step_a.double() * step_x))
        steps = [float(s) for s in step_a.flatten()]
        bound = float((codes.abs() * 2.0 ** (tag.bits - 1) + bias_codes.abs()).max())
        if site.output is not None:
            step_o = float(site.output.step(minimum_step(site, step_x * max(steps))))
            bound += 0.5 * step_o / (step_x * min(steps))
        found = PreparedAffine(
            alpha,
            beta,
            codes.to(payload_dtype(site.weights.bits)),
            bias_codes.to(torch.int32),
            steps,
            bound < EXACT_FLOAT32,
            versions_of(tensors),
        )
        site.prepared[_PREPARED] = found
        return found


def _scale_shift(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return x * _along_channels(alpha, x) + _along_channels(beta, x)


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *([1] * (x.dim() - 2)))


def _with_rounded_gradients(site: Site, call: BatchNormCall) -> BatchNormCall:
    """Round the gradients of weight and bias themselves: only the layer's own scale is clipped."""
    weight, bias = (
        None if x is None else site.with_rounded_gradient(name, x)
        for name, x in (("weight", call.weight), ("bias", call.bias))
    )
    return call._replace(weight=weight, bias=bias)


register(BatchNormOp("batch_norm"))
