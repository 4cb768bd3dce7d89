"""Sums and variances, which exporters of the older generation write and this library does not.

Their engine's own kernels compute something else (docs/export.md); here they are this library's.
"""

from __future__ import annotations

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import code_limits
from lightning_linger.export.runner.step import ROUNDING, Array, Kernel, Step, to_array
from lightning_linger.ops.arguments import reduced_count
from lightning_linger.ops.reduction import integer_sum, integer_var

# Sums of squares are taken in 64 bits.
_WIDEST_SQUARES = 2**62


def _dims(step: Step, rank: int) -> list[int]:
    """Return the dimensions of a reduction: all of them where none is named."""
    given = step.attributes.get("dims")
    if given is None and "axis" in step.attributes:
        given = [step.attributes["axis"]]
    if given is None:
        return list(range(rank))
    dims = [dim % rank if -rank <= dim < rank else rank for dim in map(int, given)]
    if rank in dims or len(set(dims)) < len(dims):
        msg = f"{step.label}: dims must be different dimensions of {rank}. Found: {list(given)}."
        raise UnsupportedError(msg)
    return dims


def _sum(step: Step) -> Array:
    x, bits_o = step.codes(0), step.bits("o_bits")
    y = integer_sum(
        x,
        _dims(step, x.dim()),
        bool(step.attributes.get("keepdims", 0)),
        step.step("scale_x"),
        step.step("scale_o"),
        bits_o,
        *code_limits(bits_o),
        ROUNDING,
        step.platform,
    )
    return to_array(y)


def _var(step: Step) -> Array:
    x, bits_o = step.codes(0), step.bits("o_bits")
    dims, correction = _dims(step, x.dim()), int(bool(step.attributes.get("unbiased", 1)))
    count = reduced_count(x.shape, dims)
    if count <= correction:
        msg = f"{step.label}: there are no more values than the correction of {correction}."
        raise UnsupportedError(msg)
    if count**2 * 4 ** (8 * x.element_size() - 1) >= _WIDEST_SQUARES:
        msg = f"{step.label}: sums over {count} values of {x.dtype} exceed 64 bits."
        raise UnsupportedError(msg)
    y = integer_var(
        x,
        dims,
        bool(step.attributes.get("keepdims", 0)),
        correction,
        False,
        step.step("scale_x"),
        step.step("scale_o"),
        bits_o,
        *code_limits(bits_o),
        ROUNDING,
        step.platform,
    )
    return to_array(y)


KERNELS: dict[str, Kernel] = {"iqSum": _sum, "iqVar": _var}
