"""Ranges and steps of a model of another type stay float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_linger.core.float32_state import Float32State


class Range(Float32State):
    """A learned value, a measured one, a count, and a module of the user's."""

    bound: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(2.0**-20))
        self.register_parameter("offset", None)
        self.register_buffer("bound", torch.tensor(1e6))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("unknown", None)
        self.layer = nn.Linear(1, 1)


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to("cpu", torch.float16),
    "module around it": lambda module: nn.Sequential(module).half()[0],
}


@pytest.mark.parametrize("move", MOVES)
def test_own_state_keeps_type_and_value(move: str) -> None:
    """Half precision would make 2^-20 less exact, and 1e6 infinite."""
    module = Range()
    step = module.step
    moved = MOVES[move](module)
    assert moved is module
    assert module.step is step
    assert module.step.dtype == module.bound.dtype == torch.float32
    assert module.count.dtype == torch.int64
    assert (module.step.item(), module.bound.item(), module.count.item()) == (2.0**-20, 1e6, 3)
    assert module.layer.weight.dtype != torch.float32


def test_own_state_follows_the_model_to_its_device() -> None:
    """Where a model is made on the meta device, its ranges are described there too."""
    module = Range().to("meta")
    assert module.step.device == module.bound.device == module.layer.weight.device
    assert module.bound.device.type == "meta"
