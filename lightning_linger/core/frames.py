"""Where in the model a call is made: hooks of the modules keep a stack of those that run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_linger.core.calls import ModuleCall
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of, with_tag

if TYPE_CHECKING:
    from lightning_linger.core.instrumentation import Instrumentation


class Activation:
    """One running call of an instrumented module: which one, and what it has called so far."""

    __slots__ = ("counts", "invocation", "path", "sites")

    def __init__(self, path: str, invocation: int, sites: dict[str, list[Site]]) -> None:
        self.path = path
        self.invocation = invocation
        self.sites = sites
        self.counts: dict[str, int] = {}

    def count(self, op: str) -> int:
        """Return how many calls of ``op`` came before, and count this one."""
        index = self.counts.get(op, 0)
        self.counts[op] = index + 1
        return index

    def key(self, op: str, index: int) -> str:
        """Return the site key of the ``index``-th call of ``op`` in this module call."""
        return site_key(self.path, self.invocation, op, index)


def site_key(path: str, invocation: int, op: str, index: int) -> str:
    """Format a site key, e.g. ``layer1.0.conv1/conv2d/0`` or ``head@1/linear/0``."""
    suffix = f"@{invocation}" if invocation else ""
    return f"{path}{suffix}/{op}/{index}"


class Frame:
    """The hooks of one module. Bound methods, so that deepcopy and pickle carry them along.

    Args:
        instrumentation: Of the model.
        path: Dotted path of the module.
        entry: Whether a call from outside starts an instrumented forward. Losses, metrics and
            augmentations, which have no parameters, stay outside.
    """

    def __init__(self, instrumentation: Instrumentation, path: str, entry: bool) -> None:
        self.instrumentation = instrumentation
        self.path = path
        self.entry = entry
        self.invocations = 0
        self.sites: list[dict[str, list[Site]]] = []
        self._given: Any = None

    def before_gathering(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forward pre-hook in front of that which gathers the parameters of a sharded module."""
        self.instrumentation.paused = True
        self._given = (args, kwargs)

    def before_sharding(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook in front of that which lets go of gathered parameters."""
        self.instrumentation.paused = True

    def _after_gathering(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Recognise the arguments again, which autograd functions may have been passed through."""
        instrumentation = self.instrumentation
        instrumentation.paused = False
        given, self._given = self._given, None
        for before, after in zip(tree_leaves(given), tree_leaves((args, kwargs)), strict=True):
            same = before is after or not isinstance(after, Tensor)
            if same or (before.dtype, before.shape) != (after.dtype, after.shape):
                continue
            if instrumentation.recorder is not None:
                instrumentation.recorder.renamed(before, after)
            tag = tag_of(before)
            if tag is not None:
                with_tag(after, tag)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        instrumentation = self.instrumentation
        if instrumentation.paused:
            self._after_gathering(args, kwargs)
        calls = instrumentation.calls
        if not instrumentation.engaged:
            # Without a stack nothing tells the calls inside the first one from the next.
            if calls == [] and self.entry and not is_redirected_step(module):
                calls.append(ModuleCall(module, args, kwargs))
            return
        if not instrumentation.stack:
            if not self.entry or is_redirected_step(module):
                return
            if calls is not None:
                calls.append(ModuleCall(module, args, kwargs))
            if instrumentation.recorder is not None:
                instrumentation.recorder.given((args, kwargs))
            instrumentation.begin(module, args, kwargs)
        invocation = self.invocations
        self.invocations = invocation + 1
        sites = self.sites[invocation] if invocation < len(self.sites) else {}
        instrumentation.stack.append(Activation(self.path, invocation, sites))
        if instrumentation.recorder is not None:
            instrumentation.recorder.owns(module)

    def exit(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook, called after an error too."""
        instrumentation = self.instrumentation
        instrumentation.paused = False
        stack = instrumentation.stack
        if not stack or stack[-1].path != self.path:
            return None
        stack.pop()
        if stack:
            return None
        return instrumentation.end(output, self.path)


def is_redirected_step(module: nn.Module) -> bool:
    """Whether a module's forward stands for a whole step of Lightning just now."""
    # Under DDP, Lightning sends the whole `training_step` through a temporary `forward`. The calls
    # the step makes start the instrumented forward, so that losses and metrics stay outside.
    if torch.compiler.is_compiling():
        return False
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__name__", "") == "wrapped_forward"
