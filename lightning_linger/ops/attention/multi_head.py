"""``F.multi_head_attention_forward``: projections around attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.limits import limited
from lightning_linger.core.payload import real_values
from lightning_linger.core.platform import Platform
from lightning_linger.core.registry import Op, Part
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by, with_tag_of
from lightning_linger.ops.attention.steps import (
    PROBABILITIES,
    SCORES,
    Mask,
    causally_blocked,
    dropped,
    masked_scores,
    probabilities_of,
)
from lightning_linger.ops.kernel import in_full_precision, run_on_grid
from lightning_linger.ops.matmul import product
from lightning_linger.ops.mean import integer_mean
from lightning_linger.ops.projection import Projection

CONTEXT = "context"
_PROJECTED = ("query", "key", "value")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


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
            inputs = [with_tag_of(x, x.unsqueeze(1)) for x in inputs]
        with in_full_precision(site, inputs[0]):
            projections = self._projections(call)
            q, k, v = (
                _heads(projection.run(site, x, site.part(projection.name)), call.num_heads)
                for projection, x in zip(projections, inputs, strict=True)
            )
            mask = _mask_of(site, call, q, k)
            scores = masked_scores(site, q, k, 1.0, mask)
            p = call.dropout_p if call.training else 0.0
            weights = dropped(site, probabilities_of(site, scores), p)
            context = product(site, weights, v, site.part(CONTEXT))
            length, batch, width = inputs[0].shape[0], inputs[0].shape[1], context.shape[-1]
            rows = context.transpose(0, 1).reshape(length, batch, call.num_heads * width)
            last = Projection("output", call.out_proj_weight, call.out_proj_bias)
            output = last.run_last(site, with_tag_of(context, rows))
        output = output if batched else with_tag_of(output, output.squeeze(1))
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
    return with_tag_of(x, split)


def _mask_of(site: Site, call: MultiHeadCall, q: Tensor, k: Tensor) -> Mask:
    """Bring both masks to the shape of the scores ``[N * heads, L, S]``."""
    batch, heads = q.shape[0] // call.num_heads, call.num_heads
    blocked: list[Tensor] = []
    added: list[Tensor] = []
    if call.is_causal and call.attn_mask is not None:
        # The hint promises that the mask is the causal one.
        blocked.append(causally_blocked(site, q.shape[1], k.shape[1], q.device))
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
    found = with_tag_of(weights, heads)
    if call.average_attn_weights:
        tag = tag_held_by(weights).at(site.key)

        def kernel(step: float, codes: Tensor) -> Tensor:
            return integer_mean(
                codes, [1], False, step, tag.bits, site.rounding, site.platform_name
            )

        found = run_on_grid(site, [found], tag, lambda: heads.mean(dim=1), kernel)
    return found if batched else with_tag_of(found, found.squeeze(0))
