"""The same op once more, in another number system, with no effect on the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_linger.core.payload import real_values
from lightning_linger.core.site_calls import SiteCall
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of

_DOUBLE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}


def run_in_double(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op on the CPU in double precision, on copies of its arguments.

    Returns:
        The result; None for an op that draws random numbers, writes into an argument, or takes no
        tensor, which has none to compare with.

    Raises:
        Exception: Whatever the op raises on such arguments.
    """
    if (
        func._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in func.tags
        or not any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs)))
    ):
        return None
    args, kwargs = tree_map_only(Tensor, _double, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return func(*args, **kwargs)


def run_site_in_float(site_call: SiteCall) -> Any:
    """Run a call of a site without quantization, on the real values of its operands."""
    with _untouched(site_call.site):
        return site_call.run_float(_real_copy)


def run_site_in_integers(site_call: SiteCall) -> Any:
    """Run a call of a quantized site on the integers of its operands.

    Returns:
        The result; None while the ranges still move, when there is no integer model yet.
    """
    site = site_call.site
    if site.training or not site.switches.quantize or not site.quantized or not site.ready:
        return None
    bound = tree_map_only(Tensor, _copy, site_call.bound())
    with _untouched(site):
        site.switches.system = "integer"
        found = site.op.run_integer(site, bound)
    return None if found is NotImplemented else found


def _double(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.is_floating_point() else _DOUBLE.get(x.dtype, x.dtype)
    return x.detach().to("cpu", dtype, copy=True)


def _copy(x: Tensor) -> Tensor:
    copy = x.detach().clone()
    # What the library's ops tell each other about a tensor: its tag, a folded batch norm.
    copy.__dict__.update(x.__dict__)
    return copy


def _real_copy(x: Tensor) -> Tensor:
    return _copy(x) if tag_of(x) is None else real_values(x).detach().clone()


@contextlib.contextmanager
def _untouched(site: Site) -> Iterator[None]:
    """Keep random numbers, ranges and switches as they are."""
    switches, system = site.switches, site.switches.system
    observing = switches.observing
    seen, prepared = dict(site.seen), dict(site.prepared)
    cuda = torch.cuda.is_initialized()
    devices = [*range(torch.cuda.device_count())] if cuda else []
    try:
        switches.observing = False
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        switches.system, switches.observing = system, observing
        site.seen, site.prepared = seen, prepared
