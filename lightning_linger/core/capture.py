"""Whether a graph capture is running, in which values cannot be read."""

import contextlib

import torch
from torch import Tensor

_NOTHING = contextlib.nullcontext()


def capturing() -> bool:
    """Whether ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` records this forward."""
    tracing: bool = torch._C._get_tracing_state() is not None
    return tracing or torch.compiler.is_compiling()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    """Return a context in which autocast is off; entering costs nothing where it is off already."""
    if capturing() or torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING


def can_read(x: Tensor) -> bool:
    """Whether reading a value of ``x`` is cheap: not on a GPU, not in a capture."""
    return x.device.type == "cpu" and not capturing()
