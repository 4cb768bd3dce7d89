"""Movements under a name of their own."""

from __future__ import annotations

import torch.nn.functional as F

from lightning_linger.export.runner.step import Array, Kernel, Step, to_array, to_tensor


def _shuffle_channels(step: Step) -> Array:
    return to_array(F.channel_shuffle(to_tensor(step.array(0)), int(step.get("groups"))))


KERNELS: dict[str, Kernel] = {"ShuffleChannel": _shuffle_channels}
