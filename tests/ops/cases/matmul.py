"""Matrix products of activations, and of activations with weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import Lambda
from tests.ops.cases.case import Case, Inputs, on_convs, on_linears, randn


def with_weight(
    function: Callable[[Tensor, Tensor], Any], weight: tuple[int, ...], shape: tuple[int, ...]
) -> Any:
    """A function of a linear layer's result and of a parameter."""

    def build(rng: random.Random) -> tuple[nn.Module, Inputs]:
        own = nn.Parameter(torch.randn(weight) * 2.0 ** rng.randint(-3, 2))

        def forward(self: Any, x: Tensor) -> Any:
            return function(self.linear(x), self.own)

        layers = {"linear": nn.Linear(shape[-1], shape[-1]), "own": own}
        return Lambda(forward, **layers), (randn(rng, *shape),)

    return build


def with_buffer(rng: random.Random) -> tuple[nn.Module, Inputs]:
    """A fixed matrix, such as a filter bank, in front of everything else."""
    model = Lambda(lambda self, x: self.linear(x @ self.bank), linear=nn.Linear(5, 4))
    model.register_buffer("bank", torch.randn(7, 5))
    return model, (randn(rng, 3, 7),)


def addmm(rng: random.Random) -> tuple[nn.Module, Inputs]:
    """What GPT-2 calls a one-dimensional convolution."""

    def forward(self: Any, x: Tensor) -> Tensor:
        flat = self.linear(x).view(-1, x.size(-1))
        return torch.addmm(self.bias, flat, self.own).view(*x.size()[:-1], -1)

    layers = {
        "linear": nn.Linear(6, 6),
        "own": nn.Parameter(torch.randn(6, 4) * 0.5),
        "bias": nn.Parameter(torch.randn(4)),
    }
    return Lambda(forward, **layers), (randn(rng, 3, 5, 6),)


def heads(a: Tensor, b: Tensor) -> Tensor:
    q, k = (x.view(2, 6, 2, 4).transpose(1, 2) for x in (a, b))
    return q @ k.transpose(-1, -2)


STACK = (3, 4, 6)

CASES = [
    Case("bmm", "stack", on_linears(lambda a, b: torch.bmm(a, b.mT), 2, STACK)),
    Case("bmm", "itself", on_linears(lambda a: a.bmm(a.transpose(1, 2)), 1, STACK)),
    Case("matmul", "matrices", on_linears(lambda a, b: a @ b.T, 2)),
    Case("matmul", "relu", on_linears(lambda a, b: torch.relu(torch.mm(a, b.t())), 2)),
    Case("matmul", "heads", on_linears(heads, 2, (2, 6, 8))),
    Case("matmul", "maps", on_convs(lambda a, b: a @ b, 2)),
    Case("matmul", "broadcast", on_linears(lambda a, b: a.unsqueeze(1) @ b.mT, 2, STACK)),
    Case("matmul", "one_matrix", on_linears(lambda a, b: torch.matmul(a, b[0].T), 2, STACK)),
    Case("matmul", "first_matrix", on_linears(lambda a, b: torch.matmul(a[0], b.mT), 2, STACK)),
    Case("matmul", "vector", on_linears(lambda a, b: a @ b[0, 0], 2, STACK)),
    Case("matmul", "from_vector", on_linears(lambda a, b: torch.matmul(a[0, 0], b.mT), 2, STACK)),
    Case("matmul", "mv", on_linears(lambda a, b: torch.mv(a, b[0]), 2)),
    Case("matmul", "dot", on_linears(lambda a, b: torch.dot(a[0], b[1]), 2)),
    Case("matmul", "long", on_linears(lambda a, b: a.view(1, -1) @ b.view(-1, 1), 2, (40, 30))),
    Case(
        "matmul",
        "plain_operand",
        on_linears(lambda a: a @ (torch.arange(12.0).view(6, 2) - 3.0)),
    ),
    Case(
        "matmul",
        "weight",
        with_weight(lambda x, w: x @ w, (6, 4), (3, 5, 6)),
        gradient="finite",
    ),
    Case(
        "matmul",
        "weight_first",
        with_weight(lambda x, w: w @ x, (4, 5), (3, 5, 6)),
        gradient="finite",
    ),
    Case(
        "matmul",
        "weight_vector",
        with_weight(lambda x, w: x @ w, (6,), (3, 5, 6)),
        gradient="finite",
    ),
    Case("matmul", "buffer", with_buffer, gradient="finite"),
    Case(
        "matmul",
        "weight_stack",
        with_weight(lambda x, w: x @ w, (3, 6, 4), (3, 5, 6)),
        gradient="finite",
    ),
    Case(
        "einsum",
        "attention",
        on_linears(lambda a, b: torch.einsum("bqd,bkd->bqk", a, b), 2, STACK),
    ),
    Case(
        "einsum",
        "several",
        on_convs(lambda a, b: torch.einsum("nchw, ncvw -> nhvc", a, b), 2, (2, 4, 5, 6)),
    ),
    Case("einsum", "dots", on_linears(lambda a, b: torch.einsum("...ij,...kj", [a, b]), 2, STACK)),
    Case("einsum", "outer", on_linears(lambda a, b: torch.einsum("i,j", a[0], b[0]), 2)),
    Case(
        "einsum",
        "weight",
        with_weight(lambda x, w: torch.einsum("btd,dhk->bhtk", x, w), (6, 2, 3), (3, 5, 6)),
        gradient="finite",
    ),
    Case(
        "einsum",
        "weight_first",
        with_weight(
            lambda x, w: torch.einsum("dkh,bthk->btd", w, x.unflatten(-1, (3, 2))),
            (4, 2, 3),
            (2, 5, 6),
        ),
        gradient="finite",
    ),
    Case("addmm", "gpt2", addmm, gradient="finite"),
]
