"""Rows of tables, and the standard op of the same name."""

from __future__ import annotations

import numpy as np

from lightning_linger.export.runner.step import Array, Kernel, Step


def _gather(step: Step) -> Array:
    table, indices = step.array(0), step.array(1)
    rows: Array = np.take(table, indices.astype(np.int64), int(step.attributes.get("axis", 0)))
    return rows


KERNELS: dict[str, Kernel] = {"Gather": _gather}
