"""Layer, group, instance and RMS norm: sums in whole numbers, one inverse square root.

All of them normalize ``D`` codes with the sums ``s1`` of the codes and ``s2`` of their squares::

    y = (D * x - s1) / sqrt(D * s2 - s1^2 + eps * D^2 / scale_x^2) * weight + bias

(an RMS norm leaves ``s1`` out). The weight is quantized like that of a layer, the bias is a 32-bit
number at ``2^-10`` steps of the weight, because LUNA engines hold the quotient in Q10.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.capture import can_read, capturing, without_autocast
from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.integer import (
    float32_code_limits,
    integer_op,
    is_power_of_two,
    payload_dtype,
)
from lightning_linger.core.limits import limited
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.platform import arithmetic_of
from lightning_linger.core.quantizer import readable
from lightning_linger.core.registry import register
from lightning_linger.core.rounding import ROUNDINGS
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by
from lightning_linger.ops import luna
from lightning_linger.ops.folding import full
from lightning_linger.ops.kernel import KernelOp, Target
from lightning_linger.ops.parameters import finest_for_bias, learned_on_grid, learned_step, on_grid
from lightning_linger.ops.prepared import versions_of
from lightning_linger.ops.results import minimum_step

# Fraction bits of a normalized value in LUNA engines; the bias adds those of the weight.
FRACTION = 10
# Widths that the engines' own kernel has, of operand, weight and result.
ENGINE_BITS = 8

_PREPARED = "normalization"


class NormCall(NamedTuple):
    """Bound arguments of a norm, with its input viewed as ``[rows, groups, channels, spread]``.

    Args:
        input: Any shape.
        groups: How many groups of values have a mean of their own in each row.
        channels: Per group; each has its own weight.
        spread: Values per channel. A group normalizes ``channels * spread`` values.
        weight: ``groups * channels`` values of any shape, None for ones.
        bias: Likewise, None for zeros.
        eps: Added to the variance.
        shape: The argument that the torch function takes: a normalized shape, a number of groups.
        refused: Why the call has no integer form.
        affine: The quantized weight and bias, once they are known.
    """

    input: Tensor
    groups: int
    channels: int
    spread: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    shape: Any = None
    refused: str | None = None
    affine: Affine | None = None


@dataclass(frozen=True)
class Affine:
    """Weight and bias on their grids.

    Args:
        weight: Real values, None for ones.
        bias: Real values, None for zeros.
        step: Step of the weight.
        codes: ``[groups, channels]`` codes of the weight; None while they change.
        bias_codes: ``[groups, channels]`` codes of the bias, int32.
        validity: What they were derived from.
    """

    weight: Tensor | None
    bias: Tensor | None
    step: Scalar
    codes: Tensor | None = None
    bias_codes: Tensor | None = None
    validity: tuple[Any, ...] = ()


# --- the integer kernel -----------------------------------------------------------------------


def has_engine_kernel(
    platform: str,
    shape: Sequence[int],
    spread: int,
    centered: bool,
    scales: Sequence[float],
    bits: Sequence[int],
) -> bool:
    """Whether a norm is the layer norm that an engine computes.

    Args:
        platform: Name of the target.
        shape: Of the weight, ``[groups, channels]``.
        spread: Values per channel.
        centered: Whether the mean is taken off.
        scales: Steps of operand, weight and result.
        bits: Their widths.
    """
    target = arithmetic_of(platform)
    # venus has 16-bit weights and halves of its own.
    if target is None or target.curves not in ("arcs", "venusa"):
        return False
    alike = shape[0] == 1 and spread == 1 and centered
    return alike and max(bits) <= ENGINE_BITS and all(map(is_power_of_two, scales))


def epsilon_of_engine(eps: float, count: int, scale: float) -> int:
    """Return ``floor(eps * count^2 / scale^2 + 0.5)`` by the engine's float32 operations."""
    value = np.float32(eps) * np.float32(1.0 / scale**2)
    value = value * np.float32(count) * np.float32(count)
    return math.floor(value + np.float32(0.5))


def epsilon_of_sums(eps: float, count: int, scale: float) -> float:
    """Return ``eps * count^2 / scale^2`` in float64."""
    return eps * count * count / (scale * scale)


@integer_op("linger::layer_norm")
def integer_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    spread: int,
    centered: bool,
    eps: float,
    scale_x: float,
    scale_w: float,
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Normalize codes.

    LUNA engines (arcs, mars, venusa) have a kernel for a layer norm of 8 bits: an inverse square
    root of ten significant bits from a table, the quotient in Q10. Elsewhere the quotient is
    float64, in IEEE operations that every machine rounds alike, and rounded once at the end.

    Args:
        x: Codes; a view ``[rows, groups, channels, spread]`` has to exist.
        weight: ``[groups, channels]`` codes.
        bias: ``[groups, channels]`` int32 codes at ``2^-10 * scale_w``.
        spread: Values per channel.
        centered: Whether the mean is taken off; an RMS norm keeps it.
        eps: Added to the variance; positive.
        scale_x: Step of ``x``.
        scale_w: Step of ``weight``.
        scale_o: Step of the result.
        bits_x: Width of ``x``.
        bits_w: Width of ``weight``.
        bits_o: Width of the result.
        low: Smallest code of the result.
        high: Largest code of the result.
        rounding: Rounding rule; an engine's kernel rounds half up.
        platform: Name of the target.
    """
    groups, channels = weight.shape
    count = channels * spread
    whole = x.reshape(-1, groups, channels, spread).to(torch.int64)
    squares = (whole * whole).sum((2, 3), keepdim=True) * count
    numerator = whole * count
    if centered:
        sums = whole.sum((2, 3), keepdim=True)
        squares, numerator = squares - sums * sums, numerator - sums
    gamma, beta = (p.view(groups, channels, 1) for p in (weight, bias))
    scales, bits = (scale_x, scale_w, scale_o), (bits_x, bits_w, bits_o)
    if has_engine_kernel(platform, weight.shape, spread, centered, scales, bits):
        inverse, shift = luna.reciprocal_sqrt(squares + epsilon_of_engine(eps, count, scale_x))
        # The table's shifts give Q15, five bits more than the engine keeps.
        quotient = luna.rounding_shift(numerator * inverse, shift + 15 - FRACTION)
        scaled = luna.saturate(luna.saturate(quotient, 32) * gamma.long(), 32) + beta.long()
        codes = luna.rounding_shift(scaled, round(math.log2(scale_o / scale_w)) + FRACTION)
    else:
        spreads = squares.double() + epsilon_of_sums(eps, count, scale_x)
        scaled = numerator.double() / spreads.sqrt() * gamma.double()
        scaled = scaled + beta.double() * 2.0**-FRACTION
        codes = ROUNDINGS[rounding](scaled * (scale_w / scale_o))
    return codes.clamp_(low, high).reshape(x.shape).to(payload_dtype(bits_o))


@integer_layer_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    spread: int,
    centered: bool,
    eps: float,
    scale_x: float,
    scale_w: float,
    scale_o: float,
    bits_x: int,
    bits_w: int,
    bits_o: int,
    *_: object,
) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits_o))


# --- ops --------------------------------------------------------------------------------------


class NormOp(KernelOp):
    """A norm whose statistics are those of the input's own values.

    Args:
        kind: Canonical op name.
    """

    needs_quantized_operand = False
    has_parameters = True

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.binder, self.function = _FUNCTIONS[kind]
        self.centered = kind != "rms_norm"

    def bind(self, *args: Any, **kwargs: Any) -> NormCall:
        """Bind the arguments of the functional or of the ``torch`` function."""
        return self.binder(*args, **kwargs)

    def parameters(self, call: NormCall) -> list[Any]:
        """The weight and the bias, as far as there are any."""
        return [p for p in (call.weight, call.bias) if p is not None]

    def learned_weights(self, call: NormCall) -> Mapping[str, int | None]:
        """The weight, which has one scale."""
        return {} if call.weight is None else {"weight": None}

    def obstacle(self, call: NormCall) -> str | None:
        """Some forms normalize with what is not a function of the values, or divide by zero."""
        return call.refused

    def run_float(self, site: Site, call: NormCall) -> Any:
        """Limit weight, bias and result."""
        if site.active_limits is None:
            return NotImplemented
        weight, bias = _limited(site, call.weight, call.bias)
        return site.limit_output(self.function(call.input, call.shape, weight, bias, call.eps))

    def sources(self, call: NormCall) -> Sequence[Tensor | None]:
        """Weight and bias get gradients too."""
        assert call.affine is not None
        return (call.affine.weight, call.affine.bias)

    def run_fake(self, site: Site, call: NormCall) -> Any:
        """Take the kernel's value and the float function's gradient."""
        with without_autocast(call.input.device.type):
            prepared = site.prepared.get(_PREPARED)
            if site.training or torch.is_grad_enabled() or (capturing() and prepared is None):
                affine = self._on_grid(site, call)
            else:
                affine = self._prepare(site, call)
            return super().run_fake(site, call._replace(affine=affine))

    def run_integer(self, site: Site, call: NormCall) -> Any:
        """Run the kernel."""
        return super().run_integer(site, call._replace(affine=self._prepare(site, call)))

    def real(self, site: Site, call: NormCall) -> Tensor:
        """Run the function of PyTorch with weight and bias on their grids."""
        assert call.affine is not None
        weight, bias = call.affine.weight, call.affine.bias
        return self.function(full(call.input), call.shape, weight, bias, call.eps)

    def finest_step(self, site: Site, call: NormCall) -> Scalar | None:
        """Return the step of the accumulator, which engines shift right only."""
        assert call.affine is not None
        return minimum_step(site, call.affine.step * 2.0**-FRACTION)

    def kernel(self, site: Site, call: NormCall, target: Target) -> Tensor:
        """Call ``linger::layer_norm``."""
        tag, affine = tag_held_by(call.input), call.affine
        assert affine is not None
        self._require_sums(site, call, tag.bits)
        if affine.codes is None or affine.bias_codes is None:
            affine = _with_codes(affine, call, site.weights.bits)
        assert affine.codes is not None
        assert affine.bias_codes is not None
        return integer_layer_norm(
            integer_codes(call.input),
            affine.codes,
            affine.bias_codes,
            call.spread,
            self.centered,
            call.eps,
            float(tag.step),
            float(affine.step),
            target.scale,
            tag.bits,
            site.weights.bits,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )

    def _require_sums(self, site: Site, call: NormCall, bits: int) -> None:
        """Refuse sums that 64 bits may not hold."""
        count = call.channels * call.spread
        if count**2 * 4 ** (bits - 1) >= 2**62:
            msg = (
                f"`{site.key}`: sums over {count} values of {bits} bits exceed 64 bits. Use fewer "
                f"activation_bits, or leave it in float with overrides={{'{site.key}': None}}."
            )
            raise UnsupportedError(msg)

    def _on_grid(self, site: Site, call: NormCall) -> Affine:
        """Return weight and bias on their grids, with gradients."""
        weight = None if call.weight is None else full(call.weight)
        bias = None if call.bias is None else full(call.bias)
        weight, bias = _limited(site, weight, bias)
        grid, config = site.weights.grid, site.config
        assert grid is not None
        assert config is not None
        if weight is None:
            # Ones are exact: a code in the middle of a range of 2.
            grid = dataclasses.replace(grid, scale_kind="power_of_two")
            absmax = call.input.new_full((), 2.0, dtype=torch.float32)
        else:
            absmax = site.weights.reach(weight.detach().reshape(1, -1))[0]
        finest = finest_for_bias(bias, 2.0**-FRACTION, config.bias_bits)
        learned = None if weight is None else site.weights.learned
        if learned is not None and weight is not None:
            wanted = learned_step(site, learned, weight.detach().reshape(1, -1))
            absmax = wanted * grid.steps_covered
        if finest is not None:
            absmax = torch.maximum(absmax, finest.amax() * grid.steps_covered)
        step = grid.step_value(absmax.item()) if can_read(absmax) else grid.step(absmax)
        step = site.weights.held("weight", step)
        limits_w = (grid.qmin, grid.qmax)
        if weight is not None:
            if learned is not None and site.training:
                weight = learned_on_grid(
                    weight, step, limits_w, grid.rounding, learned, learned.value
                )
            else:
                weight = on_grid(weight, step, limits_w, grid.rounding, site.weights.clips)
            site.note("weight", call.weight, weight, step)
            weight = site.with_rounded_gradient("weight", weight)
        if bias is not None:
            limits_b = float32_code_limits(config.bias_bits)
            bias = on_grid(bias, step * 2.0**-FRACTION, limits_b, grid.rounding)
            site.note("bias", call.bias, bias, step * 2.0**-FRACTION)
            bias = site.with_rounded_gradient("bias", bias)
        return Affine(weight, bias, step)

    @torch.no_grad()
    def _prepare(self, site: Site, call: NormCall) -> Affine:
        """Return weight and bias in evaluation, derived once."""
        found: Affine | None = site.prepared.get(_PREPARED)
        if found is not None and capturing():
            return found
        # A computed weight is another tensor each time.
        validity = (versions_of(self.parameters(call)), site.switches.normalize)
        if found is not None and found.validity == validity and not site.weight_is_computed:
            return found
        affine = self._on_grid(site, call)
        affine = dataclasses.replace(affine, step=float(affine.step), validity=validity)
        found = _with_codes(affine, call, site.weights.bits)
        site.prepared[_PREPARED] = found
        return found


def _limited(
    site: Site, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Apply the range limits of the float stage."""
    limits = site.active_limits
    if limits is None:
        return weight, bias
    if weight is not None:
        weight = limited(weight, limits.weight, limits.gradient)
    if bias is not None:
        bias = limited(bias, limits.bias, limits.gradient)
    return weight, bias


def _with_codes(affine: Affine, call: NormCall, bits: int) -> Affine:
    """Add the codes of weight and bias."""
    shape = (call.groups, call.channels)
    step = readable(affine.step)
    if affine.weight is None:
        one = round(1.0 / float(step))
        codes = torch.full(shape, one, dtype=payload_dtype(bits), device=call.input.device)
    else:
        codes = torch.round(affine.weight / step).to(payload_dtype(bits)).reshape(shape)
    if affine.bias is None:
        bias_codes = torch.zeros(shape, dtype=torch.int32, device=call.input.device)
    else:
        scaled = affine.bias.double() / (step * 2.0**-FRACTION)
        bias_codes = torch.round(scaled).to(torch.int32).reshape(shape)
    return dataclasses.replace(affine, codes=codes, bias_codes=bias_codes)


# --- the functions ----------------------------------------------------------------------------


def _refusal(eps: float) -> str | None:
    return None if eps > 0 else "eps must be positive, or a row of equal values divides by zero"


def _bind_layer(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> NormCall:
    shape = tuple(normalized_shape)
    count = math.prod(shape)
    return NormCall(input, 1, count, 1, weight, bias, eps, shape, _refusal(eps))


def _bind_rms(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> NormCall:
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    shape = tuple(normalized_shape)
    count = math.prod(shape)
    return NormCall(input, 1, count, 1, weight, None, eps, shape, _refusal(eps))


def _bind_group(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> NormCall:
    channels, spread = input.shape[1] // num_groups, math.prod(tuple(input.shape[2:]))
    return NormCall(
        input, num_groups, channels, spread, weight, bias, eps, num_groups, _refusal(eps)
    )


def _bind_instance(*args: Any, **kwargs: Any) -> NormCall:
    if len(args) == 9:  # torch.instance_norm(x, weight, bias, mean, var, ...)
        x, weight, bias, mean, var, *rest = args
        args = (x, mean, var, weight, bias, *rest)
    return _bind_functional_instance(*args, **kwargs)


def _bind_functional_instance(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> NormCall:
    refused = _refusal(eps)
    if running_mean is not None or not use_input_stats:
        refused = (
            "an instance norm with running statistics is a batch norm in evaluation: use "
            "nn.BatchNorm, or track_running_stats=False"
        )
    channels, spread = input.shape[1], math.prod(tuple(input.shape[2:]))
    return NormCall(input, channels, 1, spread, weight, bias, eps, None, refused)


def _layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _rms_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    return F.rms_norm(x, shape, weight, eps)


def _group_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    return F.group_norm(x, shape, weight, bias, eps)


def _instance_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    return F.instance_norm(x, weight=weight, bias=bias, eps=eps)


_Binder = Callable[..., NormCall]
_Function = Callable[[Tensor, Any, Any, Any, float], Tensor]
_FUNCTIONS: dict[str, tuple[_Binder, _Function]] = {
    "layer_norm": (_bind_layer, _layer_norm),
    "rms_norm": (_bind_rms, _rms_norm),
    "group_norm": (_bind_group, _group_norm),
    "instance_norm": (_bind_instance, _instance_norm),
}

for _kind in _FUNCTIONS:
    register(NormOp(_kind))
