"""The function mode: sees every torch function that a model calls, and runs those of sites."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_linger.core.calls import Event
from lightning_linger.core.capture import capturing
from lightning_linger.core.errors import QuantizationWarning
from lightning_linger.core.functions import canonical_of
from lightning_linger.core.locations import caller_location
from lightning_linger.core.payload import real_values
from lightning_linger.core.registry import Op, op_of
from lightning_linger.core.site_calls import SiteCall, run_in_system, run_plain, run_site
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of

if TYPE_CHECKING:
    from lightning_linger.core.instrumentation import Instrumentation

# The stubs of torch have no getset descriptors.
_DTYPE_GETTER = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_IS_FLOATING_POINT = {torch.is_floating_point, torch.Tensor.is_floating_point}


class FunctionMode(TorchFunctionMode):
    """Runs the functions of a model: those of sites in their number system, others as they are.

    Args:
        instrumentation: Of the model.
    """

    def __init__(self, instrumentation: Instrumentation) -> None:
        super().__init__()
        self.instrumentation = instrumentation
        self._warned: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one torch function of the model."""
        kwargs = kwargs or {}
        instrumentation = self.instrumentation
        if instrumentation.paused:
            return func(*args, **kwargs)
        canonical = canonical_of(func)
        if instrumentation.recorder is not None:
            return instrumentation.recorder.call(
                func, canonical, args, kwargs, instrumentation.stack[-1]
            )
        if canonical is None:
            return run_plain(instrumentation.switches, func, args, kwargs, inplace=False)
        if canonical.query:
            return self._answer(func, args, kwargs)
        op = op_of(canonical.op)
        if op is None or not op.takes(args, kwargs):
            return run_plain(instrumentation.switches, func, args, kwargs, canonical.inplace)
        if not op.has_site:
            return op.move(func, args, kwargs)
        site = self._find_site(op, args, kwargs)
        system = site.system() if site is not None else None
        if site is None or system is None:
            result = run_plain(instrumentation.switches, func, args, kwargs, canonical.inplace)
        else:
            if system == "float" and instrumentation.switches.system == "integer":
                args, kwargs = tree_map_only(Tensor, real_values, (args, kwargs))
            if not capturing() and has_torch_function((instrumentation,)):
                site_call = SiteCall(site, system, canonical, func, args, kwargs)
                result = handle_torch_function(run_site, (instrumentation,), site_call)
            else:
                result = run_in_system(site, system, canonical, func, args, kwargs)
        if instrumentation.tap is not None and site is not None:
            seen = SiteCall(site, site.system() or "float", canonical, func, args, kwargs)
            instrumentation.tap(Event(site, seen.bound(), result, seen.run_float))
        return result

    def _find_site(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Site | None:
        activation = self.instrumentation.stack[-1]
        index = activation.count(op.kind)
        known = activation.sites.get(op.kind)
        if known is not None and index < len(known):
            return known[index]
        if self.instrumentation.switches.quantize and not torch.compiler.is_compiling():
            leaves = tree_leaves((args, kwargs))
            if not op.needs_quantized_operand or any(tag_of(leaf) for leaf in leaves):
                self._warn_unknown(activation.key(op.kind, index))
        return None

    def _warn_unknown(self, key: str) -> None:
        if key in self._warned:
            return
        self._warned.add(key)
        warnings.warn(
            f"`{key}` at {caller_location()} was not met when the sites were found and stays "
            "float. Pass example inputs that reach it to `linger.prepare`.",
            QuantizationWarning,
            stacklevel=2,
        )

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a question about a tensor; integers answer as the real values they stand for."""
        if self.instrumentation.switches.system == "integer" and args:
            tag = tag_of(args[0])
            if tag is not None and func == _DTYPE_GETTER:
                return tag.dtype
            if tag is not None and func in _IS_FLOATING_POINT:
                return tag.dtype.is_floating_point
        return func(*args, **kwargs)
