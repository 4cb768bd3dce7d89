"""One node of the ``linger`` dialect on numpy arrays, and what the kernels share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import code_limits, is_power_of_two, quantize

Array = NDArray[Any]

# Every engine of the dialect rounds this way, whatever a node says.
ROUNDING = "half_up"

_LARGEST_SCALE = 2.0**64
# No tensor of a chip has as many; a damaged file may ask for more than there is memory.
MAX_ELEMENTS = 2**28


@dataclass(frozen=True)
class Step:
    """One node to run.

    Args:
        label: Names the node and its op, for messages.
        attributes: By the newer generation's names.
        inputs: Arrays, None where an optional input is missing.
        platform: The library's name of the target.
    """

    label: str
    attributes: dict[str, Any]
    inputs: list[Array | None]
    platform: str

    def get(self, name: str) -> Any:
        """Return an attribute that the node must have."""
        if name not in self.attributes:
            msg = f"{self.label} lacks the attribute {name!r}. Found: {sorted(self.attributes)}."
            raise UnsupportedError(msg)
        return self.attributes[name]

    def step(self, name: str) -> float:
        """Return the step (``real = step * code``) that a scale attribute means."""
        scale = float(self.get(name))
        if not is_power_of_two(scale) or not 1 / _LARGEST_SCALE <= scale <= _LARGEST_SCALE:
            msg = f"{self.label}: {name} must be a power of two from 2^-64 to 2^64. Found: {scale}."
            raise UnsupportedError(msg)
        return 1.0 / scale

    def bits(self, name: str, default: int = 8) -> int:
        """Return a width."""
        bits = int(self.attributes.get(name, default))
        if not 2 <= bits <= 32:
            msg = f"{self.label}: {name} must be from 2 to 32. Found: {bits}."
            raise UnsupportedError(msg)
        return bits

    def sizes(
        self, name: str, count: int, least: int = 0, default: list[int] | None = None
    ) -> list[int]:
        """Return numbers of a window, from ``least`` on."""
        sizes = list(self.get(name) if default is None else self.attributes.get(name, default))
        if len(sizes) != count or any(not least <= size <= MAX_ELEMENTS for size in sizes):
            msg = f"{self.label}: {name} must be {count} numbers from {least} on. Found: {sizes}."
            raise UnsupportedError(msg)
        return sizes

    def array(self, index: int) -> Array:
        """Return an input that the node must have."""
        array = self.inputs[index] if index < len(self.inputs) else None
        if array is None:
            msg = f"{self.label} lacks its input {index}."
            raise UnsupportedError(msg)
        return array

    def codes(self, index: int, scale: str = "scale_x", bits: str = "x_bits") -> Tensor:
        """Return an operand as codes; real values are quantized by the node's own scale."""
        array = self.array(index)
        if np.issubdtype(array.dtype, np.floating):
            return quantized(to_tensor(array), self.step(scale), self.bits(bits), self.platform)
        return to_tensor(array)


# What the attributes of the engine's ops hold. Others are not read.
_LISTS = ("kernel_shape", "strides", "pads", "dilations", "output_padding", "axes", "dims")
_TEXTS = ("platform", "quant_mode", "platform_quant")
_NUMBERS = (
    *("axis", "group", "groups", "zero_point", "ceil_mode", "count_include_pad"),
    *("divisor_override", "input_size", "hidden_size", "num_layers", "batch_first", "go_forward"),
    *("has_hidden", "has_cell", "keepdims", "unbiased"),
)


def kind_of(name: str) -> str | None:
    """Return what an attribute holds (``FLOAT``, ``INT``, ``INTS``, ``STRING``), None if any."""
    if name in _LISTS:
        return "INTS"
    if name in _TEXTS:
        return "STRING"
    if name.startswith("scale_") or name in ("epsilon", "min", "max"):
        return "FLOAT"
    return "INT" if name in _NUMBERS or name.endswith("_bits") else None


def check_types(label: str, attributes: Mapping[str, Any]) -> None:
    """Refuse attributes that hold something else than their name says.

    Args:
        label: Names the node.
        attributes: By the newer generation's names. A whole number is a number too.
    """
    for name, value in attributes.items():
        kind = kind_of(name)
        if kind is not None and not _IS_KIND[kind](value):
            msg = f"{label}: the attribute {name!r} must be {kind}. Found: {value!r:.80}."
            raise UnsupportedError(msg)


_IS_KIND: dict[str, Callable[[Any], bool]] = {
    "FLOAT": lambda value: isinstance(value, int | float),
    "INT": lambda value: isinstance(value, int),
    "INTS": lambda value: isinstance(value, list) and all(isinstance(v, int) for v in value),
    "STRING": lambda value: isinstance(value, str),
}


def refuse_huge(label: str, elements: int) -> None:
    """Refuse a tensor that no chip has the memory for, before it is made."""
    if elements > MAX_ELEMENTS:
        msg = f"{label} would make {elements} numbers; more than {MAX_ELEMENTS} are not run."
        raise UnsupportedError(msg)


# One array, or as many as the node has outputs.
Kernel = Callable[[Step], Array | tuple[Array, ...]]


def to_tensor(array: Array) -> Tensor:
    """Return an array as a tensor."""
    return torch.from_numpy(np.array(array, order="C"))  # a copy: inputs may be read-only


def to_array(x: Tensor) -> Array:
    """Return a tensor as an array."""
    array: Array = x.numpy()
    return array


def quantized(x: Tensor, step: float, bits: int, platform: str) -> Tensor:
    """Quantize real values as the engine does."""
    # The largest 32-bit code is no float32.
    values = x.double() if bits > 16 else x.float()
    codes: Tensor = quantize(values, step, bits, *code_limits(bits), ROUNDING, platform)
    return codes


def split_pads(pads: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the pads in front and behind."""
    half = len(pads) // 2
    return list(pads[:half]), list(pads[half:])


def check_padded(step: Step, x: Tensor, before: Sequence[int], after: Sequence[int]) -> None:
    """Refuse pads that make a tensor of another rank, or a huge one."""
    if x.dim() != len(before) + 2:
        msg = f"{step.label} needs {len(before) + 2} dimensions. Found: {list(x.shape)}."
        raise UnsupportedError(msg)
    sides = zip(x.shape[2:], before, after, strict=True)
    refuse_huge(step.label, math.prod(x.shape[:2]) * math.prod(map(sum, sides)))


def padded(
    step: Step, x: Tensor, before: Sequence[int], after: Sequence[int], value: float
) -> Tensor:
    """Pad the trailing dimensions."""
    check_padded(step, x, before, after)
    sides = [n for pair in reversed(list(zip(before, after, strict=True))) for n in pair]
    return F.pad(x, sides, value=value)
