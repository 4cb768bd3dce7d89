"""Packing padded sequences, padding packed ones, and making padded ones of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.capture import capturing
from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import code_limits
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.registry import Op
from lightning_linger.core.rounding import round_value
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_held_by, tag_of, with_tag
from lightning_linger.ops.common_step import at_common_step


class PackCall(NamedTuple):
    """Bound arguments of ``torch._pack_padded_sequence``."""

    input: Any
    lengths: Any
    batch_first: bool = False


class PackOp(Op):
    """``pack_padded_sequence``: moves values, and makes a list of batch sizes beside them."""

    output_scale = "inputs"

    def bind(self, *args: Any, **kwargs: Any) -> PackCall:
        """Bind ``(input, lengths, batch_first)``."""
        return PackCall(*args, **kwargs)

    def run_fake(self, site: Site, call: PackCall) -> Any:
        """Move real values."""
        return self._run(site, call, call.input)

    def run_integer(self, site: Site, call: PackCall) -> Any:
        """Move codes."""
        return self._run(site, call, integer_codes(call.input))

    def _run(self, site: Site, call: PackCall, x: Tensor) -> Any:
        tag = tag_of(call.input)
        if tag is None:
            return NotImplemented
        refuse_in_capture(site)
        data, batch_sizes = torch._pack_padded_sequence(x, call.lengths, call.batch_first)
        return with_tag(data, tag), batch_sizes


class PadPackedCall(NamedTuple):
    """Bound arguments of ``torch._pad_packed_sequence``."""

    data: Any
    batch_sizes: Any
    batch_first: bool
    padding_value: float
    total_length: int


class PadPackedOp(Op):
    """``pad_packed_sequence``: a padding value takes the nearest code of the data's grid."""

    output_scale = "inputs"

    def bind(self, *args: Any, **kwargs: Any) -> PadPackedCall:
        """Bind ``(data, batch_sizes, batch_first, padding_value, total_length)``."""
        return PadPackedCall(*args, **kwargs)

    def run_fake(self, site: Site, call: PadPackedCall) -> Any:
        """Pad real values with one on the grid."""
        tag = tag_of(call.data)
        if tag is None:
            return NotImplemented
        return self._run(site, call, call.data, _padding(site, call.padding_value, tag))

    def run_integer(self, site: Site, call: PadPackedCall) -> Any:
        """Pad codes with a code."""
        tag = tag_of(call.data)
        if tag is None:
            return NotImplemented
        code = _padding_code(site, call.padding_value, tag)
        return self._run(site, call, integer_codes(call.data), code)

    def _run(self, site: Site, call: PadPackedCall, data: Tensor, value: float) -> Any:
        tag = tag_held_by(call.data)
        refuse_in_capture(site)
        padded, lengths = torch._pad_packed_sequence(
            data, call.batch_sizes, call.batch_first, value, call.total_length
        )
        return with_tag(padded, tag), lengths


class PadSequenceCall(NamedTuple):
    """Bound arguments of ``torch._C._nn.pad_sequence``."""

    sequences: tuple[Any, ...]
    batch_first: bool = False
    padding_value: float = 0.0
    padding_side: str = "right"


class PadSequenceOp(Op):
    """``pad_sequence``: the sequences meet at the coarsest step among them."""

    output_scale = "inputs"

    def bind(self, sequences: Sequence[Any], *args: Any, **kwargs: Any) -> PadSequenceCall:
        """Bind ``(sequences, batch_first, padding_value, padding_side)``."""
        return PadSequenceCall(tuple(sequences), *args, **kwargs)

    def operands(self, call: PadSequenceCall) -> list[Any]:
        """All sequences."""
        return list(call.sequences)

    def run_fake(self, site: Site, call: PadSequenceCall) -> Any:
        """Pad real values with one on the grid."""
        found = self._at_one_step(site, call)
        if found is None:
            return NotImplemented
        sequences, tag = found
        return self._pad(call, sequences, _padding(site, call.padding_value, tag), tag)

    def run_integer(self, site: Site, call: PadSequenceCall) -> Any:
        """Pad codes with a code."""
        found = self._at_one_step(site, call)
        if found is None:
            return NotImplemented
        sequences, tag = found
        return self._pad(call, sequences, _padding_code(site, call.padding_value, tag), tag)

    def _at_one_step(self, site: Site, call: PadSequenceCall) -> tuple[list[Tensor], Tag] | None:
        operands = [site.operand(i, x) for i, x in enumerate(call.sequences)]
        found = [x for x in operands if x is not None]
        return at_common_step(site, found) if len(found) == len(operands) else None

    def _pad(
        self, call: PadSequenceCall, sequences: list[Tensor], value: float, tag: Tag
    ) -> Tensor:
        longest = max(len(x) for x in sequences)
        left = call.padding_side == "left"
        padded = []
        for x in sequences:
            missing = longest - len(x)
            sides = (missing, 0) if left else (0, missing)
            padded.append(F.pad(x, (0, 0) * (x.dim() - 1) + sides, value=value))
        # Not torch's own function: recorded, it writes into memory whose type a dialect changes.
        return with_tag(torch.stack(padded, 0 if call.batch_first else 1), tag)


def _padding(site: Site, value: float, tag: Tag) -> float:
    """Return a padding value on a grid."""
    return _padding_code(site, value, tag) * float(tag.step) if value else 0.0


def _padding_code(site: Site, value: float, tag: Tag) -> int:
    """Return the nearest code of a padding value."""
    if not value:
        return 0
    low, high = code_limits(tag.bits)
    return max(low, min(high, round_value(value / float(tag.step), site.rounding)))


def refuse_in_capture(site: Site) -> None:
    """Refuse to record what depends on the lengths of sequences.

    Raises:
        UnsupportedError: In a graph capture.
    """
    if capturing():
        msg = (
            f"`{site.key}`: a packed sequence cannot be recorded, its shape depends on "
            "the lengths. Export the layer on a padded sequence, without `pack_padded_sequence`."
        )
        raise UnsupportedError(msg)
