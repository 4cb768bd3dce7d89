"""``interpolate``: nearest neighbours are moved, linear weights are whole numbers.

A linear interpolation along one dimension mixes two neighbours. Its weights are multiples of
``2^-11``: the distance of the source position from the first neighbour, an exact fraction, times
``2^11`` and rounded half up. Along several dimensions the weights multiply; all products are added
as whole numbers, and the sum is rounded once. The scale stays. The result is off by at most half a
step, and by ``2^-12`` per dimension of what neighbours differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.fake_quantize import fake_quantize
from lightning_linger.core.grid import AFFINE_CODE_BITS
from lightning_linger.core.integer import code_limits, integer_op, payload_dtype
from lightning_linger.core.payload import integer_codes
from lightning_linger.core.platform import fixed_point_of
from lightning_linger.core.quantizer import readable
from lightning_linger.core.registry import Op, register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_of, with_tag
from lightning_linger.ops import tflite
from lightning_linger.ops.exact import to_codes
from lightning_linger.ops.kernel import run_on_grid

WEIGHT_BITS = 11
_LINEAR = {"linear": 1, "bilinear": 2, "trilinear": 3}
_NEAREST = ("nearest", "nearest-exact")


class ResampleCall(NamedTuple):
    """Bound arguments of ``F.interpolate``.

    ``size`` and ``factors`` have one entry per spatial dimension; a factor of 0 means that the
    sizes say how far source positions are apart.
    """

    input: Tensor
    size: tuple[int, ...]
    factors: tuple[float, ...]
    mode: str
    align_corners: bool
    refused: str | None
    arguments: dict[str, Any]


# --- source positions -------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def nearest_places(
    source: int, target: int, factor: float, mode: str, image: bool = False
) -> tuple[int, ...]:
    """Return which value of a dimension stands at each place of the result.

    In the float32 steps of torch's kernel for images. Its other kernels round a few positions that
    lie exactly between two values the other way; evaluation does not use them.

    Args:
        source: Size of the input.
        target: Size of the result.
        factor: The scale factor that the model gives, 0 if it gives sizes.
        mode: ``nearest`` or ``nearest-exact``.
        image: Whether there are two spatial dimensions, whose equal sizes torch leaves alone.
    """
    distance = np.float32(1.0 / factor) if factor else np.float32(source) / np.float32(target)
    offset = np.float32(0.5 if mode == "nearest-exact" else 0.0)
    positions = np.floor((np.arange(target, dtype=np.float32) + offset) * distance)
    if mode == "nearest" and image and target == source:
        positions = np.arange(target)
    return tuple(int(place) for place in np.minimum(positions, source - 1))


@functools.lru_cache(maxsize=256)
def linear_taps(
    source: int, target: int, factor: float, align_corners: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the two neighbours of each place of a result, and the weights of the second ones.

    Args:
        source: Size of the input.
        target: Size of the result.
        factor: The scale factor that the model gives, 0 if it gives sizes.
        align_corners: Whether the centers of the outermost values stay where they are.

    Returns:
        Places of the first neighbours, of the second, and weights from 0 to ``2^WEIGHT_BITS``.
    """
    first, second, weights = [], [], []
    for place in range(target):
        if align_corners:
            position = Fraction(place * (source - 1), max(target - 1, 1))
        else:
            distance = 1 / Fraction(factor) if factor else Fraction(source, target)
            position = max((place + Fraction(1, 2)) * distance - Fraction(1, 2), Fraction(0))
        near = min(math.floor(position), source - 1)
        share = min(position - near, Fraction(1))
        first.append(near)
        second.append(min(near + 1, source - 1))
        weights.append(math.floor(share * 2**WEIGHT_BITS + Fraction(1, 2)))
    return tuple(first), tuple(second), tuple(weights)


# --- integer kernels ------------------------------------------------------------------------


@integer_op("linger::resize_linear")
def integer_resize_linear(
    x: Tensor,
    size: Sequence[int],
    factors: Sequence[float],
    align_corners: bool,
    bits: int,
    rounding: str,
    platform: str,
    zero_point: int = 0,
) -> Tensor:
    """Interpolate codes linearly; the scale stays.

    Whole numbers of at most 49 bits (codes of 16, three weights of 11) are exact in float64.

    Args:
        x: Codes ``[N, C, ...]``.
        size: Sizes of the result's spatial dimensions.
        factors: Scale factors that the model gives, 0 where it gives sizes.
        align_corners: See torch.
        bits: Width of ``x`` and of the result.
        rounding: Rounding rule.
        platform: Name of the target. Where it works in fixed point, TFLite's kernel interpolates
            8-bit images whose sizes say how far positions are apart.
        zero_point: What is added to a code to store it.
    """
    image = len(size) == 2 and bits <= AFFINE_CODE_BITS
    if fixed_point_of(platform) is not None and image and _sizes_say_all(x, size, factors):
        height, width = size
        codes = tflite.resize_bilinear(x, (height, width), align_corners, zero_point)
        return codes.to(payload_dtype(bits))
    mixed = x.double()
    for dim, (target, factor) in enumerate(zip(size, factors, strict=True), start=2):
        first, second, weights = (
            torch.tensor(values, device=x.device)
            for values in linear_taps(x.shape[dim], target, factor, align_corners)
        )
        shares = weights.double().view(-1, *[1] * (x.dim() - dim - 1))
        near, far = mixed.index_select(dim, first), mixed.index_select(dim, second)
        mixed = near * (2.0**WEIGHT_BITS - shares) + far * shares
    mixed = mixed * 2.0 ** (-WEIGHT_BITS * len(size))
    return to_codes(mixed, bits, *code_limits(bits), rounding)


def _sizes_say_all(x: Tensor, size: Sequence[int], factors: Sequence[float]) -> bool:
    triples = zip(x.shape[2:], size, factors, strict=True)
    return all(factor == 0.0 or source * factor == target for source, target, factor in triples)


@integer_resize_linear.register_fake
def _(
    x: Tensor,
    size: Sequence[int],
    factors: Sequence[float],
    align_corners: bool,
    bits: int,
    *_: object,
) -> Tensor:
    return x.new_empty((*x.shape[:2], *size), dtype=payload_dtype(bits))


# --- op ---------------------------------------------------------------------------------------


class InterpolateOp(Op):
    """``interpolate`` with the modes ``nearest``, ``nearest-exact``, and the linear ones."""

    output_scale = "inputs"

    def variant(self, call: ResampleCall) -> str:
        """Tell linear modes, which no engine has, from nearest ones."""
        return self.kind if call.mode in _NEAREST else f"{self.kind}_linear"

    def bind(
        self,
        input: Tensor,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
    ) -> ResampleCall:
        """Bind the arguments of ``F.interpolate``."""
        sources = [int(n) for n in input.shape[2:]]
        given = [0.0] * len(sources) if scale_factor is None else _each(scale_factor, sources)
        if scale_factor is None:
            target = tuple(int(n) for n in _each(size, sources))
        else:
            target = tuple(math.floor(n * f) for n, f in zip(sources, given, strict=True))
        arguments = {
            "size": size,
            "scale_factor": scale_factor,
            "mode": mode,
            "align_corners": align_corners,
            "recompute_scale_factor": recompute_scale_factor,
        }
        factors = [0.0] * len(sources) if recompute_scale_factor else given
        return ResampleCall(
            input,
            target,
            tuple(float(f) for f in factors),
            mode,
            bool(align_corners),
            _refusal(mode, antialias),
            arguments,
        )

    def obstacle(self, call: ResampleCall) -> str | None:
        """Modes without an integer form."""
        return call.refused

    def run_fake(self, site: Site, call: ResampleCall) -> Any:
        """Interpolate on the grid."""
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None:
            return NotImplemented
        tag = tag.at(site.key)
        if call.mode in _NEAREST:
            moved = F.interpolate(x, **call.arguments) if site.training else _nearest(x, call)
            return with_tag(moved, tag)

        def real() -> Tensor:
            return F.interpolate(x, **call.arguments)

        if site.training:  # at most a code away from the kernel, which takes several times as long
            usable = readable(tag.step)
            return with_tag(
                fake_quantize(real(), usable, *code_limits(tag.bits), site.rounding), tag
            )

        def kernel(step: float, codes: Tensor) -> Tensor:
            return self._mixed(site, call, codes, tag)

        return run_on_grid(site, [x], tag, real, kernel)

    def run_integer(self, site: Site, call: ResampleCall) -> Any:
        """Choose codes, or call ``linger::resize_linear``."""
        x = site.operand(0, call.input)
        tag = tag_of(x)
        if x is None or tag is None:
            return NotImplemented
        codes = integer_codes(x)
        tag = tag.at(site.key)
        nearest = call.mode in _NEAREST
        found = _nearest(codes, call) if nearest else self._mixed(site, call, codes, tag)
        return with_tag(found, tag)

    def _mixed(self, site: Site, call: ResampleCall, codes: Tensor, tag: Tag) -> Tensor:
        return integer_resize_linear(
            codes,
            call.size,
            call.factors,
            call.align_corners,
            tag.bits,
            site.rounding,
            site.platform_name,
            *([int(tag.zero_point)] if tag.zero_point is not None else []),
        )


def _nearest(x: Tensor, call: ResampleCall) -> Tensor:
    for dim, (target, factor) in enumerate(zip(call.size, call.factors, strict=True), start=2):
        places = nearest_places(x.shape[dim], target, factor, call.mode, len(call.size) == 2)
        if places != tuple(range(x.shape[dim])):
            x = x.index_select(dim, torch.tensor(places, device=x.device))
    return x


def _refusal(mode: str, antialias: bool) -> str | None:
    if mode == "area":
        return "mode='area' is `F.adaptive_avg_pool2d`; call that"
    if mode not in (*_NEAREST, *_LINEAR):
        return f"mode={mode!r} has weights below zero; use a linear mode"
    return "`antialias=True` has no integer form" if antialias else None


def _each(value: Any, sources: Sequence[int]) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else [value] * len(sources)


register(InterpolateOp("interpolate"))
