"""What evaluation derives from a layer's weights once, and for how long that holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_linger.core.integer import EXACT_FLOAT32, payload_dtype
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag
from lightning_linger.ops.parameters import Parameters
from lightning_linger.ops.results import IntegerResult, integer_result, minimum_step


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


class Channels(Protocol):
    """How the output channels of a weight lie, as a layer knows it."""

    def per_channel(self, call: Any, values: Tensor) -> Tensor:
        """View ``[C_out]`` values so that they broadcast to the weight."""

    def channel_reduce(self, call: Any, weight: Tensor, how: str) -> Tensor:
        """Reduce the absolute weight to ``[C_out]`` by ``amax`` or ``sum``."""


def prepare_weights(
    site: Site, call: Any, tag: Tag, parameters: Parameters, channels: Channels
) -> Prepared:
    """Derive what evaluation computes with from the parameters in use.

    Args:
        site: The layer.
        call: Its bound call.
        tag: Tag of the input.
        parameters: On their grids, without gradients.
        channels: How the output channels of the weight lie.
    """
    step_x = float(tag.step)
    step_w = torch.as_tensor(parameters.step)
    steps = channels.per_channel(call, step_w) if step_w.dim() else step_w
    codes = torch.round(parameters.weight / steps)
    bias_codes = None
    if parameters.bias is not None and not site.gives_real_results:
        bias_codes = torch.round(parameters.bias.double() / (step_w.double() * step_x))
    bound = channels.channel_reduce(call, codes.double(), "sum") * 2.0 ** (tag.bits - 1)
    if bias_codes is not None:
        bound = bound + bias_codes.abs()
    exact = _fits_float32(site, bound.max().item(), step_x, step_w)
    weight, bias, in_codes, result = parameters.weight, parameters.bias, False, None
    if exact and _gives_codes(site):
        step_o = _output_step(site, step_x, step_w)
        weight, in_codes = weight / step_o, True
        result = integer_result(site, step_x * float(step_w.max()), tag)
        half = weight.new_full((bound.numel(),), 0.5)
        bias = half if bias is None else bias / step_o + 0.5
    return Prepared(
        weight=weight,
        bias=bias,
        in_codes=in_codes,
        codes=codes.to(payload_dtype(site.weight_code_bits)),
        bias_codes=None if bias_codes is None else bias_codes.to(torch.int32),
        steps=[float(s) for s in step_w.flatten()],
        scale_x=step_x,
        bits_x=tag.bits,
        exact_in_float32=exact,
        result=result,
        validity=_validity(site, call),
        source=call.weight.clone() if site.weight_is_computed else None,
    )


def _fits_float32(site: Site, bound: float, step_x: float, step_w: Tensor) -> bool:
    if torch.get_float32_matmul_precision() != "highest" and site.widest_operand > 8:
        return False
    half = 0.0
    if site.config is not None and site.config.output_bits == 32:
        half = bound + 1.0  # added to the accumulator itself, it takes a bit of its own
    if site.output is not None:
        # Codes are shifted to start at zero, and a half is added.
        offset = (2.0 ** (site.output.grid.bits - 1) + 0.5) * _output_step(site, step_x, step_w)
        half = offset / (step_x * float(step_w.min()))
    return bound + half < EXACT_FLOAT32


def _output_step(site: Site, step_x: float, step_w: Tensor) -> float:
    assert site.output is not None  # asked for quantized outputs only
    return float(site.output.step(minimum_step(site, step_x * float(step_w.max()))))


def _gives_codes(site: Site) -> bool:
    """Whether dividing by the output step is exact and nothing needs the real values."""
    if site.output is None or site.output.grid.rounding != "half_up" or site.float_operands:
        return False
    limits = site.active_limits
    dynamic = limits is not None and limits.output is not None and limits.output.kind != "static"
    return site.output.grid.scale_kind == "power_of_two" and not dynamic


def versions_of(tensors: Iterable[Tensor | None]) -> tuple[tuple[int, int], ...]:
    """Return what changes when one of the tensors is replaced or written to."""
    return tuple(
        (t.data_ptr(), t._version) for t in tensors if t is not None and not t.is_inference()
    )


def is_valid(found: Prepared, site: Site, call: Any) -> bool:
    """Whether the layer still has the parameters and the stages that it was derived from."""
    same_weight = found.source is None or torch.equal(found.source, call.weight)
    return same_weight and found.validity == _validity(site, call)


def _validity(site: Site, call: Any) -> tuple[Any, ...]:
    bn: Any = site.active_fold
    tensors = [None if site.weight_is_computed else call.weight, call.bias]
    if bn is not None:
        tensors += [bn.weight, bn.bias, bn.running_mean, bn.running_var]
    return (versions_of(tensors), site.switches.fuse, site.switches.normalize)
