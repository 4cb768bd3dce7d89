"""One node of the ``linger`` dialect on numpy arrays, and what the kernels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        if not is_power_of_two(scale):
            msg = f"{self.label}: {name} must be a power of two. Found: {scale}."
            raise UnsupportedError(msg)
        return 1.0 / scale

    def bits(self, name: str, default: int = 8) -> int:
        """Return a width."""
        return int(self.attributes.get(name, default))

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


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: int) -> Tensor:
    """Pad the trailing dimensions."""
    sides = [n for pair in reversed(list(zip(before, after, strict=True))) for n in pair]
    return F.pad(x, sides, value=value)
