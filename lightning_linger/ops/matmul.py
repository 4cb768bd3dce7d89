"""Matrix products: of two activations, or of an activation and a weight of the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.graph import TensorSpec
from lightning_linger.core.integer import EXACT_FLOAT32, integer_op, payload_dtype
from lightning_linger.core.payload import integer_codes, step_of
from lightning_linger.core.quantizer import Quantizer
from lightning_linger.core.registry import Op, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by, with_tag, with_tag_of
from lightning_linger.ops.conv import finish_accumulator, in_one_product, is_wide
from lightning_linger.ops.folding import full
from lightning_linger.ops.kernel import Target, in_full_precision, run_kernel, without_gradients
from lightning_linger.ops.projection import Projection
from lightning_linger.ops.refused import RefusedOp
from lightning_linger.ops.results import finish, finish_codes, integer_result, minimum_step

# --- integer kernel -------------------------------------------------------------------------


def largest_sum(features: int, bits_x: int, bits_y: int) -> int:
    """Return what no sum of ``features`` products of two codes exceeds in magnitude."""
    return features << (bits_x + bits_y - 2)


@integer_op("linger::matmul")
def integer_matmul(
    x: Tensor,
    y: Tensor,
    scale_x: float,
    scale_y: float,
    scale_o: float,
    bits_x: int,
    bits_y: int,
    bits_o: int,
    low: int,
    high: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Multiply codes as ``torch.matmul`` does, exactly, then rescale to the output.

    Args:
        x: Codes, one dimension or more.
        y: Codes, one dimension or more.
        scale_x: Step of ``x``.
        scale_y: Step of ``y``.
        scale_o: Step of the result; 0 returns real values in float32.
        bits_x: Width of ``x``.
        bits_y: Width of ``y``.
        bits_o: Width of the result.
        low: Smallest code of the result.
        high: Largest code of the result.
        rounding: Rounding rule.
        platform: Name of the target.
    """
    bound = float(largest_sum(x.shape[-1], bits_x, bits_y))
    if scale_o:
        # Rounding adds a half in units of the output, on the accumulator itself one more bit.
        bound += max(0.5 * scale_o / (scale_x * scale_y), bound + 1.0 if bits_o > 16 else 0.0)
    exact = bound < EXACT_FLOAT32 and (
        max(bits_x, bits_y) <= 8 or torch.get_float32_matmul_precision() == "highest"
    )
    dtype = torch.float32 if exact else torch.float64
    acc = torch.matmul(x.to(dtype), y.to(dtype))
    factor_x, factor_y = in_one_product(scale_x, [scale_y], scale_o, platform)
    return finish_accumulator(
        acc,
        factor_x,
        factor_y,
        scale_o,
        bits_o,
        low,
        high,
        rounding,
        platform,
        0,
        is_wide(max(bits_x, bits_y)),
    )


@integer_matmul.register_fake
def _(
    x: Tensor,
    y: Tensor,
    scale_x: float,
    scale_y: float,
    scale_o: float,
    bits_x: int,
    bits_y: int,
    bits_o: int,
    *_: object,
) -> Tensor:
    shape = torch.matmul(x.float(), y.float()).shape
    return x.new_empty(shape, dtype=torch.float32 if scale_o == 0.0 else payload_dtype(bits_o))


# --- products of tagged tensors -------------------------------------------------------------


def product(
    site: Site,
    x: Tensor,
    y: Tensor,
    output: Quantizer,
    factor: float = 1.0,
    observe: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Multiply tagged tensors in the number system of the moment, inside an op.

    Args:
        site: The site.
        x: Tagged.
        y: Tagged.
        output: Rounds the result, e.g. a part of the site.
        factor: Multiplies the result; it scales the step of ``x``, so that it costs nothing.
        observe: Returns what of the real result the range has to cover; None for all of it.

    Returns:
        The tagged ``factor * x @ y``.
    """
    step_x, step_y = step_of(x) * factor, step_of(y)

    def kernel(target: Target, a: Tensor, b: Tensor) -> Tensor:
        return _call_kernel(site, a, b, factor, target)

    return run_kernel(
        site,
        output,
        [x, y],
        lambda a, b: torch.matmul(full(a) * factor if factor != 1.0 else full(a), full(b)),
        kernel,
        minimum_step(site, step_x * step_y),
        observe=observe,
        rounds_in_training=True,
    )


def last_product(site: Site, x: Tensor, y: Tensor) -> Tensor:
    """Multiply tagged tensors to the site's own result: codes, a 32-bit accumulator or floats."""
    tag_x, tag_y = tag_held_by(x), tag_held_by(y)
    if site.training and site.switches.system == "fake":
        real = torch.matmul(full(x), full(y))
        return finish(site, real, tag_x.step * tag_y.step, True, tag_x.dtype)
    result = integer_result(site, float(tag_x.step) * float(tag_y.step), tag_x)
    with without_gradients(site):
        target = Target(result.scale, result.bits, result.low, result.high)
        codes = _call_kernel(site, _codes(x), _codes(y), 1.0, target)
    return finish_codes(site, codes, result, tag_x.dtype, lambda: torch.matmul(full(x), full(y)))


def _call_kernel(site: Site, x: Tensor, y: Tensor, factor: float, target: Target) -> Tensor:
    tag_x, tag_y = tag_held_by(x), tag_held_by(y)
    return integer_matmul(
        x,
        y,
        float(tag_x.step) * factor,
        float(tag_y.step),
        target.scale,
        tag_x.bits,
        tag_y.bits,
        target.bits,
        target.low,
        target.high,
        site.rounding,
        site.platform_name,
    )


def _codes(x: Tensor) -> Tensor:
    return with_tag(integer_codes(x), tag_held_by(x))


# --- ops ------------------------------------------------------------------------------------


class ProductCall(NamedTuple):
    """Bound arguments of a matrix product."""

    input: Any
    other: Any
    equation: str = ""
    unsupported: str | None = None


class ProductOp(Op):
    """``matmul`` in all its spellings, and ``bmm``.

    Both factors are activations, or one is a parameter or buffer of the model, which is then the
    weight of a linear layer: it lies on the weight grid, with a step from its present values, and
    range limits act on it. Factors of three and more dimensions and what is computed from
    parameters count as activations, whose range is observed.
    """

    exact_with_free_scales = True

    def bind(self, input: Any, *args: Any, **kwargs: Any) -> ProductCall:
        """Bind ``(input, other)``; the second argument has several names."""
        names = ("other", "mat2", "vec", "tensor")
        given = [*args, *(kwargs[name] for name in names if name in kwargs)]
        reason = None
        if len(given) != 1 or kwargs.keys() - {*names}:
            reason = "`out=` and `out_dtype=` have no integer form"
        return ProductCall(input, given[0] if given else None, unsupported=reason)

    def operands(self, call: ProductCall) -> list[Any]:
        """Both factors, or the one that is no weight."""
        side = self.weight_side(call)
        pair = [call.input, call.other]
        return [x for position, x in enumerate(pair) if position != side]

    def parameters(self, call: ProductCall) -> list[Any]:
        """The factor that is a weight, if one is."""
        side = self.weight_side(call)
        return [] if side is None else [[call.input, call.other][side]]

    def obstacle(self, call: ProductCall) -> str | None:
        """What is no product of two activations, or of one and a weight."""
        if call.unsupported is not None:
            return call.unsupported
        if call.input.constant and call.other.constant:
            return "both factors are parameters"
        return None

    def weight_side(self, call: ProductCall) -> int | None:
        """Return which factor of a recorded call is a weight, if one is."""
        pair = call[:2]
        if (
            any(not isinstance(x, TensorSpec) for x in pair)
            or call.input.constant == call.other.constant
        ):
            return None
        side = 1 if call.other.constant else 0
        return side if self.is_weight(call, side) else None

    def is_weight(self, call: ProductCall, side: int) -> bool:
        """Whether a factor that is a constant of the model is one matrix, or a vector."""
        return len((call.input, call.other)[side].shape) <= 2

    def run_float(self, site: Site, call: ProductCall) -> Any:
        """Limit the weight, if there is one."""
        side = self.weight_side(site.recorded_call)
        return NotImplemented if side is None else self._run_layer(site, call, side, False)

    def run_fake(self, site: Site, call: ProductCall) -> Any:
        """Multiply on the grid."""
        return self._run(site, call)

    def run_integer(self, site: Site, call: ProductCall) -> Any:
        """Call ``linger::matmul``, or ``linger::linear`` with a weight."""
        return self._run(site, call)

    def _run(self, site: Site, call: ProductCall) -> Any:
        side = self.weight_side(site.recorded_call)
        if side is not None:
            return self._run_layer(site, call, side, True)
        return self._run_product(site, call)

    def _run_product(self, site: Site, call: ProductCall) -> Any:
        x, y = site.operand(0, call.input), site.operand(1, call.other)
        if x is None or y is None:
            return NotImplemented
        with in_full_precision(site, x):
            return self.multiply(site, call, x, y)

    def multiply(self, site: Site, call: ProductCall, x: Tensor, y: Tensor) -> Any:
        """Multiply two tagged tensors."""
        return last_product(site, x, y)

    def _run_layer(self, site: Site, call: ProductCall, side: int, quantized: bool) -> Any:
        """Multiply with a weight, as a linear layer does: its rows are the results' columns."""
        pair: list[Any] = [call.input, call.other]
        weight, x = pair[side], pair[1 - side]
        turned = side == 0 and x.dim() > 1
        rows = weight.view(1, -1) if weight.dim() == 1 else weight
        matrix = rows.t() if side == 1 and weight.dim() == 2 else rows
        y = run_layer(site, with_tag_of(x, x.mT) if turned else x, matrix, None, quantized)
        if y is NotImplemented:
            return NotImplemented
        if weight.dim() == 1:
            return with_tag_of(y, y.squeeze(-1))
        return with_tag_of(y, y.mT) if turned else y


class AddmmCall(NamedTuple):
    """Bound arguments of ``torch.addmm``."""

    input: Any
    mat1: Any
    mat2: Any
    beta: float = 1
    alpha: float = 1
    out: Any = None


class AddmmOp(Op):
    """``addmm(bias, x, weight)``: a linear layer whose weight stands ``[K, O]``."""

    needs_quantized_operand = False
    has_parameters = True
    exact_with_free_scales = True

    def bind(self, *args: Any, **kwargs: Any) -> AddmmCall:
        """Bind ``(input, mat1, mat2)``."""
        return AddmmCall(*args, **kwargs)

    def operands(self, call: AddmmCall) -> list[Any]:
        """The matrix that is multiplied."""
        return [call.mat1]

    def parameters(self, call: AddmmCall) -> list[Any]:
        """The weight."""
        return [call.mat2]

    def obstacle(self, call: AddmmCall) -> str | None:
        """What is no linear layer."""
        if call.beta != 1 or call.alpha != 1 or call.out is not None:
            return "addmm with `beta`, `alpha` or `out`; multiply and add"
        if not call.input.constant or math.prod(call.input.shape) != call.mat2.shape[-1]:
            return "addmm that adds more than a bias; write `x @ y + z`"
        return None

    def run_float(self, site: Site, call: AddmmCall) -> Any:
        """Limit the weight, the bias and the result."""
        return self._run(site, call, False)

    def run_fake(self, site: Site, call: AddmmCall) -> Any:
        """Multiply on the grid."""
        return self._run(site, call, True)

    def run_integer(self, site: Site, call: AddmmCall) -> Any:
        """Call ``linger::linear``."""
        return self._run(site, call, True)

    def _run(self, site: Site, call: AddmmCall, quantized: bool) -> Any:
        bias = call.input.reshape(-1)
        return run_layer(site, call.mat1, call.mat2.t(), bias, quantized)


def run_layer(site: Site, x: Tensor, weight: Tensor, bias: Tensor | None, quantized: bool) -> Any:
    """Run the linear layer that a product with a weight is.

    Args:
        site: The site.
        x: ``[..., K]``.
        weight: ``[O, K]``.
        bias: ``[O]`` or None.
        quantized: Whether to run in the number system of the moment, or in float with limits.
    """
    layer = Projection("weight", weight, bias)
    if not quantized:
        return layer.run_float(site, x)
    operand = site.operand(0, x)
    if operand is None:
        return NotImplemented
    with in_full_precision(site, x):
        return layer.run_last(site, operand)


register(ProductOp("matmul"), "matmul", "__matmul__", "mm", "mv", "dot")
register(ProductOp("bmm"))
register(AddmmOp("addmm"))
register(
    RefusedOp("baddbmm", "baddbmm adds and multiplies in one call; write `torch.bmm(x, y) + z`")
)
