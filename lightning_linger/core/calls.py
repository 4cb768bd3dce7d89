"""Calls of a model as they are seen from outside: of its modules, and of its sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_linger.core.sites import Site


@dataclass(frozen=True)
class Event:
    """One site has run.

    Args:
        site: The site.
        call: Its bound call.
        result: Its result.
        run_float: Runs the same call without quantization, on the real values of its operands, or
            on what a function given as argument makes of each tensor.
    """

    site: Site
    call: Any
    result: Any
    run_float: Callable[..., Any]


Tap = Callable[[Event], None]


@dataclass(frozen=True)
class ModuleCall:
    """An outermost call of an instrumented module, to be repeated in another number system."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        """Repeat the call."""
        return self.module(*self.args, **self.kwargs)
