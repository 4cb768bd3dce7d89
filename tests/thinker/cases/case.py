"""A case, and what cases are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import Chain, Lambda

PLATFORMS = ("venusa", "arcs", "venus")
ENGINES = {"venusa": "venusA", "arcs": "arcs", "venus": "venus"}


@dataclass(frozen=True)
class Refused:
    """A model that does not become an image.

    Args:
        by: ``packer``, or ``export`` where the file is not written at all.
        match: A part of its message.
        why: The reason, for the page.
    """

    by: str
    match: str
    why: str


@dataclass(frozen=True)
class PackCase:
    """One model.

    Args:
        name: Of the test.
        text: What the page calls it.
        build: Returns a fresh model.
        inputs: Returns its inputs, a batch of one.
        vectors: Prefixes of recorded vectors that hold the same op.
        refused: By platform; the others pack.
        wrong: By platform, what the engine is known to do wrong with the image.
        fields: Of the configuration.
        fold: Whether to fold batch norms.
    """

    name: str
    text: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    vectors: tuple[str, ...] = ()
    refused: Mapping[str, Refused] = field(default_factory=dict)
    wrong: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    fold: bool = True

    @property
    def refused_by_export(self) -> bool:
        """Whether no file is written for any platform, for one reason."""
        reasons = [self.refused.get(platform) for platform in PLATFORMS]
        first = reasons[0]
        return first is not None and first.by == "export" and reasons == [first] * len(PLATFORMS)


def everywhere(by: str, match: str, why: str) -> dict[str, Refused]:
    return dict.fromkeys(PLATFORMS, Refused(by, match, why))


def image(channels: int = 4, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(1, channels, size, size)


def line(channels: int = 4, length: int = 16) -> Callable[[], Tensor]:
    return lambda: torch.randn(1, channels, length)


def rows(*sizes: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(1, *sizes)


def chain(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Chain(*[layer() for layer in layers])


def conv(*arguments: int, **keywords: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*arguments, **keywords)


def on_conv(
    run: Callable[[Any, Tensor], Any], **layers: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    """A function of what a convolution from 4 to 4 channels gives, and of the input."""

    def build() -> nn.Module:
        made = {name: layer() for name, layer in layers.items()}
        return Lambda(run, conv=nn.Conv2d(4, 4, 3), other=nn.Conv2d(4, 4, 3), **made)

    return build


def on_linear(
    run: Callable[[Any, Tensor], Any], **layers: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    """A function of what a linear layer from 16 to 16 features gives."""

    def build() -> nn.Module:
        made = {name: layer() for name, layer in layers.items()}
        return Lambda(run, fc=nn.Linear(16, 16), other=nn.Linear(16, 16), **made)

    return build


# --- reasons ----------------------------------------------------------------------------------

KERNEL_OF_5 = "kernels of up to 5 x 5"
NO_DILATION = "no dilation"
PACKER_KERNEL = Refused("packer", "exceed", KERNEL_OF_5)


def refused_kernel(*platforms: str) -> dict[str, Refused]:
    return dict.fromkeys(platforms, PACKER_KERNEL)
