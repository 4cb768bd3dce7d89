"""Raw images, as cameras and decoders give them, in the place of normalized ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.errors import ConfigError
from lightning_linger.core.float32_state import Float32State

# What a first convolution reads: grey, RGB, RGB with a fourth channel.
CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class FirstConv:
    """The normalization of images, taken over by the convolution that reads them.

    Args:
        mean: Per channel, of images whose pixels are 0 to 1; each in [0, 1).
        std: Per channel, each in (0, 1].

    Raises:
        ConfigError: If a value is outside of its range, or the numbers of channels are not equal
            and one of 1, 3 and 4.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or not all(type(x) in (int, float) for x in values):
                msg = f"`firstconv`: {name} is a list of numbers. Found: {values!r}."
                raise ConfigError(msg)
            # Equal however it was written, in YAML or in a checkpoint.
            object.__setattr__(self, name, tuple(map(float, values)))
        if len(self.mean) != len(self.std) or len(self.mean) not in CHANNELS:
            msg = (
                f"`firstconv`: mean and std have one value per channel, {CHANNELS} of them. Found: "
                f"{len(self.mean)} and {len(self.std)}."
            )
            raise ConfigError(msg)
        if not all(0.0 <= mean < 1.0 for mean in self.mean):
            msg = f"`firstconv`: mean must be in [0, 1), of pixels 0 to 1. Found: {self.mean}."
            raise ConfigError(msg)
        if not all(0.0 < std <= 1.0 for std in self.std):
            msg = f"`firstconv`: std must be in (0, 1], of pixels 0 to 1. Found: {self.std}."
            raise ConfigError(msg)

    @staticmethod
    def parse(spec: Any) -> FirstConv:
        """Read a :class:`FirstConv` or a mapping with ``mean`` and ``std``."""
        if isinstance(spec, FirstConv):
            return spec
        if isinstance(spec, dict) and set(spec) == {"mean", "std"}:
            return FirstConv(**spec)
        msg = f"`firstconv` needs both mean and std, and nothing else. Found: {spec!r}."
        raise ConfigError(msg)

    def constants(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and std as float32 ``[C, 1, 1]``."""
        mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (self.mean, self.std))
        return mean, std

    @property
    def reach(self) -> float:
        """The largest magnitude of a normalized pixel."""
        ends = zip(self.mean, self.std, strict=True)
        return max(max(mean, 1.0 - mean) / std for mean, std in ends)

    def normalized(self, x: Tensor) -> Tensor:
        """Return the normalized image in float32.

        Args:
            x: Raw pixels 0 to 255, ``[..., C, H, W]``.
        """
        return normalized(x, *self.constants(x.device))


class RawImages(Float32State):
    """Normalizes raw images where a model reads them.

    Args:
        firstconv: The normalization.
        device: Of the model.

    Attributes:
        mean: float32 ``[C, 1, 1]``; not in the state of the model, whose plan has it.
        std: Likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, firstconv: FirstConv, device: torch.device) -> None:
        super().__init__()
        self.firstconv = firstconv
        mean, std = firstconv.constants(device)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """Return raw images normalized, in float32."""
        return normalized(raw, self.mean, self.std)


def normalized(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return ``(x / 255 - mean) / std`` in float32, as torchvision computes it."""
    return (x.float() / 255.0 - mean) / std


def is_raw(x: Tensor) -> bool:
    """Whether a tensor holds raw pixels; codes are signed, and normalized images real numbers."""
    return x.dtype == torch.uint8
