"""Addition and subtraction of activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.capture import capturing, without_autocast
from lightning_linger.core.fake_quantize import Scalar, fake_quantize, round_to_coarser
from lightning_linger.core.functions import name_functions
from lightning_linger.core.integer import (
    code_limits,
    divide_by_scale,
    integer_op,
    multiplier,
    payload_dtype,
    rescale,
)
from lightning_linger.core.payload import integer_codes, step_of
from lightning_linger.core.platform import fixed_point_of
from lightning_linger.core.quantizer import Quantizer, readable
from lightning_linger.core.registry import register
from lightning_linger.core.rounding import ROUNDINGS
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_held_by, tag_of, with_tag
from lightning_linger.ops import tflite
from lightning_linger.ops.conv import is_wide
from lightning_linger.ops.pairs import (
    PairCall,
    PairOp,
    affine_constant,
    device_type,
    real_dtype,
    stored_zero,
)

# Further bits of operands at their common scale in fixed point: of 8-bit and of 16-bit codes.
LEFT_SHIFT, WIDE_LEFT_SHIFT = 20, 15


@integer_op("linger::add")
def integer_add(
    x: Tensor,
    y: Tensor,
    sign: int,
    scale_x: float,
    scale_y: float,
    scale_o: float,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
    round_operands: bool,
) -> Tensor:
    """Add (``sign`` 1) or subtract (``sign`` -1) codes.

    Args:
        x: Codes.
        y: Codes that broadcast with ``x``.
        sign: 1 or -1, the factor of ``y``.
        scale_x: Step of ``x``.
        scale_y: Step of ``y``.
        scale_o: Step of the result.
        bits_o: Width of the result.
        low: Smallest code of the result.
        high: Largest code of the result.
        rounding: Rounding rule.
        platform: Name of the target.
        round_operands: Round and saturate each operand at the output scale, then add with
            saturation (LUNA); otherwise round the sum once, in float32 (onnxruntime). Where the
            target works in fixed point, TFLite's kernel runs.
    """
    engine = fixed_point_of(platform)
    if engine is not None:
        codes = tflite.centred_sum(
            x,
            y,
            sign,
            (scale_x, scale_y, scale_o),
            WIDE_LEFT_SHIFT if is_wide(bits_o) else LEFT_SHIFT,
            engine.multiplier_rounding,
        ).clamp_(low, high)
    elif round_operands:
        a = _brought_to(x, scale_x, scale_o, bits_o, rounding)
        b = _brought_to(y, scale_y, scale_o, bits_o, rounding)
        total = a + b if sign > 0 else a - b
        codes = total.clamp_(low, high)
    else:
        zero_point = stored_zero(platform, x.dtype, y.dtype, payload_dtype(bits_o))
        codes = round_sum(
            x.float(), y.float(), sign, scale_x, scale_y, scale_o, rounding, zero_point
        )
        codes = codes.clamp_(low, high)
    return codes.to(payload_dtype(bits_o))


@integer_add.register_fake
def _(
    x: Tensor,
    y: Tensor,
    sign: int,
    scale_x: float,
    scale_y: float,
    scale_o: float,
    bits_o: int,
    *_: object,
) -> Tensor:
    shape = torch.broadcast_shapes(x.shape, y.shape)
    return x.new_empty(shape, dtype=payload_dtype(bits_o))


def _brought_to(x: Tensor, scale_x: float, scale_o: float, bits: int, rounding: str) -> Tensor:
    """Return codes at another scale as floats, saturated, without work where none is needed."""
    if scale_x == scale_o and x.dtype == payload_dtype(bits):
        return x.float()
    wide = x.float() if bits <= 16 and scale_x <= scale_o else x.double()
    return rescale(wide, scale_x / scale_o, *code_limits(bits), rounding)


def round_sum(
    x: Tensor,
    y: Tensor,
    sign: int,
    scale_x: float,
    scale_y: float,
    scale_o: float,
    rounding: str,
    zero_point: int | None,
) -> Tensor:
    """Add or subtract codes and round once, in the float32 operations of onnxruntime.

    Args:
        x: Codes, in float32 like ``y``.
        y: Codes that broadcast with ``x``.
        sign: 1 or -1, the factor of ``y``.
        scale_x: Step of ``x``.
        scale_y: Step of ``y``.
        scale_o: Step of the result.
        rounding: Rounding rule.
        zero_point: Of the stored 8-bit codes, which ``QLinearAdd`` adds; None for wider ones. They
            and differences have no kernel of their own: the real values are added.
    """
    if zero_point is None or sign < 0:
        total = x * scale_x + y * (sign * scale_y)
        return ROUNDINGS[rounding](divide_by_scale(total, scale_o))
    if _stands_second(x.shape, y.shape):
        x, y, scale_x, scale_y = y, x, scale_y, scale_x
    ratio_x, ratio_y = multiplier(1.0, (scale_x, scale_y), scale_o)
    offset = zero_point - (ratio_x * zero_point + ratio_y * zero_point)
    stored = _multiply_add(y + zero_point, ratio_y, offset)
    stored = _multiply_add(x + zero_point, ratio_x, stored)
    return ROUNDINGS[rounding](stored) - zero_point


def _stands_second(x: Sequence[int], y: Sequence[int]) -> bool:
    """Whether the first operand of an addition takes the place of the second.

    Which product enters last decides the rounding of the sum. It is that of the operand that is not
    broadcast, and of two single values the second.
    """
    rank = max(len(x), len(y))
    sizes_x, sizes_y = ([1] * (rank - len(s)) + list(s) for s in (x, y))
    return sizes_x[::-1] < sizes_y[::-1] or all(n == 1 for n in (*sizes_x, *sizes_y))


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return ``a * b + c`` of float32 operands, rounded once (a fused multiply-add).

    The product is exact in float64. The sum need not be, and rounding it twice can go wrong next to
    a float32 tie; a first rounding to odd, which keeps what was lost visible, never does.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    nudged = torch.nextafter(total, torch.copysign(torch.full_like(lost, math.inf), lost))
    even = total.view(torch.int64) % 2 == 0
    return torch.where((lost != 0) & even, nudged, total).float()


class AddOp(PairOp):
    """``add`` and ``sub``.

    Args:
        kind: Canonical op name.
        sign: The factor of the second operand.
    """

    exact_with_free_scales = True

    def __init__(self, kind: str, sign: int) -> None:
        super().__init__(kind)
        self.sign = sign
        self.commutative = sign > 0

    def run_fake(self, site: Site, call: PairCall) -> Any:
        """Add on the grid, with the platform's order of rounding."""
        pair = self.operand_pair(site, call)
        output = site.output
        if pair is None or output is None:
            return NotImplemented
        x, y = pair
        with without_autocast(device_type(x, y)):
            # A sum is observed behind the rounding of its operands, which saves a pass over it;
            # only the first one has to be seen before there is a step to round with.
            first = site.learning and not output.settled
            if first:
                output.observe(_total(x, y, self.sign))
            step = output.step(self._finest(site, x, y))
            dtype = x.dtype if isinstance(x, Tensor) else y.dtype
            if site.platform is not None and site.platform.add == "round_operands":
                if output.learns_now:
                    return self._learned(x, y, step, output, dtype)
                usable = readable(step)
                a, own = _rounded_operand(x, usable, output)
                b, _ = _rounded_operand(y, usable, output)
                total = _total(a, b, self.sign, overwrite=own)
                if site.learning and not first:
                    output.observe(total)
                return _saturated(total, usable, step, output, dtype)
            if site.learning and not first:
                output.observe(_total(x, y, self.sign))
            return self._rounded_once(site, output, x, y, step, dtype)

    def _learned(
        self, x: Any, y: Any, step: Scalar, output: Quantizer, dtype: torch.dtype
    ) -> Tensor:
        """Add with the gradient of rounding the sum once, for the range too."""
        real = _total(x, y, self.sign)
        usable = readable(step)
        with torch.no_grad():
            a, b = (_rounded_operand(v, usable, output)[0] for v in (x, y))
            value = _saturated(_total(a, b, self.sign), usable, step, output, dtype)
        return with_tag(output.with_gradient(value, real, usable), output.tag(step, dtype))

    def run_integer(self, site: Site, call: PairCall) -> Any:
        """Call ``linger::add``."""
        pair = self.operand_pair(site, call)
        output = site.output
        if pair is None or output is None:
            return NotImplemented
        x, y = pair
        step = float(output.step(self._finest(site, x, y)))
        x, y = (_with_constant(v, step, output) for v in (x, y))
        codes = self._kernel(site, output, x, y, step)
        return with_tag(codes, output.tag(step, real_dtype(x, y)))

    def _finest(self, site: Site, x: Any, y: Any) -> Scalar | None:
        if site.platform is None or not site.platform.right_shift_only:
            return None
        steps = [step_of(v) for v in (x, y) if isinstance(v, Tensor)]
        if len(steps) == 1:
            return steps[0]
        a, b = steps
        if isinstance(a, float) and isinstance(b, float):
            return max(a, b)
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))

    def _rounded_once(
        self, site: Site, output: Quantizer, x: Any, y: Any, step: Scalar, dtype: torch.dtype
    ) -> Tensor:
        total = _total(x, y, self.sign)
        if site.training or capturing():
            return output.round(total, step, dtype)
        # The integer kernel's own order of float32 operations, so that evaluation agrees with it.
        x, y = (_with_constant(v, float(step), output) for v in (x, y))
        if fixed_point_of(site.platform_name) is not None:
            codes = self._kernel(site, output, x, y, float(step)).float()
            return self._finished(output, codes, total, float(step), dtype)
        tags = (tag_of(x), tag_of(y))
        widths = (*(tag.bits for tag in tags if tag is not None), output.grid.bits)
        codes = round_sum(
            _whole(x),
            _whole(y),
            self.sign,
            float(step_of(x)),
            float(step_of(y)),
            float(step),
            output.grid.rounding,
            stored_zero(site.platform_name, *(payload_dtype(bits) for bits in widths)),
        )
        low, high = (int(edge) for edge in output.code_bounds(float(step)))
        return self._finished(output, codes.clamp_(low, high), total, float(step), dtype)

    def _finished(
        self, output: Quantizer, codes: Tensor, total: Tensor, step: float, dtype: torch.dtype
    ) -> Tensor:
        output.latest_step = step
        values = codes.mul_(step).to(dtype)
        values = output.with_gradient(values, total.to(dtype), step)
        return with_tag(values, output.tag(step, dtype))

    def _kernel(self, site: Site, output: Quantizer, x: Tensor, y: Tensor, step: float) -> Tensor:
        """Call ``linger::add`` on tagged tensors."""
        low, high = output.code_bounds(step)
        return integer_add(
            integer_codes(x),
            integer_codes(y),
            self.sign,
            float(step_of(x)),
            float(step_of(y)),
            step,
            output.grid.code_bits,
            int(low),
            int(high),
            output.grid.rounding,
            site.platform_name,
            site.platform is not None and site.platform.add == "round_operands",
        )


def _with_constant(value: Any, step: float, output: Quantizer) -> Tensor:
    """Return a number as a tagged 0-dim tensor at the output step, tensors as they are."""
    if isinstance(value, Tensor):
        return value
    if output.grid.affine:
        constant = affine_constant(float(value), output.grid)
        tensor = torch.tensor(constant.code, dtype=payload_dtype(constant.bits))
        return with_tag(tensor, Tag(constant.step, constant.bits, output.name))
    codes = _constant_code(value, step, output)
    tensor = torch.tensor(codes, dtype=payload_dtype(output.grid.bits))
    return with_tag(tensor, Tag(step, output.grid.bits, output.name))


def _constant_code(value: float, step: float, output: Quantizer) -> int:
    code = ROUNDINGS[output.grid.rounding](torch.tensor(float(value) / step, dtype=torch.float64))
    return max(output.grid.qmin, min(output.grid.qmax, int(code)))


def _rounded_operand(value: Any, step: Scalar, output: Quantizer) -> tuple[Any, bool]:
    """Round an operand to the output scale with saturation; a no-op if it is there already.

    Returns:
        The operand, and whether its memory may be used because nothing else reads it.
    """
    grid = output.grid
    if not isinstance(value, Tensor):
        if isinstance(step, float):
            return _constant_code(value, step, output) * step, False
        codes = ROUNDINGS[grid.rounding](value / step).clamp(grid.qmin, grid.qmax)
        return codes * step, False
    tag = tag_held_by(value)
    if isinstance(step, float) and tag.bits == grid.bits and readable(tag.step) == step:
        return value, False
    if isinstance(step, float) and tag.bits == grid.bits and step > readable(tag.step):
        return round_to_coarser(value, step, grid.rounding), True
    return fake_quantize(value, step, grid.qmin, grid.qmax, grid.rounding), False


def _whole(x: Tensor) -> Tensor:
    """Return the codes of a tagged tensor (constants hold them already) as floats."""
    return torch.round(x.float() / step_of(x)) if x.dtype.is_floating_point else x.float()


def _total(x: Any, y: Any, sign: int, overwrite: bool = False) -> Tensor:
    if overwrite and isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape:
        return x.add_(y, alpha=sign)
    total: Tensor = x + y if sign > 0 else x - y
    return total


class _Saturate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, low: float, high: float) -> Tensor:
        y = total.clamp_(low, high)
        ctx.mark_dirty(total)
        ctx.edges = (low, high)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], y, *ctx.edges), None, None


class _SaturateOutOfPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, low: Tensor, high: Tensor) -> Tensor:
        y = torch.minimum(torch.maximum(total, low), high)
        ctx.save_for_backward(y, low, high)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, low, high = ctx.saved_tensors
        return grads[0] * ((y > low) & (y < high)), None, None


def _saturated(
    total: Tensor, usable: Scalar, step: Scalar, output: Quantizer, dtype: torch.dtype
) -> Tensor:
    """Saturate a sum that is on the output grid already; an eager CPU sum is overwritten."""
    bounds = [code * usable for code in output.code_bounds(usable)]
    if capturing() or isinstance(usable, Tensor):
        edges = (torch.as_tensor(edge, dtype=total.dtype, device=total.device) for edge in bounds)
        y = _SaturateOutOfPlace.apply(total, *edges)
    elif torch.is_grad_enabled() and total.requires_grad:
        y = _Saturate.apply(total, *bounds)
    else:
        low, high = (float(edge) for edge in bounds)
        y = total.clamp_(low, high)
    y = output.with_rounded_gradient(y.to(dtype))
    return with_tag(y, output.tag(step, dtype))


register(AddOp("add", 1), "add", "__add__")
register(AddOp("sub", -1), "sub", "subtract", "__sub__")
# torch.rsub(x, y) is y - x
name_functions("sub", ("rsub",), swapped=True)
