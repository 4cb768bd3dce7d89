"""Random numbers of stochastic rounding: a function of a seed, the forward and the place."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.capture import capturing
from lightning_linger.core.distributed import rank
from lightning_linger.core.rounding import Rounder, stochastic


class Noise(nn.Module):
    """Random numbers that a resumed run, and a forward repeated in backward, see again.

    They leave torch's own generators alone. Every number follows from the seed, the number of the
    training forward and the place it is used in, so two integers are all the state there is. In a
    graph capture, which cannot seed anything, torch's generator stands in.

    Args:
        seed: Of everything that is drawn.

    Attributes:
        forwards: How many training forwards have begun.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.forwards = 0

    def advance(self) -> None:
        """Begin another training forward."""
        if not capturing():
            self.forwards += 1

    def uniform(self, place: str, like: Tensor, shared: bool = False) -> Tensor:
        """Return float numbers from [0, 1), of the shape and on the device of ``like``.

        Args:
            place: Where they are used; another place gets others.
            like: Any tensor.
            shared: Whether all processes of a distributed run get the same numbers.
        """
        if capturing():
            return torch.rand_like(like)
        process = 0 if shared else rank()
        key = f"{self.seed}/{self.forwards}/{process}/{place}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        generator = torch.Generator(like.device)
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def rounder(self, place: str, shared: bool = False) -> Rounder:
        """Return stochastic rounding with the numbers of a place (see :meth:`uniform`)."""
        return functools.partial(self._round, place, shared)

    def _round(self, place: str, shared: bool, x: Tensor) -> Tensor:
        return stochastic(x, self.uniform(place, x, shared))

    def get_extra_state(self) -> Tensor:
        """Return the seed and the number of forwards."""
        return torch.tensor([self.seed, self.forwards])

    def set_extra_state(self, state: Any) -> None:
        """Go on behind the forward that a checkpoint was saved after."""
        self.seed, self.forwards = state.tolist()

    def extra_repr(self) -> str:
        """Show the seed."""
        return f"seed={self.seed}, forwards={self.forwards}"
