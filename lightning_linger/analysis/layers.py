"""What an engine runs: layers with their sizes, in the place of the model's own calls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_linger.core.tags import WIDEST_OPERAND

Shape = tuple[int, ...]

# Everything in the engines' memory starts at a multiple of so many bytes.
ALIGNMENT = 16


def aligned(size: int, to: int) -> int:
    """Round up to a multiple."""
    return -(-size // to) * to


def payload_bits(bits: int) -> int:
    """Return the width in which codes are stored."""
    return 8 if bits <= 8 else 16 if bits <= WIDEST_OPERAND else 32


@dataclass(frozen=True)
class Padding:
    """Zeros around a tensor that nobody has written yet.

    Args:
        site: The pad that asks for them.
        edges: How many before and behind each dimension.
    """

    site: str
    edges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Data:
    """A tensor between layers.

    Args:
        key: Identity of its memory; a reshape keeps it.
        shape: Its shape.
        bits: Width of its codes, None for plain values.
        constant: Whether it is a parameter or buffer of the model.
        padding: Zeros around it that a convolution may still take over; ``shape`` counts them.
    """

    key: Hashable
    shape: Shape
    bits: int | None = None
    constant: bool = False
    padding: Padding | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def per_sample(self, batch: int) -> int:
        """Return the number of elements of one sample of a batch."""
        return self.elements // batch if self.elements % batch == 0 else self.elements

    def bytes(self, batch: int) -> int:
        """Return the bytes that one sample of a batch takes, whole units of alignment."""
        width = 32 if self.bits is None else payload_bits(self.bits)
        return aligned(self.per_sample(batch) * width // 8, ALIGNMENT)

    def reshaped(self, shape: Shape) -> Data:
        """Return the same memory in another shape."""
        return dataclasses.replace(self, shape=shape)


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution or a pool, with one entry per spatial dimension.

    Args:
        kernel: Size of the window.
        stride: Step of the window.
        before: Zeros in front.
        after: Zeros behind.
        dilation: Spacing of the window.
    """

    kernel: Shape
    stride: Shape
    before: Shape
    after: Shape
    dilation: Shape

    def on_plane(self) -> Window:
        """Return a window on rows as one on maps with a height of 1."""
        return Window(
            kernel=(1, *self.kernel),
            stride=(1, *self.stride),
            before=(0, *self.before),
            after=(0, *self.after),
            dilation=(1, *self.dilation),
        )


@dataclass(frozen=True)
class Layer:
    """One op as an engine runs it; an op of the model may become several, or none.

    Args:
        site: Key of the call in the model.
        op: Kind of the op of the model.
        kind: What runs: ``conv``, ``linear``, ``max_pool`` ...
        inputs: What it reads, in order.
        outputs: What it writes.
        traits: What rules ask for: ``depthwise``, ``dilated`` ...
        facts: Further values that rules look at, by name.
        window: Geometry.
        channels: Input and output channels of one pass.
        weights: Shapes of its weights.
        biases: Entries of its biases, which have 32 bits.
        weight_bits: Width of its weights.
        macs: Multiplications with accumulation for one sample.
        batch: Samples that were recorded together; an engine takes one.
    """

    site: str
    op: str
    kind: str
    inputs: tuple[Data, ...] = ()
    outputs: tuple[Data, ...] = ()
    traits: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)
    window: Window | None = None
    channels: tuple[int, int] = (0, 0)
    weights: tuple[Shape, ...] = ()
    biases: int = 0
    weight_bits: int = 8
    macs: int = 0
    batch: int = 1

    @property
    def weight_elements(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.weights)

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return self.weight_elements + self.biases
