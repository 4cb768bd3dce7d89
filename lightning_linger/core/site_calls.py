"""Running one call of a site in a number system."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_linger.core.functions import Canonical
from lightning_linger.core.payload import real_values
from lightning_linger.core.sites import Site
from lightning_linger.core.switches import Switches
from lightning_linger.core.tags import drop_tag, tag_of


class SiteCall:
    """One call of a site, which is about to run.

    Args:
        site: The site.
        system: The number system it runs in: ``float``, ``fake`` or ``integer``.
        canonical: What the function means.
        func: The torch function that the model has called.
        args: Its positional arguments.
        kwargs: Its named arguments.
    """

    def __init__(
        self,
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
        return run_in_system(
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


def run_in_system(
    site: Site,
    system: str,
    canonical: Canonical,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run one call of a site in a number system.

    Args:
        site: The site.
        system: ``float``, ``fake`` or ``integer``.
        canonical: What the function means.
        func: The torch function that the model has called.
        args: Its positional arguments.
        kwargs: Its named arguments.
    """
    op = site.op
    call = op.bind(*in_order(args, canonical), **kwargs)
    if system == "float":
        result = op.run_float(site, call)
        if site.watching:
            return _watch(site, call, result, canonical, func, args, kwargs)
    elif site.passes_float:
        result = _run_passing(site, call, func, args, kwargs)
    else:
        result = (op.run_fake if system == "fake" else op.run_integer)(site, call)
        if site.released and result is not NotImplemented:
            # A clone has no tag and nobody's gradient depends on its memory.
            result = tree_map_only(Tensor, lambda x: real_values(x).clone(), result)
    if result is NotImplemented:
        return run_plain(site.switches, func, args, kwargs, canonical.inplace)
    return result


def _watch(
    site: Site,
    call: Any,
    result: Any,
    canonical: Canonical,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Move the ranges of a site by a float forward, and return its result."""
    site.watch_operands(site.op.operands(call))
    plain = result is NotImplemented
    if plain:
        result = run_plain(site.switches, func, args, kwargs, canonical.inplace)
    # A layer that has a batch norm to come is observed behind it.
    finished = not plain and site.op.rounds_parts_apart
    if isinstance(result, Tensor) and not finished and not site.completes_fold:
        site.watch_result(result)
    return result


def _run_passing(
    site: Site, call: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a call in float, with the tag that its result would have on the grid."""
    result = site.op.run_float(site, tree_map_only(Tensor, plain_values, call))
    if result is NotImplemented:
        args, kwargs = tree_map_only(Tensor, plain_values, (args, kwargs))
        result = func(*args, **{**kwargs, **out_of_place(kwargs)})
    assert site.output is not None  # `passes_float` says so
    return site.output(result, learn=site.learning)


def run_plain(
    switches: Switches, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inplace: bool
) -> Any:
    """Run a function that has no quantized meaning here, on real values.

    Args:
        switches: Of the model.
        func: The torch function.
        args: Its positional arguments.
        kwargs: Its named arguments.
        inplace: Whether it writes into its first argument, which is plain from then on.
    """
    if switches.system == "integer":
        args, kwargs = tree_map_only(Tensor, real_values, (args, kwargs))
    result = func(*args, **kwargs)
    if inplace and args and isinstance(args[0], Tensor):
        drop_tag(args[0])
    return result


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
