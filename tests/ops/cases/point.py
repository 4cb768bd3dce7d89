"""Quantization points that a user placed."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_linger.nn import FakeQuantize
from tests.ops.cases.case import Build, Case, layer


def between(**fields: Any) -> Build:
    """A point between a layer and what reads it."""
    return layer(
        lambda: nn.Sequential(nn.Linear(6, 6), FakeQuantize(**fields), nn.ReLU(), nn.Linear(6, 4)),
        (5, 6),
    )


NARROW = {"linger/16": "the engine changes the step of 8-bit codes only"}

CASES = [
    Case("quantization_point", "same", between(), refused=NARROW),
    Case("quantization_point", "range", between(range=1.0), refused=NARROW),
    Case("quantization_point", "learned", between(range="lsq"), gradient="finite", refused=NARROW),
    Case(
        "quantization_point",
        "first",
        layer(lambda: nn.Sequential(FakeQuantize(range=2.0), nn.Linear(6, 4)), (5, 6)),
    ),
]
