"""Padding: with the nearest code of a number, or with the values that are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.payload import integer_codes
from lightning_linger.core.registry import Op, register
from lightning_linger.core.rounding import round_value
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by, tag_of, with_tag


class PadCall(NamedTuple):
    """Bound arguments of ``F.pad``."""

    input: Tensor
    pad: tuple[int, ...]
    mode: str = "constant"
    value: float | None = None


class PadOp(Op):
    """``pad``: a constant takes the nearest code of the input's grid."""

    output_scale = "inputs"

    def bind(self, *args: Any, **kwargs: Any) -> PadCall:
        """Bind ``F.pad`` or ``torch.constant_pad_nd``."""
        if len(args) == 3 and not isinstance(args[2], str):  # constant_pad_nd(x, pad, value)
            args = (args[0], args[1], "constant", args[2])
        return PadCall(*args, **kwargs)

    def run_fake(self, site: Site, call: PadCall) -> Any:
        """Pad with a value on the grid."""
        tag = tag_of(call.input)
        if tag is None:
            return NotImplemented
        step = float(tag.step) if call.value else 1.0
        return with_tag(self._pad(call, call.input, self._code(site, call, step) * step), tag)

    def run_integer(self, site: Site, call: PadCall) -> Any:
        """Pad with a code."""
        tag = tag_of(call.input)
        if tag is None:
            return NotImplemented
        code = self._code(site, call, float(tag.step))
        return with_tag(self._pad(call, integer_codes(call.input), code), tag)

    def _code(self, site: Site, call: PadCall, step: float) -> int:
        if not call.value:
            return 0
        tag = tag_held_by(call.input)
        low, high = (int(code) for code in tag.limits)
        return round_value(max(low, min(high, call.value / step)), site.rounding)

    def _pad(self, call: PadCall, x: Tensor, value: float) -> Tensor:
        if x.dtype.is_floating_point:
            return F.pad(x, call.pad, call.mode, value if call.mode == "constant" else None)
        if call.mode != "constant":
            return padded_codes(x, call.pad, call.mode)
        for dim, (before, behind) in enumerate(_sides(call.pad), start=1):
            first, count = max(-before, 0), x.shape[-dim] + min(before, 0) + min(behind, 0)
            x = x.narrow(-dim, first, count) if count < x.shape[-dim] else x
        return F.pad(x, [max(side, 0) for side in call.pad], value=value)


def padded_codes(x: Tensor, pad: Sequence[int], mode: str) -> Tensor:
    """Pad with what is there: torch has it for floating tensors only.

    Args:
        x: Codes.
        pad: As in ``F.pad``: in front and behind, from the last dimension on.
        mode: ``reflect``, ``replicate`` or ``circular``.
    """
    for dim, (before, behind) in enumerate(_sides(pad), start=1):
        if before or behind:
            size = x.shape[-dim]
            places = [_place(i, size, mode) for i in range(-before, size + behind)]
            x = x.index_select(-dim, torch.tensor(places, device=x.device))
    return x


def _sides(pad: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(pad[::2], pad[1::2], strict=True))


def _place(position: int, size: int, mode: str) -> int:
    """Return which value stands at a position that may lie outside."""
    if mode == "circular":
        return position % size
    if mode == "reflect":
        position = abs(position)
        return min(position, 2 * (size - 1) - position)
    return min(max(position, 0), size - 1)


register(PadOp("pad"), "pad", "constant_pad_nd")
