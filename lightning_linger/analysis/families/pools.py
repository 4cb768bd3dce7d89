"""Pools, means, and extremes that a pool finds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_linger.analysis.families.convolutions import images
from lightning_linger.analysis.layers import Data, Shape, Window
from lightning_linger.analysis.walk import Reader, Visit


def add_pool(
    visit: Visit, kind: str, x: Data, out: Data, window: Window, traits: Sequence[str] = ()
) -> None:
    """Add a pool of maps, or of rows as maps with a height of 1."""
    if len(window.kernel) == 1:  # maps of a height of 1
        window = window.on_plane()
        x = x.reshaped((*x.shape[:-1], 1, x.shape[-1]))
        out = out.reshaped((*out.shape[:-1], 1, out.shape[-1]))
    dims = len(window.kernel)
    edges = zip(x.shape[-dims:], window.before, window.after, strict=True)
    whole = [size + a + b == k for (size, a, b), k in zip(edges, window.kernel, strict=True)]
    found = set(traits) | ({"global"} if all(whole) else set())
    found |= {"spans"} if any(whole) else set()
    channels = x.shape[-dims - 1]
    visit.add(
        kind,
        (x,),
        (out,),
        tuple(found),
        window=window,
        channels=(channels, channels),
        facts={"images": images(visit, x)},
    )


def read_pool(visit: Visit) -> None:
    """Read a pool of windows that are all alike."""
    call, dims = visit.call, len(visit.call.kernel_size)
    x, out = visit.operand(0), visit.result(0)
    dilation = call.dilation or (1,) * dims
    window = Window(call.kernel_size, call.stride, call.padding, call.padding, dilation)
    traits = set()
    if len(x.shape) == dims + 1:
        traits.add("unbatched")
    floors = [
        (size + 2 * pad - spread * (kernel - 1) - 1) // stride + 1
        for size, pad, spread, kernel, stride in zip(
            x.shape[-dims:], call.padding, dilation, call.kernel_size, call.stride, strict=True
        )
    ]
    if call.ceil_mode and tuple(floors) != out.shape[-dims:]:
        traits.add("ceil")
    average = "avg_pool" in visit.node.op
    if average and not call.count_include_pad and any(call.padding):
        traits.add("skips_padding")
    if average and call.divisor not in (None, 0, math.prod(call.kernel_size)):
        traits.add("other_divisor")
    add_pool(visit, "avg_pool" if average else "max_pool", x, out, window, tuple(traits))


def read_adaptive_max_pool(visit: Visit) -> None:
    """Read ``adaptive_max_pool*d``: windows of different sizes repeat places."""
    x, out, size = visit.operand(0), visit.result(0), visit.call.size
    dims = len(size)
    kernel = tuple(-(-s // t) for s, t in zip(x.shape[-dims:], size, strict=True))
    if any(s % t for s, t in zip(x.shape[-dims:], size, strict=True)):
        spread = [k * t for k, t in zip(kernel, size, strict=True)]
        wide = visit.inner((*x.shape[:-dims], *spread))
        visit.add("move", (x,), (wide,))
        x = wide
    none = (0,) * dims
    add_pool(visit, "max_pool", x, out, Window(kernel, kernel, none, none, (1,) * dims))


def read_mean(visit: Visit) -> None:
    """Read a mean: an average over whole maps, to which other dimensions are brought."""
    x, dims = visit.operand(0), sorted(visit.call.dim)
    _reduce(visit, "avg_pool", x, dims, visit.result())


def read_extreme(visit: Visit) -> None:
    """Read ``amax``, or ``max`` along a dimension or of everything."""
    call = visit.call
    if getattr(call, "other", None) is not None:
        if visit.shifts:
            visit.refuse()
        else:
            operands = [data for data in visit.operands() if data is not None]
            visit.add(visit.node.op, operands, (visit.result(),))
        return
    x, dim = visit.operand(0), call.dim
    given = tuple(range(len(x.shape))) if dim is None else dim
    dims = sorted(d % len(x.shape) for d in (given if isinstance(given, tuple) else (given,)))
    values, *places = visit.node.outputs
    if any(visit.walk.is_used(spec) for spec in places):
        visit.add("argmax", (x,), ())
    if values.floating:
        _reduce(visit, "max_pool", x, dims, visit.result(0))


def _reduce(visit: Visit, kind: str, x: Data, dims: list[int], out: Data) -> None:
    rank = len(x.shape)
    kept = [d for d in range(rank) if d not in dims]
    if kind == "avg_pool" and dims == [2, 3] and rank == 4:
        sizes: Shape = x.shape
    else:
        order = tuple(kept + dims)
        if order != tuple(range(rank)):
            turned = visit.inner(tuple(x.shape[d] for d in order))
            visit.add("transpose", (x,), (turned,), facts={"order": order})
            x = turned
        batch = x.shape[0] if kept else 1
        count = math.prod(x.shape[len(kept) :])
        sizes = (batch, math.prod(x.shape[1 : len(kept)]), 1, count)
    kernel, none = sizes[2:], (0, 0)
    pooled = out.reshaped((*sizes[:2], 1, 1))
    add_pool(visit, kind, x.reshaped(sizes), pooled, Window(kernel, kernel, none, none, (1, 1)))


def read_argmax(visit: Visit) -> None:
    """Read ``argmax``."""
    visit.add("argmax", (visit.operand(0),), ())


READERS: dict[str, Reader] = {
    **{f"avg_pool{dims}d": read_pool for dims in (1, 2, 3)},
    **{f"adaptive_avg_pool{dims}d": read_pool for dims in (1, 2, 3)},
    **{f"max_pool{dims}d": read_pool for dims in (1, 2, 3)},
    **{f"adaptive_max_pool{dims}d": read_adaptive_max_pool for dims in (1, 2, 3)},
    "mean": read_mean,
    "amax": read_extreme,
    "max": read_extreme,
    "argmax": read_argmax,
}
