"""Ops that only move values, drop some, or fill in constants: tags pass through."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.integer import code_limits
from lightning_linger.core.registry import Op, register
from lightning_linger.core.rounding import round_value
from lightning_linger.core.sites import Site, integer_codes
from lightning_linger.core.tags import tag_of, with_tag

# op -> the functions that mean it
MOVEMENTS: dict[str, tuple[str, ...]] = {
    "flatten": ("flatten",),
    "unflatten": ("unflatten",),
    "reshape": ("reshape", "reshape_as"),
    "view": ("view", "view_as"),
    "permute": ("permute",),
    "transpose": ("transpose", "swapaxes", "swapdims", "t", "movedim", "moveaxis"),
    "squeeze": ("squeeze",),
    "unsqueeze": ("unsqueeze",),
    "slice": ("__getitem__", "select", "narrow", "index_select"),
    "chunk": ("chunk", "tensor_split"),
    "split": ("split", "split_with_sizes", "unbind"),
    "contiguous": ("contiguous", "clone", "detach"),
}
# Spelled as an attribute rather than a call.
PROPERTIES: dict[str, tuple[str, ...]] = {"transpose": ("T", "mT", "H", "mH")}


class MovementOp(Op):
    """Rearranges values; has no site."""

    has_site = False


class DropoutCall(NamedTuple):
    """Bound arguments of ``F.dropout`` and its relatives."""

    input: Tensor
    p: float = 0.5
    training: bool = True


class DropoutOp(Op):
    """Dropout stays as PyTorch has it: active in training, nothing in evaluation.

    A training value is scaled by ``1 / (1 - p)`` and keeps its tag: what a consumer sees in
    evaluation is on the grid.
    """

    output_scale = "inputs"

    def bind(self, *args: Any, **kwargs: Any) -> DropoutCall:
        """Bind ``(input, p, training)``."""
        kwargs.pop("inplace", None)
        return DropoutCall(*args[:3], **kwargs)

    def run_fake(self, site: Site, call: DropoutCall) -> Any:
        """Drop in training, pass in evaluation."""
        tag = tag_of(call.input)
        if tag is None:
            return NotImplemented
        if not call.training:
            return call.input
        function = getattr(F, site.node.function)
        return with_tag(function(call.input, call.p, True), tag)

    def run_integer(self, site: Site, call: DropoutCall) -> Any:
        """Pass: the integer model does not drop."""
        return call.input if tag_of(call.input) is not None else NotImplemented


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
        tag = tag_of(call.input)
        assert tag is not None
        low, high = code_limits(tag.bits)
        return max(low, min(high, round_value(call.value / step, site.rounding)))

    def _pad(self, call: PadCall, x: Tensor, value: float) -> Tensor:
        if call.mode == "constant":
            return F.pad(x, call.pad, value=value)
        if x.dtype.is_floating_point:
            return F.pad(x, call.pad, mode=call.mode)
        return F.pad(x.float(), call.pad, mode=call.mode).to(x.dtype)


for _kind, _names in MOVEMENTS.items():
    register(MovementOp(_kind), *_names, properties=PROPERTIES.get(_kind, ()))
register(DropoutOp("dropout"), "dropout", "dropout1d", "dropout2d", "dropout3d")
register(PadOp("pad"), "pad", "constant_pad_nd")
