"""``F.scaled_dot_product_attention``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.payload import real_values
from lightning_linger.core.platform import Platform
from lightning_linger.core.registry import Op, Part
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import with_tag_of
from lightning_linger.ops.attention.steps import (
    PROBABILITIES,
    SCORES,
    Mask,
    causally_blocked,
    dropped,
    masked_scores,
    probabilities_of,
)
from lightning_linger.ops.kernel import in_full_precision
from lightning_linger.ops.matmul import last_product


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
            k, v = (
                with_tag_of(x, x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)) for x in (k, v)
            )
        factor = 1.0 / math.sqrt(q.shape[-1]) if call.scale is None else float(call.scale)
        mask = Mask()
        if call.is_causal:
            mask = Mask(blocked=causally_blocked(site, q.shape[-2], k.shape[-2], q.device))
        elif call.attn_mask is not None:
            given: Tensor = call.attn_mask
            boolean = given.dtype == torch.bool
            mask = Mask(given.logical_not()) if boolean else Mask(added=real_values(given))
        with in_full_precision(site, q):
            scores = masked_scores(site, q, k, factor, mask)
            weights = dropped(site, probabilities_of(site, scores), call.dropout_p)
            return last_product(site, weights, v)
