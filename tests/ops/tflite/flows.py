"""What an integer forward computes, call by call, in the codes that an engine stores."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.calls import Event
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_of
from tests.models import train

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Stored:
    """A tensor as an engine stores it."""

    codes: Ints
    scale: float
    zero: int
    bits: int

    @staticmethod
    def of(x: Tensor) -> "Stored":
        tag = tag_of(x)
        assert isinstance(tag, Tag)
        assert isinstance(tag.step, float)
        assert np.float32(tag.step) == tag.step
        zero = int(tag.zero_point or 0)
        codes = (integer_codes(x).long() + zero).numpy()
        return Stored(codes, tag.step, zero, tag.width)

    @property
    def centred(self) -> Ints:
        return self.codes - self.zero


@dataclass(frozen=True)
class Ran:
    """One call: its operands and its result."""

    site: Site
    operands: list[Stored]
    result: Stored


def quantized(
    model: nn.Module, *inputs: Tensor, platform: str = "tflite", steps: int = 3, **fields: Any
) -> nn.Module:
    """A model in evaluation, whose ranges a few batches have moved."""
    linger.prepare(model, inputs)
    overrides = fields.pop("overrides", None)
    linger.quantize(model, QuantConfig(platform=platform, **fields), overrides=overrides)
    train(model, inputs, steps, 0.0)
    return model.eval()


@torch.no_grad()
def calls(model: nn.Module, *inputs: Tensor) -> dict[str, Ran]:
    """Run in integers; the calls whose result is codes, by kind of their op.

    A layer whose operand is not on a grid yet is a ``first`` one.
    """
    found: dict[str, Ran] = {}

    def tap(event: Event) -> None:
        leaves = torch.utils._pytree.tree_leaves(tuple(event.call))
        operands = [x for x in leaves if isinstance(x, Tensor) and tag_of(x) is not None]
        if isinstance(event.result, Tensor) and tag_of(event.result) is not None:
            kind = event.site.op.kind if operands else f"first {event.site.op.kind}"
            while kind in found:
                kind += "+"
            found[kind] = Ran(event.site, list(map(Stored.of, operands)), Stored.of(event.result))

    instrumentation = instrumentation_of(model)
    instrumentation.tap = tap
    try:
        with linger.integer(model):
            model(*inputs)
    finally:
        instrumentation.tap = None
    return found


def prepared(site: Site) -> tuple[Ints, Ints | None, list[float]]:
    """The codes of a layer's weight and bias, and the weight's scales."""
    found = site.prepared["weights"]
    bias = None if found.bias_codes is None else found.bias_codes.numpy().astype(np.int64)
    return found.codes.numpy().astype(np.int64), bias, found.steps
