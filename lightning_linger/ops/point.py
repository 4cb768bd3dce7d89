"""A quantization point: a place in a model where a user wants a value on a grid of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lightning_linger.core.functions import operator
from lightning_linger.core.integer import requantize
from lightning_linger.core.payload import step_of
from lightning_linger.core.registry import Op, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of
from lightning_linger.ops.kernel import Target, run_kernel
from lightning_linger.ops.results import minimum_step


@operator
def quantization_point(x: Tensor) -> Tensor:
    """Return ``x``, rounded where quantization is on."""
    return x.view_as(x)


class PointCall(NamedTuple):
    """Bound arguments."""

    input: Tensor


class PointOp(Op):
    """Rounds its input with its output quantizer, once, whether it comes as codes or as floats."""

    needs_quantized_operand = False
    takes_window = False
    exact_with_free_scales = True

    def bind(self, *args: Any, **kwargs: Any) -> PointCall:
        """Bind ``(x)``."""
        return PointCall(*args, **kwargs)

    def operands(self, call: PointCall) -> list[Any]:
        """None: a plain input needs no quantizer beside the output's."""
        return []

    def run_fake(self, site: Site, call: PointCall) -> Any:
        """Round."""
        return self._round(site, call)

    def run_integer(self, site: Site, call: PointCall) -> Any:
        """Call ``linger::quantize`` or ``linger::requantize``."""
        return self._round(site, call)

    def _round(self, site: Site, call: PointCall) -> Any:
        x, output = call.input, site.output
        if output is None:
            return NotImplemented
        tag = tag_of(x)
        if tag is None:
            return site.quantized_input(output, x)

        def kernel(target: Target, codes: Tensor) -> Tensor:
            limits = [target.low, target.high] if output.grid.affine else []
            return requantize(
                codes,
                float(step_of(codes)),
                target.scale,
                tag.bits,
                target.bits,
                site.rounding,
                site.platform_name,
                *limits,
            )

        finest = minimum_step(site, tag.step)
        return run_kernel(site, output, [x], lambda value: value, kernel, finest)


register(PointOp("quantization_point"), functions=[quantization_point])
