"""Choosing by masks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import Lambda
from tests.ops.cases.case import Case, Inputs, on_linears, randn

COMPUTED = {"linger": "the engine has no selection"}


def with_mask(
    function: Callable[..., Any], operands: int = 1, shape: tuple[int, ...] = (3, 6)
) -> Any:
    """A function of a mask that is a buffer, and of results of linear layers."""

    def build(rng: random.Random) -> tuple[nn.Module, Inputs]:
        layers = nn.ModuleList(nn.Linear(shape[-1], shape[-1]) for _ in range(operands))
        for linear in layers:
            linear.weight.data.mul_(2.0 ** rng.randint(-2, 2))

        def forward(self: Any, x: Tensor) -> Any:
            return function(self.mask, *(linear(x) for linear in self.linears))

        model = Lambda(forward, linears=layers)
        model.register_buffer("mask", torch.rand(shape[-2:]) < 0.5)
        return model, (randn(rng, *shape),)

    return build


def given(rng: random.Random) -> tuple[nn.Module, Inputs]:
    """A mask among the model's inputs."""
    model = Lambda(
        lambda self, x, mask: self.linear(x).masked_fill(mask, -1e9), linear=nn.Linear(6, 6)
    )
    return model, (randn(rng, 4, 6), torch.rand(4, 6) < 0.5)


CASES = [
    Case("masked_fill", "infinite", with_mask(lambda m, a: a.masked_fill(m, -math.inf))),
    Case("masked_fill", "zero", with_mask(lambda m, a: a.masked_fill(~m, 0), shape=(2, 3, 6))),
    Case("masked_fill", "beyond", with_mask(lambda m, a: torch.masked_fill(a, m, 300.0))),
    Case("masked_fill", "high", with_mask(lambda m, a: a.masked_fill(m, math.inf))),
    Case(
        "masked_fill",
        "softmax",
        with_mask(lambda m, a: a.masked_fill(m, torch.finfo(a.dtype).min).softmax(-1)),
        covers=("softmax",),
        refused={"linger/16": "takes and gives 8 bits"},
    ),
    Case("masked_fill", "given", given, refused=COMPUTED),
    Case("where", "tensors", with_mask(torch.where, 2)),
    Case("where", "method", with_mask(lambda m, a, b: a.where(m[0], b), 2)),
    Case("where", "number", with_mask(lambda m, a: torch.where(m, 1.25, a))),
    Case("where", "scalar", with_mask(lambda m, a: torch.where(m, a, torch.tensor(-1e4)))),
    Case(
        "where",
        "computed",
        on_linears(lambda a, b: torch.where(a > b, a, b), 2),
        gradient="finite",
        refused=COMPUTED,
    ),
]
