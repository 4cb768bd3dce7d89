"""Multiplication of activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.capture import without_autocast
from lightning_linger.core.integer import (
    divide_by_scale,
    integer_op,
    multiplier,
    payload_dtype,
    rescale,
)
from lightning_linger.core.platform import fixed_point_of
from lightning_linger.core.quantizer import Quantizer
from lightning_linger.core.registry import register
from lightning_linger.core.rounding import ROUNDINGS
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import with_tag
from lightning_linger.ops import tflite
from lightning_linger.ops.kernel import Target, run_kernel
from lightning_linger.ops.pairs import (
    Factor,
    PairCall,
    PairOp,
    as_factor,
    computes_with_ratios,
    device_type,
    factor_codes,
    multiplies,
    real_dtype,
    step_or,
    stored_zero,
)
from lightning_linger.ops.results import finish, minimum_step


@integer_op("linger::mul")
def integer_mul(
    x: Tensor,
    y: Tensor,
    scale_x: float,
    scale_y: float,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Multiply codes and bring the product to the output scale (arguments as ``linger::add``)."""
    dtype = payload_dtype(bits_o)
    zero_point = stored_zero(platform, x.dtype, y.dtype, dtype)
    engine = fixed_point_of(platform)
    if engine is not None:
        scales = (scale_x, scale_y, scale_o)
        codes = tflite.centred_product(x, y, scales, engine.multiplier_rounding).clamp_(low, high)
    elif not multiplies(platform):
        exact = torch.float32 if x.dtype == y.dtype == torch.int8 else torch.float64
        product = x.to(exact) * y.to(exact)
        codes = rescale(product, scale_x * scale_y / scale_o, low, high, rounding)
    elif zero_point is not None:  # QLinearMul, which adds the stored zero point before it rounds
        ratio = multiplier(scale_x, [scale_y], scale_o).item()
        stored = (x.float() * y.float()).mul_(ratio).add_(zero_point)
        codes = ROUNDINGS[rounding](stored).sub_(zero_point).clamp_(low, high)
    else:
        real = (x.float() * scale_x) * (y.float() * scale_y)
        codes = ROUNDINGS[rounding](divide_by_scale(real, scale_o)).clamp_(low, high)
    return codes.to(dtype)


@integer_mul.register_fake
def _(
    x: Tensor, y: Tensor, scale_x: float, scale_y: float, scale_o: float, bits_o: int, *_: object
) -> Tensor:
    shape = torch.broadcast_shapes(x.shape, y.shape)
    return x.new_empty(shape, dtype=payload_dtype(bits_o))


class MulOp(PairOp):
    """``mul`` of two activations, or of an activation and a number.

    A number becomes a constant of the output's width at the finest power-of-two step that holds it.
    """

    commutative = True
    exact_with_free_scales = True

    def run_fake(self, site: Site, call: PairCall) -> Any:
        """Multiply on the grid."""
        pair = self.operand_pair(site, call)
        output = site.output
        if pair is None or output is None:
            return NotImplemented
        x, y = (as_factor(v, output) for v in pair)
        with without_autocast(device_type(x, y)):
            if computes_with_ratios(site.platform_name):
                return _product(site, output, x, y)
            dtype = x.dtype if isinstance(x, Tensor) else y.dtype
            product = step_or(x) * step_or(y)
            if not site.training and site.widest_operand > 8:
                x, y = (v.double() if isinstance(v, Tensor) else v for v in (x, y))
            real_x, real_y = (v.value if isinstance(v, Factor) else v for v in (x, y))
            real: Any = real_x * real_y
            return finish(site, real, product, True, dtype)

    def run_integer(self, site: Site, call: PairCall) -> Any:
        """Call ``linger::mul``."""
        pair = self.operand_pair(site, call)
        output = site.output
        if pair is None or output is None:
            return NotImplemented
        x, y = (as_factor(v, output) for v in pair)
        like = x if isinstance(x, Tensor) else y
        product = float(step_or(x)) * float(step_or(y))
        step = float(output.step(minimum_step(site, product)))
        low, high = output.code_bounds(step)
        codes = integer_mul(
            factor_codes(x, like),
            factor_codes(y, like),
            float(step_or(x)),
            float(step_or(y)),
            step,
            output.grid.code_bits,
            int(low),
            int(high),
            output.grid.rounding,
            site.platform_name,
        )
        return with_tag(codes, output.tag(step, real_dtype(x, y)))


def _product(site: Site, output: Quantizer, x: Any, y: Any) -> Tensor:
    """Multiply with free scales: evaluation takes the value of the integer kernel."""
    operands = [v for v in (x, y) if isinstance(v, Tensor)]

    def real(*values: Tensor) -> Tensor:
        left = iter(values)
        a, b = (v.value if isinstance(v, Factor) else next(left) for v in (x, y))
        return torch.mul(a, b)

    def kernel(target: Target, *codes: Tensor) -> Tensor:
        left = iter(codes)
        a, b = (v if isinstance(v, Factor) else next(left) for v in (x, y))
        return integer_mul(
            factor_codes(a, codes[0]),
            factor_codes(b, codes[0]),
            float(step_or(a)),
            float(step_or(b)),
            target.scale,
            target.bits,
            target.low,
            target.high,
            output.grid.rounding,
            site.platform_name,
        )

    return run_kernel(site, output, operands, real, kernel, rounds_in_training=True)


register(MulOp("mul"), "mul", "multiply", "__mul__")
