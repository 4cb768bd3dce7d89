"""Movements under a name of their own, or with attributes of their own."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F

from lightning_linger.export.runner.step import Array, Kernel, Step, to_array, to_tensor


def _shuffle_channels(step: Step) -> Array:
    return to_array(F.channel_shuffle(to_tensor(step.array(0)), int(step.get("groups"))))


def _axes(step: Step) -> tuple[int, ...] | None:
    """Return the axes: an operand by the present standard, an attribute by earlier ones."""
    if len(step.inputs) > 1 and step.inputs[1] is not None:
        return tuple(int(axis) for axis in step.inputs[1].reshape(-1))
    return tuple(step.attributes["axes"]) if "axes" in step.attributes else None


def _squeeze(step: Step) -> Array:
    return np.squeeze(step.array(0), _axes(step))


def _unsqueeze(step: Step) -> Array:
    return np.expand_dims(step.array(0), _axes(step) or step.get("axes"))


KERNELS: dict[str, Kernel] = {
    "ShuffleChannel": _shuffle_channels,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
