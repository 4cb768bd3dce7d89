"""What a case of the generic harness is, and short ways to build one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.models import Lambda

Inputs = tuple[Any, ...]
Build = Callable[[random.Random], tuple[nn.Module, Inputs]]

POWER_OF_TWO = ("venusa", "arcs", "venus", "mars")


@dataclass(frozen=True)
class Case:
    """One use of one op, in a model drawn at random.

    Args:
        kind: Kind of the op that the case is about.
        name: Tells the cases of a kind apart.
        build: Returns a fresh small model and its inputs; its first layer is usually a convolution
            or a linear layer, so that the op meets quantized operands. Draws from the generator it
            is given; torch's own generator is seeded as well.
        covers: Further kinds that the case exercises.
        platforms: The power-of-two platforms it runs on.
        refused: Where the export is refused, and a part of what the error says. Keys are a dialect
            (``linger``, ``qdq``), a platform (``venusa``, ``arcs``, ``venus``, ``onnxruntime``), or
            one of them with the width of the activations (``linger/16``, ``venusa/8``). The most
            particular key counts; None there says that it is exported.
        gradient: ``float``: inside the range the gradient is that of the float function on the same
            values; ``finite``: it is finite and zero outside the range (weights, quantizers inside
            the op); ``none``: the op has no gradient.
        optimizable: Whether onnxruntime, given power-of-two scales, computes the same integers with
            its optimizations off.
        why_float: Why the op is not quantized, if it never is: a part of what the summary says.
            What is around it still is.
        largest: Factor of the second evaluation input, which is to saturate; 1 leaves it away.
        finite: Whether float results are finite; a division by a code of 0 is not.
    """

    kind: str
    name: str
    build: Build
    covers: tuple[str, ...] = ()
    platforms: tuple[str, ...] = POWER_OF_TWO
    refused: Mapping[str, str | None] = field(default_factory=dict)
    gradient: Literal["float", "finite", "none"] = "float"
    optimizable: bool = True
    why_float: str | None = None
    largest: float = 40.0
    finite: bool = True

    @property
    def id(self) -> str:
        """Name in reports."""
        return f"{self.kind}-{self.name}"

    def refusal(self, dialect: str, platform: str, bits: int) -> str | None:
        """Return a part of what the export says, None where it must succeed."""
        for key in (f"{platform}/{bits}", f"{dialect}/{bits}", platform, dialect):
            if key in self.refused:
                return self.refused[key]
        return None


def randn(rng: random.Random, *shape: int) -> Tensor:
    """Normal values, at a magnitude between 1/8 and 8."""
    return torch.randn(shape) * 2.0 ** rng.randint(-3, 3)


def on_convs(
    function: Callable[..., Any], operands: int = 1, shape: Sequence[int] = (3, 4, 8, 8)
) -> Build:
    """A function of the results of convolutions of the input, at different magnitudes.

    Args:
        function: Takes ``operands`` tensors of ``shape``.
        operands: How many.
        shape: Of the input and of each operand, ``[N, C, spatial ...]``.
    """

    def build(rng: random.Random) -> tuple[nn.Module, Inputs]:
        conv = getattr(nn, f"Conv{len(shape) - 2}d")
        convs = nn.ModuleList(
            conv(shape[1], shape[1], 3, padding=1, bias=rng.random() < 0.5) for _ in range(operands)
        )
        for layer in convs:
            layer.weight.data.mul_(2.0 ** rng.randint(-2, 2))

        def forward(self: Any, x: Tensor) -> Any:
            return function(*(layer(x) for layer in self.convs))

        return Lambda(forward, convs=convs), (randn(rng, *shape),)

    return build


def on_linears(
    function: Callable[..., Any], operands: int = 1, shape: Sequence[int] = (5, 6)
) -> Build:
    """A function of the results of linear layers of the input, of any rank."""

    def build(rng: random.Random) -> tuple[nn.Module, Inputs]:
        layers = nn.ModuleList(nn.Linear(shape[-1], shape[-1]) for _ in range(operands))
        for layer in layers:
            layer.weight.data.mul_(2.0 ** rng.randint(-2, 2))

        def forward(self: Any, x: Tensor) -> Any:
            return function(*(layer(x) for layer in self.linears))

        return Lambda(forward, linears=layers), (randn(rng, *shape),)

    return build


def layer(make: Callable[[], nn.Module], shape: Sequence[int]) -> Build:
    """A layer, or a model, on a random input."""
    return lambda rng: (make(), (randn(rng, *shape),))
