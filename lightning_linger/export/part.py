"""A part of a model that is called on its own, as a step that calls ``self.net(x)`` does."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_linger.core.instrumentation import STATE_NAME


class Part(nn.Module):
    """A submodule with the quantization state of the whole model.

    Args:
        root: The prepared model.
        part: The submodule that is called.
    """

    def __init__(self, root: nn.Module, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        setattr(self, STATE_NAME, getattr(root, STATE_NAME))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the part."""
        return self.part(*args, **kwargs)


def as_root(root: nn.Module, part: nn.Module) -> nn.Module:
    """Return what is called as a model of its own; the model itself if that is called."""
    return part if part is root else Part(root, part)
