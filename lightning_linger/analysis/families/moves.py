"""Movements of values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from lightning_linger.analysis.layers import Data
from lightning_linger.analysis.walk import Reader, Visit
from lightning_linger.core.graph import TensorSpec


def read_reshape(visit: Visit) -> None:
    """Read what keeps the values in their order."""
    source = visit.source()
    if source.padding is not None and visit.node.outputs[0].shape != source.shape:
        source = visit.walk.written(source)
    visit.same(source)


def read_cast(visit: Visit) -> None:
    """Read a cast, which codes do not notice; whole numbers and booleans are no codes."""
    if visit.node.outputs and visit.node.outputs[0].floating:
        visit.same(visit.source())


def read_transpose(visit: Visit) -> None:
    """Read a permutation of axes."""
    spec = visit.node.inputs[0]
    order = _order(visit, len(spec.shape))
    data = _moved(visit)
    if order == tuple(range(len(order))):
        visit.same(data)
        return
    visit.add("transpose", (data,), _results(visit, data), facts={"order": order})


def read_slice(visit: Visit) -> None:
    """Read a choice of places along axes."""
    data = _moved(visit)
    steps, computed = _index(visit)
    if not computed and visit.node.outputs[0].shape == data.shape and set(steps) <= {1}:
        visit.same(data)
        return
    facts = {"steps": steps, "computed": computed}
    visit.add("slice", (data,), _results(visit, data), facts=facts)


def read_parts(visit: Visit) -> None:
    """Read a cut into parts."""
    data = _moved(visit)
    for result in _results(visit, data):
        visit.add("slice", (data,), (result,), facts={"steps": (1,), "computed": False})


def read_copies(visit: Visit) -> None:
    """Read what is written as slices, joins and transposes."""
    data = _moved(visit)
    if data.shape == visit.node.outputs[0].shape and visit.node.op in ("expand", "repeat"):
        visit.same(data)
        return
    pieces = 1
    if visit.node.op == "flip":
        axes = _numbers(visit.node.args[1:]) or _numbers(tuple(visit.node.kwargs.values()))
        pieces = max((data.shape[axis] for axis in axes), default=1)
    visit.add("move", (data,), _results(visit, data), facts={"pieces": pieces})


def read_lookup(visit: Visit) -> None:
    """Read a lookup in activations."""
    data = _moved(visit)
    index = [spec for spec in visit.node.inputs[1:] if visit.walk.is_computed(spec)]
    facts = {"steps": (1,), "computed": bool(index)}
    visit.add("slice", (data,), _results(visit, data), facts=facts)


def read_masked(visit: Visit) -> None:
    """Read ``masked_select``."""
    data = _moved(visit)
    visit.add("result_size", (data,), _results(visit, data))


def read_pad(visit: Visit) -> None:
    """Read a pad: zeros around maps may go into the convolution behind it."""
    call, data = visit.call, visit.operand(0)
    out = visit.result()
    if call.mode != "constant":  # values that are there already, in other places
        visit.add("move", (data,), (out,), facts={"pieces": max(map(abs, call.pad), default=1)})
        return
    zeros = visit.zeros()
    if zeros is None:
        visit.add("pad", (data,), (out,))
        return
    padded = dataclasses.replace(data, shape=out.shape, padding=zeros)
    visit.walk.define(visit.node.outputs[0], padded)


# --- arguments ----------------------------------------------------------------------------------


def _moved(visit: Visit) -> Data:
    return visit.walk.written(visit.source())


def _results(visit: Visit, data: Data) -> list[Data]:
    return [
        visit.walk.define(spec, Data(spec.value, spec.shape, data.bits))
        for spec in visit.node.outputs
    ]


def _order(visit: Visit, rank: int) -> tuple[int, ...]:
    """Return the permutation, by moving axes that tell themselves apart by their sizes."""
    function = visit.node.function
    probe = torch.empty([2 + axis for axis in range(rank)], device="meta")
    if function == "__get__":  # a property, `x.mT` or `x.T`
        result = probe.mT if rank > 1 else probe
    else:
        args, kwargs = tree_map_only(
            TensorSpec, lambda _: probe, (visit.node.args, visit.node.kwargs)
        )
        found: Any = getattr(torch.Tensor, function, None) or getattr(torch, function)
        result = found(*args, **kwargs)
    return tuple(size - 2 for size in result.shape)


def _index(visit: Visit) -> tuple[tuple[int, ...], bool]:
    """Return the steps of a choice, and whether it depends on other values."""
    args = (*visit.node.args[1:], *visit.node.kwargs.values())
    if visit.node.function != "__getitem__":
        return (1,), any(_is_computed(visit, value) for value in args)
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    steps = tuple(abs(item.step or 1) for item in index if isinstance(item, slice))
    return steps or (1,), any(_is_computed(visit, item) for item in index)


def _is_computed(visit: Visit, value: Any) -> bool:
    return isinstance(value, TensorSpec) and visit.walk.is_computed(value)


def _numbers(values: Sequence[Any]) -> list[int]:
    flat: list[int] = []
    for value in values:
        flat += [value] if isinstance(value, int) else list(value)
    return flat


READERS: dict[str, Reader] = {
    **dict.fromkeys(
        ("flatten", "unflatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous"),
        read_reshape,
    ),
    "cast": read_cast,
    **dict.fromkeys(("permute", "transpose"), read_transpose),
    "slice": read_slice,
    **dict.fromkeys(("chunk", "split"), read_parts),
    **dict.fromkeys(
        (
            *("expand", "repeat", "repeat_interleave", "roll", "flip", "rot90", "diagonal"),
            *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold"),
        ),
        read_copies,
    ),
    "gather": read_lookup,
    "masked_select": read_masked,
    "pad": read_pad,
}
