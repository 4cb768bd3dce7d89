"""What is on at the moment: in a model as a whole, and which parts of a site are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_linger.core.config import FuseMode

FrozenPart = Literal["activations", "weights", "statistics", "gradients"]
FROZEN_PARTS: tuple[FrozenPart, ...] = ("activations", "weights", "statistics", "gradients")

FloatPart = Literal["activations", "weights", "biases", "statistics"]
FLOAT_PARTS: tuple[FloatPart, ...] = ("activations", "weights", "biases", "statistics")


@dataclass(frozen=True)
class RoundedParameter:
    """A parameter as a forward has used it.

    Args:
        site: Key of the site.
        name: Of the weight, as its step is called, or ``bias``.
        source: The parameter, or the part of one; None for what folding has made up.
        values: On the grid, detached.
        step: Of the values, 0-dim or one per channel.
    """

    site: str
    name: str
    source: Tensor | None
    values: Tensor
    step: Tensor


@dataclass
class Switches:
    """What is on at the moment; one object shared by all sites of a model.

    Args:
        fuse: Whether batch norms are folded.
        fuse_mode: How.
        normalize: Whether range limits act.
        quantize: Whether quantizers act.
        watch: Whether float forwards in training mode move the ranges, ahead of quantization.
        system: In which number system quantized sites run: ``float``, ``fake`` or ``integer``.
        observing: Whether a training forward moves the ranges.
        rounded: Collects the parameters that evaluation forwards round, None to collect nothing.
        recomputing: Whether this forward is repeated during backward (activation checkpointing);
            it must see the ranges of the first time.
    """

    fuse: bool = False
    fuse_mode: FuseMode = "running"
    normalize: bool = False
    quantize: bool = False
    watch: bool = False
    system: str = "fake"
    observing: bool = True
    recomputing: bool = False
    rounded: list[RoundedParameter] | None = None

    @property
    def learning(self) -> bool:
        """Whether a forward in training mode moves ranges now."""
        return self.observing and not self.recomputing

    @property
    def any_stage(self) -> bool:
        """Whether some stage is on."""
        return self.fuse or self.normalize or self.quantize or self.watch
