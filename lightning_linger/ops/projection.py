"""Weights of an op that has several: attention and recurrent layers, whose call is one site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.capture import capturing
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.integer import EXACT_FLOAT32, float32_code_limits, payload_dtype
from lightning_linger.core.limits import limited
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.quantizer import Quantizer
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import WIDEST_OPERAND, tag_held_by
from lightning_linger.ops.folding import full
from lightning_linger.ops.kernel import Target, run_kernel, without_gradients
from lightning_linger.ops.linear import integer_linear
from lightning_linger.ops.parameters import (
    Parameters,
    finest_for_bias,
    learned_on_grid,
    on_grid,
    weight_step,
)
from lightning_linger.ops.prepared import versions_of
from lightning_linger.ops.results import (
    IntegerResult,
    finish,
    finish_codes,
    integer_result,
    minimum_step,
)


@dataclass(frozen=True)
class Codes:
    """A projection's parameters as integers.

    Args:
        weight: ``[O, K]`` codes in the payload of the site's weight width.
        bias: ``[O]`` int32 codes at ``scale_x * scale_w``, or None.
        steps: Steps of the weight, one or one per output.
        scale_x: Step of the input.
        bits_x: Width of the input.
        bound: What no accumulator exceeds in magnitude, bias included, for any input codes.
    """

    weight: Tensor
    bias: Tensor | None
    steps: list[float]
    scale_x: float
    bits_x: int
    bound: float

    @property
    def product(self) -> float:
        """Step of the accumulator, the coarsest of its outputs."""
        return self.scale_x * max(self.steps)

    def exact_in_float32(self, site: Site, result: Target | IntegerResult | None = None) -> bool:
        """Whether float32 holds every accumulator, and what rounding to ``result`` adds to it."""
        if torch.get_float32_matmul_precision() != "highest" and site.widest_operand > 8:
            return False
        extra = 0.0
        if result is not None and result.bits > WIDEST_OPERAND:
            extra = self.bound + 1.0  # a half on the accumulator itself takes a bit of its own
        elif result is not None and result.scale:
            # Codes are shifted to start at zero, and a half is added.
            offset = (2.0 ** (result.bits - 1) + 0.5) * result.scale
            extra = offset / (self.scale_x * min(self.steps))
        return self.bound + extra < EXACT_FLOAT32


@dataclass(frozen=True)
class _Cached:
    codes: Codes
    validity: tuple[Any, ...]
    source: Tensor | None


@dataclass(frozen=True)
class Projection:
    """A linear map inside an op: ``x [..., K] -> x W^T + b [..., O]``.

    The weight is rounded to the site's weight grid, the bias to ``step_x * step_w``; range limits
    on weights and biases act before. In evaluation the codes are derived once.

    Args:
        name: Tells the projections of one site apart.
        weight: ``[O, K]``, a parameter or a part of one.
        bias: ``[O]`` or None.
        factor: Multiplies the result; the weight and the bias take it in before they are rounded.
    """

    name: str
    weight: Tensor
    bias: Tensor | None = None
    factor: float = 1.0

    # --- parameters ---------------------------------------------------------------------------

    def parameters(self, site: Site, step_x: Scalar | None = None) -> Parameters:
        """Return the parameters in effect as real values that carry gradients.

        Args:
            site: The site.
            step_x: Step of the input; None for limits without quantization.
        """
        weight = full(self.weight)
        bias = None if self.bias is None else full(self.bias)
        limits = site.active_limits
        if limits is not None:
            weight = limited(weight, limits.weight, limits.gradient)
            bias = limited(bias, limits.bias, limits.gradient) if bias is not None else None
        if self.factor != 1.0:
            weight = weight * self.factor
            bias = None if bias is None else bias * self.factor
        grid = site.weights.grid
        if step_x is None or grid is None or site.config is None:
            return Parameters(weight, bias)
        finest = finest_for_bias(bias, step_x, site.config.bias_bits)
        own = weight.detach()
        per_channel = site.granularity == "channel"
        rows = own.flatten(1) if per_channel else own.reshape(1, -1)
        step_w = site.weights.held(self.name, weight_step(site, rows, finest, self.name))
        steps = step_w
        vector = False
        if isinstance(step_w, Tensor) and step_w.dim() > 0:
            steps, vector = step_w.view(-1, 1), True
        rounding = site.weight_rounding(self.name)
        limits_w = (grid.qmin, grid.qmax)
        learned = site.weights.learned_scale(self.name)
        if learned is not None and site.training:
            parameter = learned.value.view(-1, 1) if vector else learned.value
            weight = learned_on_grid(weight, steps, limits_w, rounding, learned, parameter)
        else:
            weight = on_grid(weight, steps, limits_w, rounding, site.weights.clips)
        site.note(self.name, self.weight, weight, step_w)
        if bias is not None:
            limits_b = float32_code_limits(site.config.bias_bits)
            bias = on_grid(bias, step_w * step_x, limits_b, grid.rounding)
            bias = site.with_rounded_gradient("bias", bias)
            site.note(f"{self.name} bias", self.bias, bias, step_w * step_x)
        return Parameters(site.with_rounded_gradient(self.name, weight), bias, step_w)

    def codes(self, site: Site, step_x: float, bits_x: int) -> Codes:
        """Return the parameters in effect as integers, in evaluation from the cache.

        Args:
            site: The site.
            step_x: Step of the input.
            bits_x: Width of the input.
        """
        key = self._key
        found: _Cached | None = site.prepared.get(key)
        if found is not None and (capturing() or self._is_valid(found, site, step_x)):
            return found.codes
        with torch.no_grad():
            parameters = self.parameters(site, step_x)
            step_w = torch.as_tensor(parameters.step)
            steps = step_w.view(-1, 1) if step_w.dim() else step_w
            weight = torch.round(parameters.weight / steps)
            bound = weight.double().abs().sum(dim=1) * 2.0 ** (bits_x - 1)
            bias = None
            if parameters.bias is not None:
                bias = torch.round(parameters.bias.double() / (step_w.double() * step_x))
                bound = bound + bias.abs()
            codes = Codes(
                weight=weight.to(payload_dtype(site.weights.bits)),
                bias=None if bias is None else bias.to(torch.int32),
                steps=[float(s) for s in step_w.flatten()],
                scale_x=step_x,
                bits_x=bits_x,
                bound=float(bound.max().item()),
            )
        if not site.training:
            source = self.weight.clone() if site.weight_is_computed else None
            site.prepared[key] = _Cached(codes, self._validity(site, step_x), source)
        return codes

    def has_codes(self, site: Site) -> bool:
        """Whether :meth:`codes` can answer: in a graph capture only from the cache."""
        return not capturing() or self._key in site.prepared

    @property
    def _key(self) -> str:
        return f"projection {self.name}"

    def _validity(self, site: Site, step_x: float) -> tuple[Any, ...]:
        tensors = [None if site.weight_is_computed else self.weight, self.bias]
        return (versions_of(tensors), step_x, site.switches.normalize)

    def _is_valid(self, found: _Cached, site: Site, step_x: float) -> bool:
        same_weight = found.source is None or torch.equal(found.source, self.weight)
        return same_weight and found.validity == self._validity(site, step_x)

    # --- the map ------------------------------------------------------------------------------

    def run(self, site: Site, x: Tensor, output: Quantizer) -> Tensor:
        """Map a tagged tensor in the number system of the moment, and round the result.

        Args:
            site: The site.
            x: Tagged, ``[..., K]``.
            output: Quantizer of the result, e.g. a part of the site.

        Returns:
            Tagged ``[..., O]``.
        """
        tag = tag_held_by(x)
        if self._stays_real(site):
            y, product = self._real(site, x, tag.step)
            if site.learning:
                output.observe(y)
            return output.round(y, output.step(minimum_step(site, product)), tag.dtype)
        codes = self.codes(site, float(tag.step), tag.bits)

        def real(value: Tensor) -> Tensor:
            return self._real(site, value, tag.step)[0]

        def kernel(target: Target, coded: Tensor) -> Tensor:
            return self._integer(site, coded, codes, target)

        finest = minimum_step(site, codes.product)
        sources = (self.weight, self.bias)
        return run_kernel(site, output, [x], real, kernel, finest, sources=sources)

    def run_float(self, site: Site, x: Tensor) -> Tensor:
        """Map a plain tensor to the site's own result, limited and not quantized."""
        parameters = self.parameters(site)
        y = F.linear(x, parameters.weight, parameters.bias)
        return finish(site, y, None, False, y.dtype)

    def run_last(self, site: Site, x: Tensor) -> Tensor:
        """Map a tagged tensor to the site's own result.

        That is what a layer gives: rounded by ``site.output``, real values where the site has
        none, or the 32-bit accumulator; the site's output limit applies.
        """
        tag = tag_held_by(x)
        if self._stays_real(site):
            y, product = self._real(site, x, tag.step)
            return finish(site, y, product, True, tag.dtype)
        codes = self.codes(site, float(tag.step), tag.bits)
        result = integer_result(site, codes.product, tag)
        with without_gradients(site):
            y = self._integer(site, integer_codes(x), codes, result)
        return finish_codes(site, y, result, tag.dtype, lambda: self._real(site, x, tag.step)[0])

    def _stays_real(self, site: Site) -> bool:
        """Whether to compute on real values, as layers do in training."""
        if site.switches.system == "integer":
            return False
        return site.training or not self.has_codes(site)

    def _real(self, site: Site, x: Tensor, step_x: Scalar) -> tuple[Tensor, Scalar | None]:
        """Return the map of real values, and the (coarsest) step of its accumulator."""
        parameters = self.parameters(site, step_x)
        y = F.linear(full(x), parameters.weight, parameters.bias)
        product = None if parameters.step is None else step_x * parameters.step
        return y, product.amax() if isinstance(product, Tensor) else product

    def _integer(
        self, site: Site, x: Tensor, codes: Codes, result: Target | IntegerResult
    ) -> Tensor:
        return integer_linear(
            x,
            codes.weight,
            codes.bias,
            codes.scale_x,
            codes.steps,
            result.scale,
            codes.bits_x,
            site.weights.bits,
            result.bits,
            result.low,
            result.high,
            site.rounding,
            site.platform_name,
            codes.exact_in_float32(site, result),
        )
