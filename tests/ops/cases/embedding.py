"""Embeddings."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Lambda
from tests.ops.cases.case import Case, Inputs


def tokens(**fields: Any) -> Any:
    """A layer behind an embedding of whole numbers."""

    def build(rng: random.Random) -> tuple[nn.Module, Inputs]:
        embedding = nn.Embedding(11, 6, **fields)
        embedding.weight.data.mul_(2.0 ** rng.randint(-3, 3))

        def forward(self: Any, x: Tensor) -> Any:
            found = self.embedding(x)
            return found, self.linear(found)

        model = Lambda(forward, embedding=embedding, linear=nn.Linear(6, 4))
        return model, (torch.randint(11, (3, 5)),)

    return build


def positions(rng: random.Random) -> tuple[nn.Module, Inputs]:
    """A position table that is added: the kind of sum that every transformer starts with."""

    def forward(self: Any, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).expand_as(x)
        return self.words(x) + F.embedding(places, self.places)

    model = Lambda(forward, words=nn.Embedding(9, 4), places=nn.Parameter(torch.randn(6, 4)))
    return model, (torch.randint(9, (2, 6)),)


CASES = [
    Case("embedding", "tokens", tokens(), gradient="finite", largest=1),
    Case("embedding", "padding", tokens(padding_idx=0), gradient="finite", largest=1),
    Case("embedding", "positions", positions, covers=("add",), gradient="finite", largest=1),
]
