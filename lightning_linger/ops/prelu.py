"""``prelu``: the slopes for negative values are weights of the model, on a grid of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.capture import can_read, capturing
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.integer import payload_dtype
from lightning_linger.core.limits import limited
from lightning_linger.core.payload import integer_codes, step_of
from lightning_linger.core.registry import register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by
from lightning_linger.ops.kernel import KernelOp, Target
from lightning_linger.ops.parameters import learned_on_grid, learned_step, on_grid
from lightning_linger.ops.prepared import versions_of
from lightning_linger.ops.slopes import finest_of_slopes, integer_prelu


class PReLUCall(NamedTuple):
    """Bound arguments of ``F.prelu``."""

    input: Tensor
    weight: Tensor


class PReLUOp(KernelOp):
    """``prelu``."""

    has_parameters = True

    def bind(self, input: Tensor, weight: Tensor) -> PReLUCall:
        """Bind ``(input, weight)``."""
        return PReLUCall(input, weight)

    def parameters(self, call: PReLUCall) -> list[Any]:
        """The slopes."""
        return [call.weight]

    def learned_weights(self, call: PReLUCall) -> Mapping[str, int | None]:
        """The slopes, which have one scale."""
        return {"weight": None}

    def sources(self, call: PReLUCall) -> list[Tensor]:
        """The slopes are trained."""
        return [call.weight]

    def run_float(self, site: Site, call: PReLUCall) -> Any:
        """Run with limited slopes."""
        return site.limit_output(F.prelu(call.input, _limited(site, call.weight)))

    def finest_step(self, site: Site, call: PReLUCall) -> Scalar | None:
        """A positive code is only shifted right."""
        if site.platform is None or not site.platform.right_shift_only:
            return None
        found: _Slopes | None = site.prepared.get(_PREPARED)
        step = found.step if found is not None else _on_grid(site, call.weight)[1]
        return finest_of_slopes(step_of(call.input), step)

    def real(self, site: Site, call: PReLUCall) -> Tensor:
        """Run with the slopes on their grid, as far as the site is quantized."""
        weight, _ = _on_grid(site, call.weight)
        weight = site.with_rounded_gradient("weight", weight)
        return F.prelu(call.input, weight.to(call.input.dtype))

    def can_run(self, site: Site, call: PReLUCall, target: Target) -> bool:
        """A capture finds the slopes' codes, or computes without."""
        return not capturing() or _PREPARED in site.prepared

    def kernel(self, site: Site, call: PReLUCall, target: Target) -> Tensor:
        """Call ``linger::prelu``."""
        tag = tag_held_by(call.input)
        slopes = _prepare(site, call.weight)
        return integer_prelu(
            integer_codes(call.input),
            slopes.codes,
            float(tag.step),
            slopes.step,
            target.scale,
            tag.bits,
            site.weights.bits,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )


_PREPARED = "slopes"


@dataclass(frozen=True)
class _Slopes:
    codes: Tensor
    step: float
    validity: tuple[Any, ...]


def _limited(site: Site, weight: Tensor) -> Tensor:
    limits = site.active_limits
    return weight if limits is None else limited(weight, limits.weight, limits.gradient)


def _on_grid(site: Site, weight: Tensor) -> tuple[Tensor, Scalar]:
    weight, grid = _limited(site, weight), site.weights.grid
    assert grid is not None
    limits, learned = (grid.qmin, grid.qmax), site.weights.learned
    if learned is not None:
        step: Scalar = learned_step(site, learned, weight.detach().reshape(1, -1).float())
        if isinstance(step, Tensor) and can_read(step):
            step = step.item()
        step = site.weights.held("weight", step)
        if site.training:
            value = learned.value
            return learned_on_grid(weight, step, limits, grid.rounding, learned, value), step
        return on_grid(weight, step, limits, grid.rounding, clips=True), step
    reach = site.weights.reach(weight.detach().reshape(1, -1))[0]
    step = grid.step_value(reach.item()) if can_read(reach) else grid.step(reach)
    step = site.weights.held("weight", step)
    return on_grid(weight, step, limits, grid.rounding, site.weights.clips), step


def _prepare(site: Site, weight: Tensor) -> _Slopes:
    found: _Slopes | None = site.prepared.get(_PREPARED)
    if found is not None and (capturing() or found.validity == _validity(site, weight)):
        return found
    with torch.no_grad():
        values, step = _on_grid(site, weight)
        site.note("weight", weight, values, step)
        codes = torch.round(values.float() / step).to(payload_dtype(site.weights.bits))
    found = site.prepared[_PREPARED] = _Slopes(codes, float(step), _validity(site, weight))
    return found


def _validity(site: Site, weight: Tensor) -> tuple[Any, ...]:
    return (versions_of([weight]), site.switches.normalize)


register(PReLUOp("prelu"))
