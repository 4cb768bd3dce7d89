"""A model that several tests of NICS-fix's functions share."""

from typing import Any

import torch
from torch import Tensor, nn

import lightning_linger as linger
from tests.models import Chain


class Cell(nn.Module):
    """A container in a container, with calls of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


def batch(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))


def network(**fields: Any) -> tuple[Chain, Tensor]:
    """Return a quantized model, whose ranges one training forward has moved, and its input."""
    torch.manual_seed(0)
    model = Chain(nn.Conv2d(3, 4, 3), nn.ReLU(), Cell(), nn.Flatten(), nn.Linear(64, 5))
    x = batch()
    linger.prepare(model, (x,))
    linger.quantize(model, linger.preset("nics_fix", **fields))
    model(x)
    return model, x


def train(model: nn.Module, steps: int, lr: float = 0.05, seed: int = 0) -> None:
    """Train on batches of very different size, which moves every range that may move."""
    optimizer = torch.optim.SGD(linger.parameter_groups(model), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        factor = float(0.2 + 6 * torch.rand((), generator=generator))
        optimizer.zero_grad()
        model(batch() * factor).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
