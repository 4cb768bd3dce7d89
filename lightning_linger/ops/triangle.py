"""``tril`` and ``triu``: zeros on one side of a diagonal."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.payload import integer_codes
from lightning_linger.core.registry import Op, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of, with_tag
from lightning_linger.ops.arguments import refused_arguments
from lightning_linger.ops.select import integer_masked_fill


class TriangleCall(NamedTuple):
    """Bound arguments of ``torch.tril`` and ``torch.triu``."""

    input: Tensor
    diagonal: int = 0
    refused: str | None = None


class TriangleOp(Op):
    """``tril`` and ``triu``.

    Args:
        kind: Canonical op name.
    """

    output_scale = "inputs"

    def bind(self, input: Tensor, diagonal: int = 0, **kwargs: Any) -> TriangleCall:
        """Bind ``(input, diagonal)``."""
        return TriangleCall(input, diagonal, refused_arguments(kwargs))

    def obstacle(self, call: TriangleCall) -> str | None:
        """``out=`` writes where nothing is on a grid."""
        return call.refused

    def run_fake(self, site: Site, call: TriangleCall) -> Any:
        """Put zeros, which are on every grid."""
        tag = tag_of(call.input)
        if tag is None:
            return NotImplemented
        return with_tag(self._cut(call.input, call.diagonal), tag)

    def run_integer(self, site: Site, call: TriangleCall) -> Any:
        """Call ``linger::masked_fill``."""
        tag = tag_of(call.input)
        if tag is None:
            return NotImplemented
        codes, step = integer_codes(call.input), float(tag.step)
        kept = self._cut(
            torch.ones(codes.shape[-2:], dtype=torch.bool, device=codes.device), call.diagonal
        )
        filled = integer_masked_fill(
            codes, ~kept, 0, step, step, tag.bits, site.rounding, site.platform_name
        )
        return with_tag(filled, tag)

    def _cut(self, x: Tensor, diagonal: int) -> Tensor:
        return torch.tril(x, diagonal) if self.kind == "tril" else torch.triu(x, diagonal)


for _kind in ("tril", "triu"):
    register(TriangleOp(_kind))
