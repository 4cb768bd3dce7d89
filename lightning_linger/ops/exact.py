"""Steps in float64 that every machine and runtime rounds alike.

A single IEEE operation (sum, product, quotient, root) has one right result. What is built from
such operations on whole numbers, in a fixed order, needs no tolerance anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_linger.core.integer import payload_dtype
from lightning_linger.core.rounding import ROUNDINGS


def quotient(x: Tensor, divisor: float) -> Tensor:
    """Divide by a number; a GPU would multiply by the reciprocal of a plain one."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def to_codes(real: Tensor, bits: int, low: int, high: int, rounding: str) -> Tensor:
    """Round results in units of the output step to codes."""
    return ROUNDINGS[rounding](real).clamp_(low, high).to(payload_dtype(bits))
