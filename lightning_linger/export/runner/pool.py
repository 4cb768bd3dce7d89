"""Pools."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.runner.step import (
    ROUNDING,
    Array,
    Kernel,
    Step,
    check_padded,
    padded,
    split_pads,
    to_array,
    to_tensor,
)
from lightning_linger.ops.pool import integer_avg_pool, integer_max_pool


def _refuse_ceil_mode(step: Step) -> None:
    if step.attributes.get("ceil_mode", 0):
        msg = f"{step.label}: the engine ignores ceil_mode=1. Export with ceil_mode=0."
        raise UnsupportedError(msg)


def _avg_pool(step: Step) -> Array:
    _refuse_ceil_mode(step)
    x = step.codes(0)
    kernel = step.sizes("kernel_shape", x.dim() - 2, 1)
    before, after = split_pads(step.sizes("pads", 2 * len(kernel)))
    check_padded(step, x, before, after)
    counts_pads = bool(step.attributes.get("count_include_pad", 1))
    if before != after:
        if not counts_pads:
            msg = f"{step.label}: uneven pads that do not count are not supported."
            raise UnsupportedError(msg)
        x, before = padded(step, x, before, after, 0), [0] * len(before)
    y = integer_avg_pool(
        x,
        kernel,
        step.sizes("strides", len(kernel), 1),
        before,
        False,
        counts_pads,
        max(int(step.attributes.get("divisor_override", -1)), 0),
        step.step("scale_x"),
        step.step("scale_o"),
        step.bits("o_bits"),
        ROUNDING,
        step.platform,
    )
    return to_array(y)


def _global_avg_pool(step: Step) -> Array:
    """Average over whole maps, as an average pool with a window of their size."""
    sizes = list(step.array(0).shape[2:])
    window = {"kernel_shape": sizes, "strides": sizes, "pads": [0] * (2 * len(sizes))}
    return _avg_pool(replace(step, attributes={**step.attributes, **window}))


def _max_pool(step: Step) -> Array:
    _refuse_ceil_mode(step)
    x = to_tensor(step.array(0))
    kernel = step.sizes("kernel_shape", x.dim() - 2, 1)
    before, after = split_pads(step.sizes("pads", 2 * len(kernel), 0, [0] * (2 * len(kernel))))
    check_padded(step, x, before, after)
    if before != after or any(2 * pad > size for pad, size in zip(before, kernel, strict=True)):
        lowest: float = -math.inf if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
        x, before = padded(step, x, before, after, lowest), [0] * len(kernel)
    y = integer_max_pool(
        x,
        kernel,
        step.sizes("strides", len(kernel), 1, [1] * len(kernel)),
        before,
        step.sizes("dilations", len(kernel), 1, [1] * len(kernel)),
        False,
        step.platform,
    )
    return to_array(y)


KERNELS: dict[str, Kernel] = {
    **{f"QAvgPool{dims}d": _avg_pool for dims in (1, 2)},
    **{f"QGlobalAveragePool{dims}d": _global_avg_pool for dims in (1, 2)},
    "MaxPool": _max_pool,
}
