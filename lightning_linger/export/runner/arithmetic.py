"""Quotients."""

from __future__ import annotations

from lightning_linger.export.runner.elementwise import pair_arguments
from lightning_linger.export.runner.step import Array, Kernel, Step, to_array
from lightning_linger.ops.div import integer_div


def _div(step: Step) -> Array:
    return to_array(integer_div(**pair_arguments(step)))


KERNELS: dict[str, Kernel] = {"iqDiv": _div}
