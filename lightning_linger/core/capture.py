"""Whether a graph capture is running, in which values cannot be read."""

import torch
from torch import Tensor


def capturing() -> bool:
    """Whether ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` records this forward."""
    tracing: bool = torch._C._get_tracing_state() is not None
    return tracing or torch.compiler.is_compiling()


def can_read(x: Tensor) -> bool:
    """Whether reading a value of ``x`` is cheap: not on a GPU, not in a capture."""
    return x.device.type == "cpu" and not capturing()
