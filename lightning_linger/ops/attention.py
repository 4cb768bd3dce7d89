"""Attention: one call of the model, several quantized steps inside.

==================  ==========================================================================
scores              ``q @ k^T * scale``, a mask added or filled in
probabilities       softmax, range 1
context             ``probabilities @ v``
==================  ==========================================================================

``scale`` costs no step of its own where the target multiplies when it rescales, or where it is a
power of two: it goes into the step of ``q``. Else ``q`` is multiplied by a constant of its own
width first; a projection in front of the scores takes it into its weight instead.

Masked places get the lowest code of the scores, which lies far enough below all others for a
probability of zero (see :mod:`lightning_linger.ops.select`). Where a whole row is masked the result
is the mean of the values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.integer import (
    code_limits,
    divide_by_scale,
    integer_op,
    is_power_of_two,
    payload_dtype,
)
from lightning_linger.core.limits import limited
from lightning_linger.core.payload import real_values
from lightning_linger.core.platform import Platform
from lightning_linger.core.registry import Op, Part, register
from lightning_linger.core.rounding import ROUNDINGS
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_of, with_tag
from lightning_linger.ops.kernel import Target, in_full_precision, run_kernel, run_on_grid
from lightning_linger.ops.matmul import last_product, product
from lightning_linger.ops.mul import integer_mul
from lightning_linger.ops.pool import integer_mean
from lightning_linger.ops.projection import Projection
from lightning_linger.ops.select import FLOAT_LIMIT, INFINITE, integer_masked_fill, kept_range
from lightning_linger.ops.softmax import integer_softmax

SCORES, PROBABILITIES, CONTEXT = "scores", "probabilities", "context"
_PROJECTED = ("query", "key", "value")


# --- integer kernel -------------------------------------------------------------------------


@integer_op("linger::add_mask")
def integer_add_mask(
    x: Tensor, mask: Tensor, scale: float, bits: int, rounding: str, platform: str
) -> Tensor:
    """Add a mask of real values to codes, at their scale.

    A place of the mask at -1000 or below becomes the lowest code. Every other one is rounded to the
    scale and saturated, then added with saturation.

    Args:
        x: Codes.
        mask: Real values that broadcast to ``x``.
        scale: Step of ``x`` and of the result.
        bits: Width of both.
        rounding: Rounding rule.
        platform: Name of the target.
    """
    low, high = code_limits(bits)
    added = ROUNDINGS[rounding](divide_by_scale(mask.float(), scale)).clamp_(low, high)
    total = (x.float() + added).clamp_(low, high)
    return torch.where(mask <= -INFINITE, low, total).to(payload_dtype(bits))


@integer_add_mask.register_fake
def _(x: Tensor, mask: Tensor, scale: float, bits: int, rounding: str, platform: str) -> Tensor:
    return torch.empty_like(x)


# --- steps ----------------------------------------------------------------------------------


class Mask(NamedTuple):
    """What keeps scores from counting.

    Args:
        blocked: Boolean, true where a score does not count, or None.
        added: Real values to add to the scores, or None.
    """

    blocked: Tensor | None = None
    added: Tensor | None = None

    def hidden(self) -> Tensor | None:
        """Return where a score does not count."""
        if self.added is None:
            return self.blocked
        infinite = self.added <= -INFINITE
        return infinite if self.blocked is None else infinite | self.blocked


def masked_scores(site: Site, q: Tensor, k: Tensor, factor: float, mask: Mask) -> Tensor:
    """Return the tagged scores ``q @ k^T * factor``, masked.

    Args:
        site: The site, which has the part ``scores``.
        q: Tagged ``[..., L, E]``.
        k: Tagged ``[..., S, E]``.
        factor: See the module.
        mask: See the class.
    """
    if factor != 1.0 and not (is_power_of_two(factor) or _multiplies(site)):
        q, factor = _scaled(site, q, factor), 1.0

    def observe(scores: Tensor) -> Tensor:
        hidden = mask.hidden()
        if mask.added is not None:
            scores = torch.stack([scores, scores + mask.added])
        return scores if hidden is None else kept_range(scores, hidden, site.part(SCORES).grid.bits)

    scores = product(site, q, _carry(k, k.mT), site.part(SCORES), factor, observe)
    if mask.added is not None:
        scores = _add_mask(site, scores, mask.added)
    return scores if mask.blocked is None else _block(site, scores, mask.blocked)


def probabilities_of(site: Site, scores: Tensor) -> Tensor:
    """Return the tagged softmax of tagged scores over the last dimension."""
    tag = _tag(scores)
    dim = scores.dim() - 1

    def kernel(target: Target, codes: Tensor) -> Tensor:
        return integer_softmax(
            codes,
            dim,
            float(tag.step),
            tag.bits,
            target.scale,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )

    return run_kernel(site, site.part(PROBABILITIES), [scores], lambda x: x.softmax(dim), kernel)


def _dropped(site: Site, x: Tensor, p: float) -> Tensor:
    """Drop in training; what a consumer sees in evaluation is on the grid."""
    if p == 0.0 or not site.training or site.switches.system == "integer":
        return x
    return _carry(x, F.dropout(x, p, True))


def _scaled(site: Site, q: Tensor, factor: float) -> Tensor:
    """Multiply by a constant of the operand's width; no code saturates, and none is lost."""
    tag = _tag(q)
    whole = 2.0 ** math.ceil(math.log2(factor))
    unit = whole * 2.0 ** (1 - tag.bits)
    code = min(round(factor / unit), code_limits(tag.bits)[1])
    scaled = dataclasses.replace(
        tag,
        step=tag.step * whole,
        site=site.key,
        reach=None if tag.reach is None else tag.reach * factor,
    )

    def kernel(step: float, codes: Tensor) -> Tensor:
        constant = torch.full((), code, dtype=codes.dtype, device=codes.device)
        limits = code_limits(tag.bits)
        return integer_mul(
            codes,
            constant,
            float(tag.step),
            unit,
            step,
            tag.bits,
            *limits,
            site.rounding,
            site.platform_name,
        )

    return run_on_grid(site, [q], scaled, lambda: q * (code * unit), kernel)


def _add_mask(site: Site, scores: Tensor, mask: Tensor) -> Tensor:
    tag = dataclasses.replace(_tag(scores), site=site.key, reach=None)
    added = real_values(mask)

    def kernel(step: float, codes: Tensor) -> Tensor:
        return integer_add_mask(codes, added, step, tag.bits, site.rounding, site.platform_name)

    def real() -> Tensor:
        return scores + added.clamp(min=-FLOAT_LIMIT)

    return run_on_grid(site, [scores], tag, real, kernel)


def _block(site: Site, scores: Tensor, blocked: Tensor) -> Tensor:
    tag = dataclasses.replace(_tag(scores), site=site.key, reach=None)
    low, _ = code_limits(tag.bits)

    def kernel(step: float, codes: Tensor) -> Tensor:
        return integer_masked_fill(
            codes, blocked, low, step, step, tag.bits, site.rounding, site.platform_name
        )

    return run_on_grid(
        site, [scores], tag, lambda: scores.masked_fill(blocked, -FLOAT_LIMIT), kernel
    )


def _causal(site: Site, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return what a causal mask blocks; in evaluation the same tensor every time."""
    key = f"causal {rows} {columns} {device}"
    found: Tensor | None = site.prepared.get(key)
    if found is None:
        allowed = torch.ones(rows, columns, dtype=torch.bool, device=device).tril()
        found = allowed.logical_not()
        if not site.training:
            site.prepared[key] = found
    return found


def _multiplies(site: Site) -> bool:
    return site.platform is not None and site.platform.rescale == "multiply"


def _carry(source: Tensor, x: Tensor) -> Tensor:
    tag = tag_of(source)
    return x if tag is None else with_tag(x, tag)


def _tag(x: Tensor) -> Tag:
    tag = tag_of(x)
    assert tag is not None  # operands and parts are tagged
    return tag


# --- scaled_dot_product_attention -----------------------------------------------------------


class AttentionCall(NamedTuple):
    """Bound arguments of ``F.scaled_dot_product_attention``."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class AttentionOp(Op):
    """``F.scaled_dot_product_attention``; dropout acts in training only."""

    exact_with_free_scales = True

    def bind(self, *args: Any, **kwargs: Any) -> AttentionCall:
        """Bind the arguments of the function."""
        return AttentionCall(*args, **kwargs)

    def operands(self, call: AttentionCall) -> list[Any]:
        """Query, key and value."""
        return [call.query, call.key, call.value]

    def parts(
        self, call: AttentionCall, config: QuantConfig, platform: Platform
    ) -> dict[str, Part]:
        """The scores and the probabilities."""
        return {SCORES: Part(), PROBABILITIES: Part(range=1.0)}

    def obstacle(self, call: AttentionCall) -> str | None:
        """Two masks at once."""
        if call.is_causal and call.attn_mask is not None:
            return "`attn_mask` and `is_causal` in one call"
        if call.scale is not None and not call.scale > 0:
            return f"`scale` must be positive. Found: {call.scale}"
        return None

    def run_fake(self, site: Site, call: AttentionCall) -> Any:
        """Run the steps on the grid."""
        return self._run(site, call)

    def run_integer(self, site: Site, call: AttentionCall) -> Any:
        """Run the steps in integers."""
        return self._run(site, call)

    def _run(self, site: Site, call: AttentionCall) -> Any:
        q, k, v = (site.operand(i, x) for i, x in enumerate(self.operands(call)))
        if q is None or k is None or v is None:
            return NotImplemented
        if call.enable_gqa and q.dim() > 2:
            k, v = (_carry(x, x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)) for x in (k, v))
        factor = 1.0 / math.sqrt(q.shape[-1]) if call.scale is None else float(call.scale)
        mask = Mask()
        if call.is_causal:
            mask = Mask(blocked=_causal(site, q.shape[-2], k.shape[-2], q.device))
        elif call.attn_mask is not None:
            given: Tensor = call.attn_mask
            boolean = given.dtype == torch.bool
            mask = Mask(given.logical_not()) if boolean else Mask(added=real_values(given))
        with in_full_precision(site, q):
            scores = masked_scores(site, q, k, factor, mask)
            weights = _dropped(site, probabilities_of(site, scores), call.dropout_p)
            return last_product(site, weights, v)


# --- multi_head_attention_forward -----------------------------------------------------------


class MultiHeadCall(NamedTuple):
    """Bound arguments of ``F.multi_head_attention_forward``, in its order."""

    query: Any
    key: Any
    value: Any
    embed_dim_to_check: int
    num_heads: int
    in_proj_weight: Any
    in_proj_bias: Any
    bias_k: Any
    bias_v: Any
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: Any
    out_proj_bias: Any
    training: bool = True
    key_padding_mask: Any = None
    need_weights: bool = True
    attn_mask: Any = None
    use_separate_proj_weight: bool = False
    q_proj_weight: Any = None
    k_proj_weight: Any = None
    v_proj_weight: Any = None
    static_k: Any = None
    static_v: Any = None
    average_attn_weights: bool = True
    is_causal: bool = False


_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class MultiHeadAttentionOp(Op):
    """``F.multi_head_attention_forward``: what ``nn.MultiheadAttention`` calls.

    The projections of query, key and value have a weight grid and a range each, also where one
    packed parameter holds them. The attention weights that the function returns lie on the grid of
    the probabilities, their average over heads too.
    """

    needs_quantized_operand = False
    has_parameters = True
    exact_with_free_scales = True

    def bind(self, *args: Any, **kwargs: Any) -> MultiHeadCall:
        """Bind the arguments of the function."""
        return MultiHeadCall(*args, **kwargs)

    def operands(self, call: MultiHeadCall) -> list[Any]:
        """Query, key and value; those that are one tensor count once."""
        found: list[Any] = []
        for x in (call.query, call.key, call.value):
            if not any(_same(x, other) for other in found):
                found.append(x)
        return found

    def parameters(self, call: MultiHeadCall) -> list[Any]:
        """The weights of the projections."""
        names = _SEPARATE if call.use_separate_proj_weight else ("in_proj_weight",)
        return [*(getattr(call, name) for name in names), call.out_proj_weight]

    def learned_weights(self, call: MultiHeadCall) -> Mapping[str, int | None]:
        """Those of the projections, which are as wide as the model."""
        width = call.out_proj_weight.shape[1]
        return {**dict.fromkeys(_PROJECTED, width), "output": call.out_proj_weight.shape[0]}

    def parts(
        self, call: MultiHeadCall, config: QuantConfig, platform: Platform
    ) -> dict[str, Part]:
        """What the projections give, the scores, the probabilities and the context."""
        observed = {name: Part() for name in (*_PROJECTED, SCORES, CONTEXT)}
        return {**observed, PROBABILITIES: Part(range=1.0)}

    def obstacle(self, call: MultiHeadCall) -> str | None:
        """Rarely used forms."""
        if call.bias_k is not None or call.bias_v is not None:
            return "attention with `add_bias_kv` has no integer form"
        if call.add_zero_attn:
            return "attention with `add_zero_attn` has no integer form"
        if call.static_k is not None or call.static_v is not None:
            return "attention with `static_k` or `static_v` has no integer form"
        return None

    def run_float(self, site: Site, call: MultiHeadCall) -> Any:
        """Limit the weights, the biases and the result."""
        limits = site.active_limits
        if limits is None:
            return NotImplemented
        found = {}
        for name in ("in_proj_weight", "out_proj_weight", *_SEPARATE):
            weight = getattr(call, name)
            found[name] = (
                weight if weight is None else limited(weight, limits.weight, limits.gradient)
            )
        for name in ("in_proj_bias", "out_proj_bias"):
            bias = getattr(call, name)
            found[name] = bias if bias is None else limited(bias, limits.bias, limits.gradient)
        output, weights = F.multi_head_attention_forward(**{**call._asdict(), **found})
        return site.limit_output(output), weights

    def run_fake(self, site: Site, call: MultiHeadCall) -> Any:
        """Run the steps on the grid."""
        return self._run(site, call)

    def run_integer(self, site: Site, call: MultiHeadCall) -> Any:
        """Run the steps in integers."""
        return self._run(site, call)

    def _run(self, site: Site, call: MultiHeadCall) -> Any:
        inputs = self._inputs(site, call)
        if inputs is None:
            return NotImplemented
        batched = inputs[0].dim() == 3
        if not batched:
            inputs = [_carry(x, x.unsqueeze(1)) for x in inputs]
        with in_full_precision(site, inputs[0]):
            projections = self._projections(call)
            q, k, v = (
                _heads(projection.run(site, x, site.part(projection.name)), call.num_heads)
                for projection, x in zip(projections, inputs, strict=True)
            )
            mask = _mask_of(site, call, q, k)
            scores = masked_scores(site, q, k, 1.0, mask)
            p = call.dropout_p if call.training else 0.0
            weights = _dropped(site, probabilities_of(site, scores), p)
            context = product(site, weights, v, site.part(CONTEXT))
            length, batch, width = inputs[0].shape[0], inputs[0].shape[1], context.shape[-1]
            rows = context.transpose(0, 1).reshape(length, batch, call.num_heads * width)
            last = Projection("output", call.out_proj_weight, call.out_proj_bias)
            output = last.run_last(site, _carry(context, rows))
        output = output if batched else _carry(output, output.squeeze(1))
        return output, _returned(site, weights, call, batch, batched)

    def _inputs(self, site: Site, call: MultiHeadCall) -> list[Tensor] | None:
        """Return query, key and value on their grids."""
        recorded = site.recorded_call
        distinct = self.operands(recorded)
        found: dict[int, Tensor] = {}
        inputs: list[Tensor] = []
        for name in _PROJECTED:
            spec, x = getattr(recorded, name), getattr(call, name)
            position = next(i for i, other in enumerate(distinct) if _same(spec, other))
            if position not in found:
                operand = site.operand(position, x)
                if operand is None:
                    return None
                found[position] = operand
            inputs.append(found[position])
        return inputs

    def _projections(self, call: MultiHeadCall) -> list[Projection]:
        width = call.out_proj_weight.shape[1]
        scale = 1.0 / math.sqrt(width // call.num_heads)
        if call.use_separate_proj_weight:
            weights = [getattr(call, name) for name in _SEPARATE]
        else:
            weights = [call.in_proj_weight[i * width : (i + 1) * width] for i in range(3)]
        biases: list[Any] = [None] * 3
        if call.in_proj_bias is not None:
            biases = [call.in_proj_bias[i * width : (i + 1) * width] for i in range(3)]
        return [
            Projection(name, weight, bias, scale if name == "query" else 1.0)
            for name, weight, bias in zip(_PROJECTED, weights, biases, strict=True)
        ]


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are one tensor, recorded or real."""
    return a is b or (
        not isinstance(a, Tensor) and not isinstance(b, Tensor) and a.value == b.value
    )


def _heads(x: Tensor, heads: int) -> Tensor:
    """Return ``[L, N, E]`` as ``[N * heads, L, E / heads]``."""
    length, batch, width = x.shape
    split = x.reshape(length, batch * heads, width // heads).transpose(0, 1)
    return _carry(x, split)


def _mask_of(site: Site, call: MultiHeadCall, q: Tensor, k: Tensor) -> Mask:
    """Bring both masks to the shape of the scores ``[N * heads, L, S]``."""
    batch, heads = q.shape[0] // call.num_heads, call.num_heads
    blocked: list[Tensor] = []
    added: list[Tensor] = []
    if call.is_causal and call.attn_mask is not None:
        # The hint promises that the mask is the causal one.
        blocked.append(_causal(site, q.shape[1], k.shape[1], q.device))
    elif call.attn_mask is not None:
        given: Tensor = call.attn_mask
        (blocked if given.dtype == torch.bool else added).append(real_values(given))
    padding: Tensor | None = call.key_padding_mask
    if padding is not None:
        spread = real_values(padding).view(-1, 1, 1, padding.shape[-1])
        spread = spread.expand(batch, heads, 1, -1).reshape(batch * heads, 1, -1)
        (blocked if padding.dtype == torch.bool else added).append(spread)
    return Mask(
        blocked[0] | blocked[1] if len(blocked) == 2 else next(iter(blocked), None),
        added[0] + added[1] if len(added) == 2 else next(iter(added), None),
    )


def _returned(
    site: Site, weights: Tensor, call: MultiHeadCall, batch: int, batched: bool
) -> Tensor | None:
    """Return the attention weights ``[N, L, S]``, or one per head, if they are asked for."""
    if not call.need_weights:
        return None
    heads = weights.reshape(batch, call.num_heads, *weights.shape[1:])
    found = _carry(weights, heads)
    if call.average_attn_weights:
        tag = dataclasses.replace(_tag(weights), site=site.key)

        def kernel(step: float, codes: Tensor) -> Tensor:
            return integer_mean(
                codes, [1], False, step, tag.bits, site.rounding, site.platform_name
            )

        found = run_on_grid(site, [found], tag, lambda: heads.mean(dim=1), kernel)
    return found if batched else _carry(found, found.squeeze(0))


register(AttentionOp("scaled_dot_product_attention"))
register(MultiHeadAttentionOp("multi_head_attention_forward"))
