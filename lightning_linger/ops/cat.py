"""Concatenation and stacking: the result takes the coarsest step among its operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.fake_quantize import Scalar, fake_quantize
from lightning_linger.core.integer import (
    code_limits,
    divide_by_scale,
    integer_op,
    payload_dtype,
    rescale,
)
from lightning_linger.core.payload import integer_codes, step_of
from lightning_linger.core.quantizer import readable
from lightning_linger.core.registry import Op, register
from lightning_linger.core.rounding import ROUNDINGS
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by, tag_of, with_tag
from lightning_linger.ops.arguments import refused_arguments
from lightning_linger.ops.common_step import at_common_step
from lightning_linger.ops.pairs import multiplies


class CatCall(NamedTuple):
    """Bound arguments of ``torch.cat`` and its relatives."""

    tensors: tuple[Tensor, ...]
    dim: int = 0
    refused: str | None = None


# Brings the operands into the shapes that are concatenated, and says along which dimension.
Arrange = Callable[[list[Tensor], int], tuple[list[Tensor], int]]


@integer_op("linger::cat")
def integer_cat(
    tensors: Sequence[Tensor],
    dim: int,
    scales: Sequence[float],
    scale_o: float,
    bits_o: int,
    rounding: str,
    platform: str,
) -> Tensor:
    """Bring every operand to the output scale, then concatenate along ``dim``."""
    dtype = payload_dtype(bits_o)
    limits = code_limits(bits_o)

    def at_output_scale(x: Tensor, scale: float) -> Tensor:
        if scale == scale_o and x.dtype == dtype:
            return x
        if multiplies(platform):  # dequantize, quantize
            real = divide_by_scale(x.float() * scale, scale_o)
            return ROUNDINGS[rounding](real).clamp_(*limits).to(dtype)
        return rescale(x.double(), scale / scale_o, *limits, rounding).to(dtype)

    return torch.cat([at_output_scale(x, s) for x, s in zip(tensors, scales, strict=True)], dim)


@integer_cat.register_fake
def _(
    tensors: Sequence[Tensor],
    dim: int,
    scales: Sequence[float],
    scale_o: float,
    bits_o: int,
    *_: object,
) -> Tensor:
    return torch.cat([x.to(payload_dtype(bits_o)) for x in tensors], dim)


class JoinOp(Op):
    """``cat``, ``stack`` and relatives.

    Args:
        kind: Canonical op name.
        arrange: How the function differs from ``torch.cat``.
    """

    output_scale = "inputs"

    def __init__(self, kind: str, arrange: Arrange) -> None:
        super().__init__(kind)
        self._arrange = arrange

    def bind(self, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> CatCall:
        """Bind ``(tensors, dim)``; ``axis`` is numpy's name of ``dim``."""
        dim = kwargs.pop("axis", dim)
        return CatCall(tuple(tensors), dim, refused_arguments(kwargs))

    def operands(self, call: CatCall) -> list[Any]:
        """All tensors."""
        return list(call.tensors)

    def obstacle(self, call: CatCall) -> str | None:
        """``out=`` writes where nothing is on a grid."""
        return call.refused

    def run_fake(self, site: Site, call: CatCall) -> Any:
        """Round every operand to the common step, then join."""
        parts = self._parts(site, call)
        if parts is None:
            return NotImplemented
        if _has_zero_point(parts):
            moved, common = at_common_step(site, parts)
            return with_tag(torch.cat(*self._arrange(moved, call.dim)), common)
        step = _coarsest([step_of(x) for x in parts])
        tag = tag_held_by(parts[0])
        usable = readable(step)
        limits = code_limits(tag.bits)
        rounded = [
            x if step_of(x) is step else fake_quantize(x, usable, *limits, site.rounding)
            for x in parts
        ]
        tag = dataclasses.replace(tag, step=step, site=site.key, reach=_farthest(parts))
        return with_tag(torch.cat(*self._arrange(rounded, call.dim)), tag)

    def run_integer(self, site: Site, call: CatCall) -> Any:
        """Call ``linger::cat``."""
        parts = self._parts(site, call)
        if parts is None:
            return NotImplemented
        if _has_zero_point(parts):
            moved, common = at_common_step(site, parts)
            parts = [with_tag(x, common) for x in moved]
        steps = [float(step_of(x)) for x in parts]
        tag = tag_held_by(parts[0])
        arranged, dim = self._arrange([integer_codes(x) for x in parts], call.dim)
        codes = integer_cat(
            arranged,
            dim,
            steps,
            max(steps),
            tag.bits,
            site.rounding,
            site.platform_name,
        )
        tag = dataclasses.replace(tag, step=max(steps), site=site.key, reach=_farthest(parts))
        return with_tag(codes, tag)

    def _parts(self, site: Site, call: CatCall) -> list[Tensor] | None:
        parts = [site.operand(position, x) for position, x in enumerate(call.tensors)]
        found = [x for x in parts if x is not None]
        return found if len(found) == len(parts) else None


def _has_zero_point(parts: list[Tensor]) -> bool:
    return any(tag is not None and tag.affine for tag in map(tag_of, parts))


def _farthest(parts: list[Tensor]) -> Scalar | None:
    reaches = [tag.reach for tag in map(tag_of, parts) if tag is not None]
    known = [reach for reach in reaches if reach is not None]
    return _coarsest(known) if len(known) == len(parts) else None


def _coarsest(steps: list[Scalar]) -> Scalar:
    coarsest = steps[0]
    for step in steps[1:]:
        if isinstance(coarsest, float) and isinstance(step, float):
            coarsest = coarsest if coarsest >= step else step
        else:
            coarsest = torch.maximum(torch.as_tensor(coarsest), torch.as_tensor(step))
    return coarsest


# --- the ways to join -------------------------------------------------------------------------


def _cat(parts: list[Tensor], dim: int) -> tuple[list[Tensor], int]:
    return parts, dim


def _stack(parts: list[Tensor], dim: int) -> tuple[list[Tensor], int]:
    return [x.unsqueeze(dim) for x in parts], dim


def _hstack(parts: list[Tensor], dim: int) -> tuple[list[Tensor], int]:
    arranged = [x.reshape(1) if x.dim() == 0 else x for x in parts]
    return arranged, min(arranged[0].dim() - 1, 1)


def _vstack(parts: list[Tensor], dim: int) -> tuple[list[Tensor], int]:
    return [x.reshape(1, -1) if x.dim() < 2 else x for x in parts], 0


def _dstack(parts: list[Tensor], dim: int) -> tuple[list[Tensor], int]:
    rows = [x.reshape(1, -1) if x.dim() < 2 else x for x in parts]
    return [x.unsqueeze(2) if x.dim() == 2 else x for x in rows], 2


def _column_stack(parts: list[Tensor], dim: int) -> tuple[list[Tensor], int]:
    return [x.reshape(-1, 1) if x.dim() < 2 else x for x in parts], 1


register(JoinOp("cat", _cat), "cat", "concat", "concatenate")
register(JoinOp("stack", _stack))
register(JoinOp("hstack", _hstack))
register(JoinOp("vstack", _vstack), "vstack", "row_stack")
register(JoinOp("dstack", _dstack))
register(JoinOp("column_stack", _column_stack))
