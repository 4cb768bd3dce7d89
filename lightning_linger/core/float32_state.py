"""Modules whose state follows the model to its device, and stays float32 on the way."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound="Float32State")


class Float32State(nn.Module):
    """A module whose own parameters and buffers keep their type in ``half()`` and ``to(dtype)``.

    Ranges, steps and bounds are float32 in models of every type: half precision would round a
    power of two away, or overflow.
    """

    def _apply(self: ModuleT, fn: Any, recurse: bool = True) -> ModuleT:
        parameters = {
            name: parameter.data
            for name, parameter in self._parameters.items()
            if parameter is not None
        }
        buffers = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in parameters.items():
            parameter: Any = self._parameters[name]
            parameter.data = before.to(parameter.device)
        for name, before in buffers.items():
            buffer: Any = self._buffers[name]
            self._buffers[name] = before.to(buffer.device)
        return self
