"""The switch between whole sequences at once and step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from lightning_linger.core.capture import capturing

if TYPE_CHECKING:
    from lightning_linger.core.sites import Site

_OVERRIDE: ContextVar[bool | None] = ContextVar("lightning_linger_fused_rnn", default=None)


@contextlib.contextmanager
def fused_rnn(enabled: bool) -> Iterator[None]:
    """Run recurrent layers fused, or step by step, while the context is open.

    Fused, a layer multiplies its whole input sequence with the input weights in one matrix product
    and steps through time for the recurrent part only. Step by step, each time step does all of its
    own work: slower, but it holds one step of gates instead of all of them. Both give the same bits
    in fake-quant and in integers, and agree to rounding in the constrained float stage; a float
    model without any stage runs PyTorch's own kernel, which no switch changes.

    It takes precedence over :attr:`QuantConfig.fused_rnn`, for the calls made inside the context by
    this thread or task. What was in effect before comes back at its end, so contexts nest. A graph
    capture takes the configuration's value.

    Args:
        enabled: Whether to fuse.
    """
    token = _OVERRIDE.set(bool(enabled))
    try:
        yield
    finally:
        _OVERRIDE.reset(token)


def is_fused(site: Site) -> bool:
    """Whether a site runs fused now."""
    override = None if capturing() else _OVERRIDE.get()
    if override is not None:
        return override
    return site.config is None or site.config.fused_rnn
