"""Tags: what a tensor that flows between quantized ops carries about its quantization."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_linger.core.fake_quantize import Bound, Scalar

_ATTRIBUTE = "_linger_tag"

# Codes of more bits do not fit float32; such a value is an end, not an input of another integer op.
WIDEST_OPERAND = 16


@dataclass(frozen=True)
class Tag:
    """Quantization parameters of a tensor: ``real = step * code``.

    Args:
        step: The scale; a float once it is frozen, a 0-dim tensor while ranges move.
        bits: Width of the codes that flow: one more than the engine stores on an affine grid.
        site: Key of the site whose quantizer made the tensor.
        dtype: The floating dtype that the model's own code sees.
        zero_point: What an engine adds to a code to store it, so that real zero is stored as it: a
            number or, while ranges move, a 0-dim tensor; None on a symmetric grid.
        reach: Largest magnitude the codes are there to cover; a step that a platform made coarser
            covers more. None if unknown.
        rounded: Whether the values are on the grid; those of a quantizer that is told to leave them
            in float are not.
    """

    step: Scalar
    bits: int
    site: str
    dtype: torch.dtype = torch.float32
    zero_point: Bound | None = None
    reach: Scalar | None = None
    rounded: bool = True

    @property
    def affine(self) -> bool:
        """Whether an engine stores the codes with a zero point."""
        return self.zero_point is not None

    @property
    def width(self) -> int:
        """Width of what an engine stores."""
        return self.bits - int(self.affine)

    @property
    def limits(self) -> tuple[Bound, Bound]:
        """The smallest and the largest code that an engine can store."""
        return storable_codes(self.bits, self.zero_point)

    def at(self, site: str) -> Tag:
        """Return the tag of a tensor that another site has made on the same grid.

        Args:
            site: Its key.
        """
        return dataclasses.replace(self, site=site)


def storable_codes(bits: int, zero_point: Bound | None) -> tuple[Bound, Bound]:
    """Return the smallest and the largest code that an engine can store.

    Args:
        bits: Width of the codes that flow.
        zero_point: See :class:`Tag`.
    """
    if zero_point is None:
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return -(1 << (bits - 2)) - zero_point, (1 << (bits - 2)) - 1 - zero_point


def tag_of(x: object) -> Tag | None:
    """Return the tag of ``x``, None if it carries plain values (or is not a tensor)."""
    return getattr(x, _ATTRIBUTE, None) if isinstance(x, Tensor) else None


def tag_held_by(x: Tensor) -> Tag:
    """Return the tag of a tensor that must have one, as operands and results of sites do.

    Raises:
        RuntimeError: If it has none, which is an error of the library.
    """
    tag = tag_of(x)
    if tag is None:
        msg = "internal: the tensor carries no tag."
        raise RuntimeError(msg)
    return tag


def with_tag(x: Tensor, tag: Tag) -> Tensor:
    """Set the tag of ``x`` and return ``x``."""
    setattr(x, _ATTRIBUTE, tag)
    return x


def with_tag_of(source: Tensor, x: Tensor) -> Tensor:
    """Set the tag of ``source``, if it has one, on ``x`` and return ``x``."""
    tag = tag_of(source)
    return x if tag is None else with_tag(x, tag)


def drop_tag(x: Tensor) -> None:
    """Make ``x`` plain again."""
    if hasattr(x, _ATTRIBUTE):
        delattr(x, _ATTRIBUTE)


def takes_activations(args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Whether a call works on activations, rather than on counters, indices or masks.

    Only such calls are counted: a batch norm's ``num_batches_tracked += 1`` happens in training
    alone and must not shift the numbers of the calls after it.
    """
    for value in (*args, *kwargs.values()):
        for x in value if isinstance(value, list | tuple) else (value,):
            if isinstance(x, Tensor) and (x.dtype.is_floating_point or tag_of(x) is not None):
                return True
    return False
