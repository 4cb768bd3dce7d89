"""Dropout, which an integer model does not have."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.registry import Op, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of, with_tag


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


register(DropoutOp("dropout"), "dropout", "dropout1d", "dropout2d", "dropout3d")
