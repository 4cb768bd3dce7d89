"""Which module of the program is running."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from lightning_linger.core.instrumentation import STATE_NAME

_FAST = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


class ModuleStack:
    """The modules that are running, by their dotted paths from the outermost one.

    Where torch runs a whole transformer layer in one kernel, provided that no function mode
    watches, the functions inside are not watched: they would be others.

    Attributes:
        function_mode: The function mode to suspend there.
    """

    def __init__(self) -> None:
        self.function_mode: Any = None
        self._running: list[nn.Module] = []
        self._paths: dict[nn.Module, str] = {}
        self._suspended: tuple[nn.Module, contextlib.ExitStack] | None = None
        self._handles = contextlib.ExitStack()

    @property
    def path(self) -> str:
        """The path of the innermost module, empty for the outermost one and outside of any."""
        known = (self._paths.get(module) for module in reversed(self._running))
        return next((path for path in known if path is not None), "")

    def __enter__(self) -> ModuleStack:
        self._handles.callback(register_module_forward_pre_hook(self._enter).remove)
        self._handles.callback(register_module_forward_hook(self._exit, always_call=True).remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._handles.close()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self._running:
            self._paths = {
                inner: path
                for path, inner in module.named_modules()
                if STATE_NAME not in path.split(".")
            }
        self._running.append(module)
        if self._suspended is None and isinstance(module, _FAST) and self._alone():
            suspension = contextlib.ExitStack()
            suspension.enter_context(torch._C.DisableTorchFunction())
            self._suspended = module, suspension

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._suspended is not None and self._suspended[0] is module:
            self._suspended[1].close()
            self._suspended = None
        if module in self._running:
            while self._running.pop() is not module:
                pass

    def _alone(self) -> bool:
        """Whether the dumper's own function mode is the only one that watches."""
        stack: list[Any] = torch.overrides._get_current_function_mode_stack()
        return bool(stack) and all(type(mode) is type(self.function_mode) for mode in stack)
