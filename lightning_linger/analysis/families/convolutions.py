"""Convolutions, and what is written as one: batch norms that are not folded."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lightning_linger.analysis.layers import Data, Shape, Window
from lightning_linger.analysis.walk import Reader, Visit
from lightning_linger.core.platform import Platform


def read_convolution(visit: Visit) -> None:
    """Read a convolution, forward or transposed."""
    call, dims = visit.call, len(visit.call.stride)
    transposed = visit.node.op.startswith("conv_transpose")
    x = visit.arriving(0)
    assert x is not None  # a convolution has a tensor to work on
    before = after = call.padding
    if transposed or not _is_around_maps(x, dims):
        x = visit.walk.written(x)
    elif x.padding is not None:
        around = x.padding.edges[-dims:]
        before = tuple(own + more for own, (more, _) in zip(before, around, strict=True))
        after = tuple(own + more for own, (_, more) in zip(after, around, strict=True))
        x = _without_padding(x)
    weight: Shape = tuple(call.weight.shape)
    window = Window(weight[2:], call.stride, before, after, call.dilation)
    traits = {"unbatched"} if len(x.shape) == dims + 1 else set()
    if dims == 1 and _is_on_plane(visit.walk.platform, window, call.groups, transposed):
        window, weight = window.on_plane(), (*weight[:2], 1, *weight[2:])
        x = x.reshaped((*x.shape[:-1], 1, x.shape[-1]))
    out = visit.result()
    if any(step != 1 for step in window.dilation):
        traits.add("dilated")
    add_convolution(
        visit,
        x,
        out,
        window,
        weight,
        call.groups,
        transposed,
        has_bias=call.bias is not None or visit.site is None or visit.site.__dict__["fold"],
        traits=traits,
    )


def add_convolution(
    visit: Visit,
    x: Data,
    out: Data,
    window: Window,
    weight: Shape,
    groups: int,
    transposed: bool,
    has_bias: Any,
    traits: set[str],
) -> None:
    """Add a convolution.

    Args:
        visit: The call it comes from.
        x: ``[N, C, ...]``.
        out: Its result.
        window: Its geometry.
        weight: Shape of its weight, in torch's layout.
        groups: Number of groups.
        transposed: Whether it is a transposed one.
        has_bias: Whether there is a bias.
        traits: What is known already.
    """
    elements = math.prod(weight)
    if transposed:
        inputs, outputs = weight[0], weight[1] * groups
        spatial = math.prod(x.shape) // max(x.shape[-len(window.kernel) - 1], 1)
        # The engine has no groups here: zeros are written between them.
        weight, kind = (inputs, outputs, *weight[2:]), "deconv"
        traits |= {"grouped"} if groups > 1 else set()
    else:
        inputs, outputs = weight[1] * groups, weight[0]
        spatial = math.prod(out.shape) // outputs
        kind = "conv1d" if len(window.kernel) == 1 else "conv"
        if groups == outputs > 1:
            traits.add("depthwise")
        elif groups > 1:
            traits.add("grouped")
            inputs, outputs = inputs // groups, outputs // groups
    visit.add(
        kind,
        (x,),
        (out,),
        tuple(traits),
        window=window,
        channels=(inputs, outputs),
        weights=(weight,),
        biases=(weight[1] if transposed else weight[0]) if has_bias else 0,
        weight_bits=visit.weight_bits,
        macs=spatial * elements,
        facts={"groups": groups, "images": images(visit, x)},
    )


def read_batch_norm(visit: Visit) -> None:
    """Read a batch norm of its own: a convolution with one weight per channel."""
    x = visit.operand(0)
    if len(x.shape) > 4 and visit.walk.platform.dialect == "linger":
        visit.refuse()
        return
    pointwise(visit, x, visit.result(), x.shape[1])


def pointwise(visit: Visit, x: Data, out: Data, channels: int) -> None:
    """Add a convolution with one weight and one bias per channel."""
    sizes = x.shape[2:] if len(x.shape) == 4 else (1, math.prod(x.shape[2:]))
    plane = x.reshaped((x.shape[0], channels, *sizes))
    window = Window((1, 1), (1, 1), (0, 0), (0, 0), (1, 1))
    result = out.reshaped(plane.shape)
    weight = (channels, 1, 1, 1)
    add_convolution(visit, plane, result, window, weight, channels, False, True, set())


def images(visit: Visit, x: Data) -> int:
    """Return how many maps stand behind one another for each sample."""
    return max(x.shape[0] // visit.walk.batch, 1)


def _is_on_plane(platform: Platform, window: Window, groups: int, transposed: bool) -> bool:
    """Whether a one-dimensional convolution is written as one of maps with a height of 1."""
    if platform.dialect != "linger":
        return False
    if transposed or groups > 1:
        return True
    plain = window.kernel == (1,) and not any((*window.before, *window.after))
    return platform.engine_name == "venusA" and not plain


def _is_around_maps(x: Data, dims: int) -> bool:
    """Whether what is padded is neither the batch nor a channel."""
    return x.padding is None or not any(sum(edges) for edges in x.padding.edges[:-dims])


def _without_padding(x: Data) -> Data:
    assert x.padding is not None
    shape = tuple(size - sum(edges) for size, edges in zip(x.shape, x.padding.edges, strict=True))
    return dataclasses.replace(x, shape=shape, padding=None)


READERS: dict[str, Reader] = {
    **{f"conv{dims}d": read_convolution for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": read_convolution for dims in (1, 2, 3)},
    "batch_norm": read_batch_norm,
}
