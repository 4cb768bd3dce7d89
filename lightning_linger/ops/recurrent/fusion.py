"""The switch between whole sequences at once, step by step, and compiled steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from lightning_linger.core.capture import capturing
from lightning_linger.core.config import RNNFusion, check_fusion

if TYPE_CHECKING:
    from lightning_linger.core.sites import Site

_OVERRIDE: ContextVar[RNNFusion | None] = ContextVar("lightning_linger_fused_rnn", default=None)
# How a loop is run is no argument of an integer op: it changes no bit of the result.
_COMPILED: ContextVar[bool] = ContextVar("lightning_linger_compiled_rnn", default=False)


@contextlib.contextmanager
def fused_rnn(enabled: RNNFusion) -> Iterator[None]:
    """Run recurrent layers fused, step by step, or compiled, while the context is open.

    Fused, a layer multiplies its whole input sequence with the input weights in one matrix product
    and steps through time for the recurrent part only. Step by step, each time step does all of its
    own work: slower, but it holds one step of gates instead of all of them. Both give the same bits
    in fake-quant and in integers, and agree to rounding in the constrained float stage; a float
    model without any stage runs PyTorch's own kernel, which no switch changes.

    Compiled, they run fused, and a time step on codes is one compiled function: the same bits
    again. Compiling takes seconds for each layer shape, and needs what ``torch.compile`` needs, a
    C++ compiler on a CPU; where it fails, a warning says why and the steps run as they are. So do
    packed sequences of different lengths, single cells, layers with free scales outside of
    ``linger.integer``, and the constrained float stage. A hidden state that moves to another step
    in training is compiled again.

    It takes precedence over :attr:`QuantConfig.fused_rnn`, for the calls made inside the context by
    this thread or task. What was in effect before comes back at its end, so contexts nest. A graph
    capture takes the configuration's value, and compiles nothing.

    Args:
        enabled: Whether to fuse, or ``"compiled"``.

    Raises:
        ConfigError: If it is anything else.
    """
    token = _OVERRIDE.set(check_fusion(enabled))
    try:
        yield
    finally:
        _OVERRIDE.reset(token)


def is_fused(site: Site) -> bool:
    """Whether a site runs fused now."""
    return _asked(site) is not False


def is_compiled(site: Site) -> bool:
    """Whether a site's steps are to be compiled now."""
    return not capturing() and _asked(site) == "compiled"


def _asked(site: Site) -> RNNFusion:
    override = None if capturing() else _OVERRIDE.get()
    if override is not None:
        return override
    return True if site.config is None else site.config.fused_rnn


@contextlib.contextmanager
def compiling_steps() -> Iterator[None]:
    """Let loops over time compile their steps."""
    token = _COMPILED.set(True)
    try:
        yield
    finally:
        _COMPILED.reset(token)


def compiles_steps() -> bool:
    """Whether a loop over time is to compile its steps."""
    return _COMPILED.get()
