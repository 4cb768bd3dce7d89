"""What is written of a value: text to read and search, arrays to load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_linger.core.integer import payload_dtype
from lightning_linger.core.payload import integer_codes, real_values
from lightning_linger.core.tags import tag_of, with_tag

Level = Literal[0, 1, 2]
LEVELS: tuple[Level, ...] = (0, 1, 2)
FIRST = 10

_TYPES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}
DTYPES = {name: dtype for dtype, name in _TYPES.items()}
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Description:
    """A value in the form in which it is written.

    Args:
        lines: The lines of the text.
        arrays: The numbers of each tensor in it, in order.
    """

    lines: list[str] = field(default_factory=list)
    arrays: list[np.ndarray[Any, Any]] = field(default_factory=list)


def describe(value: Any, level: Level) -> Description:
    """Describe real values: tensors, scalars, and what holds them.

    A tensor has a header with its type, shape, stride and the count of numbers that follow; one on
    an integer grid also its scale, zero point and width.

    Args:
        value: Anything that an op takes or gives.
        level: 0 for the first ten numbers of each tensor, 1 for the sum of their magnitudes (the
            count of true ones), 2 for all, in row-major order.
    """
    description = Description()
    with torch.no_grad():
        _describe(value, level, description, codes=False)
    return description


def describe_codes(value: Any, level: Level) -> Description | None:
    """Describe the integers of what is on an integer grid; None if nothing is."""
    if not any(tag_of(x) is not None for x in _tensors(value)):
        return None
    description = Description()
    with torch.no_grad():
        _describe(value, level, description, codes=True)
    return description


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [x for item in value.values() for x in _tensors(item)]
    if isinstance(value, list | tuple):
        return [x for item in value for x in _tensors(item)]
    return []


def _describe(value: Any, level: Level, into: Description, codes: bool) -> None:
    lines = into.lines
    if isinstance(value, Tensor):
        _describe_tensor(value, level, into, codes)
    elif value is None:
        lines.append("Optional : None")
    elif isinstance(value, bool | int | float | complex):
        lines += [f"Scalar : Type = {type(value).__name__}", _number(value)]
    elif isinstance(value, torch.Generator):
        lines += ["Generator :", str(value.initial_seed()), str(value.device)]
    elif isinstance(value, Mapping):
        lines.append(f"Dict : Size = {len(value)}")
        for name, item in value.items():
            lines.append(f"Key : {name}")
            _describe(item, level, into, codes)
    elif isinstance(value, list | tuple):
        lines.append(f"{'List' if isinstance(value, list) else 'Tuple'} : Size = {len(value)}")
        for item in value:
            _describe(item, level, into, codes)
    elif isinstance(value, str | torch.dtype | torch.device | torch.layout | torch.memory_format):
        lines.append(str(value))
    else:
        # No `repr`: an address in it would make two equal runs differ.
        lines.append(f"Object : Type = {type(value).__name__}")


def _describe_tensor(x: Tensor, level: Level, into: Description, codes: bool) -> None:
    tag = tag_of(x)
    x = x.detach()
    grid = ""
    if tag is not None:
        zero_point = int(tag.zero_point or 0)
        x = integer_codes(with_tag(x, tag)) if codes else real_values(with_tag(x, tag))
        if codes and tag.affine:
            x = (x + zero_point).to(payload_dtype(tag.width))
        grid = (
            f" : Scale = {_number(float(tag.step))} : Zero point = {zero_point}"
            f" : Bits = {tag.width}"
        )
    kept = _kept(x, level)
    name = _TYPES.get(x.dtype, str(x.dtype).removeprefix("torch."))
    stride = list(x.stride()) if x.layout is torch.strided else []
    count = 0 if kept is None else kept.size
    into.lines.append(
        f"Tensor : Type = {name} : Shape = {list(x.shape)} : Stride = {stride} : Dumped = {count}"
        + grid
    )
    if kept is not None:
        into.lines.extend(_text(kept))
        into.arrays.append(kept)


def _kept(x: Tensor, level: Level) -> np.ndarray[Any, Any] | None:
    """Return the numbers that are dumped, None for a tensor that has none to show."""
    if x.layout is not torch.strided or x.device.type == "meta" or isinstance(x, FakeTensor):
        return None
    if level == 0:
        return _array(x.reshape(-1)[:FIRST])
    return _array(x) if level == 2 else np.asarray(_magnitude(x))


def _magnitude(x: Tensor) -> int | float:
    if x.dtype is torch.bool:
        return int(x.sum())
    if x.is_floating_point() or x.is_complex():
        return float(x.cpu().abs().sum(dtype=torch.float64))
    x = x.cpu()
    if x.dtype in (torch.int64, torch.uint64) and x.numel():
        largest = max(abs(int(x.max())), abs(int(x.min())))
        if largest * x.numel() > _LARGEST:
            codes: list[int] = x.flatten().tolist()
            return sum(map(abs, codes))
    return int(x.to(torch.int64).abs().sum())


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    x = x.cpu().resolve_conj().resolve_neg()
    if x.dtype not in _TYPES or x.dtype is torch.bfloat16:
        x = x.float()  # numpy has no such type; float32 holds every value of it
    # A copy: the run may overwrite its tensor before the files are written.
    return x.numpy().copy()


def _text(values: np.ndarray[Any, Any]) -> Sequence[str]:
    if values.dtype == np.bool_:
        values = values.astype(np.int8)
    if values.dtype == object or values.ndim == 0:
        return [_number(values.item())]
    texts: list[str] = values.reshape(-1).astype(str).tolist()
    return texts


def _number(value: complex) -> str:
    return str(int(value)) if isinstance(value, bool) else repr(value)
