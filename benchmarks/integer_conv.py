"""Engines for an exact integer convolution of 8-bit codes: time and exactness."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Call, Effort, Row, compare, meter

LOW, HIGH = -128, 127
# float32 holds every whole number below this one.
EXACT_FLOAT32 = 2**24


@dataclass(frozen=True)
class Shape:
    """A 3x3 convolution with as many channels out as in, which keeps the size of the image."""

    channels: int
    size: int
    groups: int = 1

    def operands(self, low: int, high: int, batch: int) -> tuple[Tensor, Tensor]:
        """Return a random input and weight of whole numbers from ``low`` to ``high``."""
        x = torch.randint(low, high + 1, (batch, self.channels, self.size, self.size))
        weight = torch.randint(low, high + 1, (self.channels, self.channels // self.groups, 3, 3))
        return x, weight


SHAPES = {
    "16->16 at 32x32": Shape(16, 32),
    "64->64 at 8x8": Shape(64, 8),
    "depthwise 64 at 16x16": Shape(64, 16, groups=64),
    "256->256 at 8x8": Shape(256, 8),
}

Engine = Callable[[Tensor, Tensor, int], Tensor]


def convolve(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Convolve in the dtype of the operands."""
    return F.conv2d(x, weight, padding=1, groups=groups)


def in_chunks(total: torch.dtype) -> Engine:
    """Return an engine that convolves few enough channels at a time and adds in ``total``."""

    def engine(x: Tensor, weight: Tensor, groups: int) -> Tensor:
        channels = (EXACT_FLOAT32 - 1) // LOW**2 // weight[0, 0].numel()
        if weight.shape[1] <= channels:
            return convolve(x, weight, groups).to(total)
        chunks = zip(x.split(channels, 1), weight.split(channels, 1), strict=True)
        first, *others = (convolve(*chunk, groups).to(total) for chunk in chunks)
        return sum(others, first)

    return engine


# Each engine with the dtype of its operands.
ENGINES: dict[str, tuple[Engine, torch.dtype]] = {
    "float32": (convolve, torch.float32),
    "float32 chunks, float64 sum": (in_chunks(torch.float64), torch.float32),
    "float32 chunks, int64 sum": (in_chunks(torch.int64), torch.float32),
    "float64": (convolve, torch.float64),
    "int32": (convolve, torch.int32),
}


def wrong_share(engine: Engine, dtype: torch.dtype, shape: Shape) -> float:
    """Return the share of outputs that differ from int64 on codes near the ends of the range."""
    shares = []
    for low, high in ((LOW, LOW + 7), (HIGH - 7, HIGH)):
        x, weight = shape.operands(low, high, batch=2)
        out = engine(x.to(dtype), weight.to(dtype), shape.groups)
        wrong = out.to(torch.int64) != convolve(x, weight, shape.groups)
        shares.append(wrong.double().mean().item())
    return max(shares)


def measure_shape(name: str, effort: Effort) -> list[Row]:
    """Compare the engines on one shape with the float32 convolution of the same codes."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    codes = shape.operands(LOW, HIGH, batch=8 if effort.quick else 64)

    def call(engine: Engine, dtype: torch.dtype) -> Call:
        x, weight = (operand.to(dtype) for operand in codes)
        return lambda: engine(x, weight, shape.groups)

    notes = {}
    for label, how in ENGINES.items():
        share = wrong_share(*how, shape)
        notes[label] = f"{share:.1%} wrong" if share else "exact"
    return compare(
        f"convolution {name} / float32",
        meter(call(*ENGINES["float32"])),
        {label: meter(call(*how)) for label, how in ENGINES.items()},
        effort.rounds,
        notes,
    )


def measure(effort: Effort) -> list[Row]:
    """Compare the engines on every shape."""
    return [row for name in SHAPES for row in measure_shape(name, effort)]
