"""Functions that stay float, and say why, so that reports show more than a missing name."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_linger.core.graph import TensorSpec
from lightning_linger.core.registry import Op


class RefusedCall(NamedTuple):
    """The arguments of a call that is not quantized."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class RefusedOp(Op):
    """A function without an integer form.

    Args:
        kind: Canonical op name.
        reason: Why, and what to write instead.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind)
        self.reason = reason

    def bind(self, *args: Any, **kwargs: Any) -> RefusedCall:
        """Keep the arguments as they are."""
        return RefusedCall(args, kwargs)

    def operands(self, call: RefusedCall) -> list[Any]:
        """All floating tensors."""
        found = [x for x in tree_leaves(tuple(call)) if isinstance(x, Tensor | TensorSpec)]
        return [x for x in found if not isinstance(x, TensorSpec) or x.floating]

    def obstacle(self, call: RefusedCall) -> str | None:
        """The reason."""
        return self.reason

    def run_fake(self, site: Any, call: RefusedCall) -> Any:
        """Stay plain."""
        return NotImplemented

    def run_integer(self, site: Any, call: RefusedCall) -> Any:
        """Stay plain."""
        return NotImplemented
