"""``adaptive_max_pool*d``, whose windows may differ in size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.payload import integer_codes
from lightning_linger.core.registry import Op, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of, with_tag
from lightning_linger.ops.pool import integer_max_pool

_POOLS: dict[int, Any] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}


class AdaptiveCall(NamedTuple):
    """Bound arguments of an adaptive pool; sizes have one entry per spatial dimension."""

    input: Tensor
    size: tuple[int, ...]
    refused: str | None = None


class AdaptiveMaxPoolOp(Op):
    """``adaptive_max_pool*d``.

    In integers, values are repeated until all windows have one size, which changes no maximum.

    Args:
        kind: Canonical op name.
        dims: Number of spatial dimensions.
    """

    output_scale = "inputs"

    def __init__(self, kind: str, dims: int) -> None:
        super().__init__(kind)
        self.dims = dims

    def bind(self, input: Tensor, output_size: Any, return_indices: bool = False) -> AdaptiveCall:
        """Bind the arguments of ``F.adaptive_max_pool*d``."""
        sizes = tuple(int(n) for n in input.shape[-self.dims :])
        given = output_size if isinstance(output_size, tuple | list) else (output_size,) * self.dims
        wanted = tuple(n if o is None else int(o) for n, o in zip(sizes, given, strict=True))
        refused = "indices have no integer form" if return_indices else None
        return AdaptiveCall(input, wanted, refused)

    def obstacle(self, call: AdaptiveCall) -> str | None:
        """Indices are not a quantized value."""
        return call.refused

    def run_fake(self, site: Site, call: AdaptiveCall) -> Any:
        """Pool; maxima of grid values are on the grid."""
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None:
            return NotImplemented
        return with_tag(_POOLS[self.dims](x, call.size), tag)

    def run_integer(self, site: Site, call: AdaptiveCall) -> Any:
        """Call ``linger::max_pool``."""
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None:
            return NotImplemented
        codes, kernel = integer_codes(x), []
        for dim, target in zip(range(-self.dims, 0), call.size, strict=True):
            windows = adaptive_windows(codes.shape[dim], target)
            kernel.append(len(windows[0]))
            places = [place for window in windows for place in window]
            if places != list(range(codes.shape[dim])):
                codes = codes.index_select(dim, torch.tensor(places, device=codes.device))
        still = [0] * self.dims
        pooled = integer_max_pool(
            codes, kernel, kernel, still, [1] * self.dims, False, site.platform_name
        )
        return with_tag(pooled, tag)


def adaptive_windows(source: int, target: int) -> list[Sequence[int]]:
    """Return the places that each window covers; the last one of a shorter window is repeated."""
    edges = [
        (place * source // target, -(-(place + 1) * source // target)) for place in range(target)
    ]
    longest = max(end - start for start, end in edges)
    return [[min(start + i, end - 1) for i in range(longest)] for start, end in edges]


for _dims in _POOLS:
    _kind = f"adaptive_max_pool{_dims}d"
    register(AdaptiveMaxPoolOp(_kind, _dims), _kind, f"{_kind}_with_indices")
