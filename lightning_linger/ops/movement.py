"""Ops that only move values, or drop some: tags pass through, and there is nothing to quantize."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.movement import move
from lightning_linger.core.payload import real_values
from lightning_linger.core.registry import Op, register
from lightning_linger.core.tags import Tag, tag_of, with_tag
from lightning_linger.ops.arguments import to_tuple

# op -> the functions that mean it
MOVEMENTS: dict[str, tuple[str, ...]] = {
    "flatten": ("flatten", "ravel"),
    "unflatten": ("unflatten",),
    "reshape": ("reshape", "reshape_as"),
    "view": ("view", "view_as"),
    "permute": ("permute",),
    "transpose": ("transpose", "swapaxes", "swapdims", "t", "movedim", "moveaxis", "adjoint"),
    "squeeze": ("squeeze",),
    "unsqueeze": ("unsqueeze", "atleast_1d", "atleast_2d", "atleast_3d"),
    "slice": ("__getitem__", "select", "narrow", "narrow_copy", "index_select"),
    "chunk": ("chunk", "tensor_split", "hsplit", "vsplit", "dsplit"),
    "split": ("split", "split_with_sizes", "unbind"),
    "contiguous": ("contiguous", "clone", "detach"),
    "expand": ("expand", "expand_as", "broadcast_to"),
    "repeat": ("repeat", "tile"),
    "repeat_interleave": ("repeat_interleave",),
    "roll": ("roll",),
    "flip": ("flip", "fliplr", "flipud"),
    "rot90": ("rot90",),
    "gather": ("gather", "take_along_dim", "take"),
    "pixel_shuffle": ("pixel_shuffle",),
    "pixel_unshuffle": ("pixel_unshuffle",),
    "channel_shuffle": ("channel_shuffle", "native_channel_shuffle"),
}
# Spelled as an attribute rather than a call.
PROPERTIES: dict[str, tuple[str, ...]] = {"transpose": ("T", "mT", "H", "mH")}


class MovementOp(Op):
    """Rearranges values; has no site."""

    has_site = False


class MaskedSelectOp(MovementOp):
    """``masked_select``, whose result has as many values as the mask says."""

    def move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Select where values can be read.

        Raises:
            UnsupportedError: In an export, whose shapes are fixed.
        """
        tag = tag_of(args[0] if args else kwargs["input"])
        if tag is not None and torch.compiler.is_exporting():
            msg = (
                f"`{tag.site}`: masked_select behind it cannot be exported because the size of its "
                "result depends on values. Use torch.where, which keeps the shape."
            )
            raise UnsupportedError(msg)
        return super().move(func, args, kwargs)


# --- diagonals --------------------------------------------------------------------------------


class DiagonalOp(MovementOp):
    """``diagonal``: of codes as a choice of indices, which every runtime has."""

    def move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take a diagonal."""
        source = args[0] if args else kwargs["input"]
        codes = tag_of(source) is not None and not source.dtype.is_floating_point
        return move(diagonal_of if codes else func, args, kwargs)


def diagonal_of(input: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """Return what ``torch.diagonal`` returns."""
    planes = input.movedim((dim1, dim2), (-2, -1))
    rows, columns = planes.shape[-2:]
    first = (max(-offset, 0), max(offset, 0))
    count = max(min(rows - first[0], columns - first[1]), 0)
    chosen = [(first[0] + i) * columns + first[1] + i for i in range(count)]
    index = torch.tensor(chosen, dtype=torch.int64, device=input.device)
    return planes.flatten(-2).index_select(-1, index)


# --- windows ----------------------------------------------------------------------------------


class UnfoldOp(MovementOp):
    """``Tensor.unfold`` and ``F.unfold``, whose padding is zeros."""

    def move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cut windows out of real values or, as slices, out of codes."""
        source = args[0] if args else kwargs["input"]
        if tag_of(source) is None or source.dtype.is_floating_point:
            return super().move(func, args, kwargs)
        cut = unfolded_image if func is F.unfold else unfolded
        return move(cut, args, kwargs)


def unfolded(input: Tensor, dimension: int, size: int, step: int) -> Tensor:
    """Return what ``Tensor.unfold`` returns, as one choice of indices."""
    dim = dimension % max(input.dim(), 1)
    count = (input.shape[dim] - size) // step + 1
    chosen = [start * step + offset for start in range(count) for offset in range(size)]
    index = torch.tensor(chosen, device=input.device)
    shape = [*input.shape[:dim], count, size, *input.shape[dim + 1 :]]
    return input.index_select(dim, index).reshape(shape).movedim(dim + 1, -1)


def unfolded_image(
    input: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """Return what ``F.unfold`` returns, as slices: torch has it for floating tensors only."""
    kernel, spread, pad, step = (
        to_tuple(value, 2) for value in (kernel_size, dilation, padding, stride)
    )
    image = input if input.dim() == 4 else input.unsqueeze(0)
    if any(pad):
        image = F.pad(image, (pad[1], pad[1], pad[0], pad[0]))
    sizes = image.shape[2:]
    geometry = zip(sizes, spread, kernel, step, strict=True)
    counts = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in geometry]
    taps = []
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            first = (row * spread[0], column * spread[1])
            spans = [
                slice(start, start + s * (count - 1) + 1, s)
                for start, s, count in zip(first, step, counts, strict=True)
            ]
            taps.append(image[:, :, spans[0], spans[1]])
    columns = torch.stack(taps, 2).flatten(3).flatten(1, 2)
    return columns if input.dim() == 4 else columns.squeeze(0)


# --- dtypes and devices -----------------------------------------------------------------------

_CASTS = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda")
# The widest codes that a floating dtype holds exactly.
_WIDEST = {torch.float16: 12, torch.bfloat16: 9}


class CastOp(MovementOp):
    """Casts to another floating dtype, and moves to a device: the codes stay what they are.

    A cast to whole numbers or booleans leaves the grid.
    """

    def quantized_results(self, results: Sequence[Any]) -> Sequence[Any]:
        """Those that are still real numbers."""
        return [spec for spec in results if spec.floating]

    def move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cast real values; a payload stays, and its tag names another dtype.

        Raises:
            UnsupportedError: If the dtype does not hold the codes.
        """
        source = args[0]
        tag = tag_of(source)
        others = [_seen_as_real(x) for x in args[1:]]
        kwargs = {name: _seen_as_real(x) for name, x in kwargs.items()}
        if tag is None:
            return func(source, *others, **kwargs)
        payload = not source.dtype.is_floating_point
        result = func(_seen_as_real(source), *others, **kwargs)
        if not isinstance(result, Tensor):  # `x.type()` asks
            return result
        if not result.dtype.is_floating_point:
            return func(real_values(source), *others, **kwargs) if payload else result
        _require_to_hold(result.dtype, tag)
        if result.dtype == tag.dtype and result.device == source.device:
            return source if payload else with_tag(result, tag)
        tag = dataclasses.replace(tag, dtype=result.dtype)
        return with_tag(source.to(result.device).view_as(source) if payload else result, tag)


def _seen_as_real(x: Any) -> Any:
    """Return an empty tensor of the dtype that the model sees in place of a payload."""
    tag = tag_of(x)
    if tag is None or x.dtype.is_floating_point:
        return x
    return torch.empty(0, dtype=tag.dtype, device=x.device)


def _require_to_hold(dtype: torch.dtype, tag: Tag) -> None:
    widest = _WIDEST.get(dtype)
    if widest is not None and tag.bits > widest:
        msg = (
            f"`{tag.site}`: its {tag.bits}-bit result is cast to {dtype}, which holds codes of at "
            f"most {widest} bits. Use fewer output_bits there, or keep the model in float32."
        )
        raise UnsupportedError(msg)


for _kind, _names in MOVEMENTS.items():
    register(MovementOp(_kind), *_names, properties=PROPERTIES.get(_kind, ()))
register(MaskedSelectOp("masked_select"))
register(DiagonalOp("diagonal"))
register(UnfoldOp("unfold"))
# By their objects: under these names torch has dtypes and modules too.
_METHODS = [getattr(space, name) for space in (Tensor, torch._C.TensorBase) for name in _CASTS]
register(CastOp("cast"), functions=_METHODS)
