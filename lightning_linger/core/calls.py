"""Calls of a model as they are seen from outside: of its modules, and of its sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_linger.core.functions import Canonical
from lightning_linger.core.payload import real_values
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of

if TYPE_CHECKING:
    from lightning_linger.core.instrumentation import Instrumentation


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


class SiteCall:
    """One call of a site, which is about to run.

    Args:
        instrumentation: Of the model.
        site: The site.
        system: The number system it runs in: ``float``, ``fake`` or ``integer``.
        canonical: What the function means.
        func: The torch function that the model has called.
        args: Its positional arguments.
        kwargs: Its named arguments.
    """

    def __init__(
        self,
        instrumentation: Instrumentation,
        site: Site,
        system: str,
        canonical: Canonical,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.site = site
        self.system = system
        self.canonical = canonical
        self._instrumentation = instrumentation
        self._func = func
        self._args = args
        self._kwargs = kwargs

    @property
    def overwrites(self) -> bool:
        """Whether the call writes its result into one of its arguments."""
        kwargs = self._kwargs
        return (
            self.canonical.inplace or bool(kwargs.get("inplace")) or kwargs.get("out") is not None
        )

    def bound(self) -> Any:
        """Return the arguments by name, as the op names them."""
        return self.site.op.bind(*in_order(self._args, self.canonical), **self._kwargs)

    def run(self) -> Any:
        """Run the call in its number system."""
        return self._instrumentation.run_site(
            self.site, self.system, self.canonical, self._func, self._args, self._kwargs
        )

    def run_float(self, values: Callable[[Tensor], Tensor] | None = None) -> Any:
        """Run the call without quantization.

        Args:
            values: What stands for each tensor; by default its real values.
        """
        values = values or plain_values
        found = self.site.op.run_float(self.site, tree_map_only(Tensor, values, self.bound()))
        if found is not NotImplemented:
            return found
        args, kwargs = tree_map_only(Tensor, values, (self._args, self._kwargs))
        return self._func(*args, **{**kwargs, **out_of_place(kwargs)})


def run_site(site_call: SiteCall) -> Any:
    """Run a call of a site.

    A function mode around the model sees this function in the place of all that the site calls.
    """
    return site_call.run()


def plain_values(x: Tensor) -> Tensor:
    """Return real values without a tag, in memory of their own."""
    if tag_of(x) is None:
        return x
    real = real_values(x)
    return real.clone() if real is x else real


def out_of_place(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword that keeps a function from writing into its argument, if it has it."""
    return {"inplace": False} if "inplace" in kwargs else {}


def in_order(args: tuple[Any, ...], canonical: Canonical) -> tuple[Any, ...]:
    """Return arguments in the order of the op, of which the function may be a mirror image."""
    return (args[1], args[0], *args[2:]) if canonical.swapped else args
