"""Movements under a name of their own, or with attributes of their own."""

from __future__ import annotations

import numpy as np
import onnx
import torch.nn.functional as F

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.runner.plain import run_plain
from lightning_linger.export.runner.step import Array, Kernel, Step, to_array, to_tensor


def _shuffle_channels(step: Step) -> Array:
    return to_array(F.channel_shuffle(to_tensor(step.array(0)), int(step.get("groups"))))


def _axes(step: Step) -> tuple[int, ...] | None:
    """Return the axes: an operand by the present standard, an attribute by earlier ones."""
    if len(step.inputs) > 1 and step.inputs[1] is not None:
        return tuple(int(axis) for axis in step.inputs[1].reshape(-1))
    return tuple(step.attributes["axes"]) if "axes" in step.attributes else None


def _pad(step: Step) -> Array:
    """Pad as ONNX does; the value is a code."""
    x, pads = step.array(0), step.array(1).astype(np.int64)
    value = step.inputs[2] if len(step.inputs) > 2 else None
    if value is not None and value.dtype != x.dtype:
        msg = f"{step.label}: codes are padded with a code. Found {value.dtype} at {x.dtype}."
        raise UnsupportedError(msg)
    mode = str(step.attributes.get("mode", "constant"))
    names = ["x", "pads", "" if value is None else "value"]
    node = onnx.helper.make_node("Pad", names, ["y"], step.label, mode=mode)
    return run_plain(node, [x, pads, value], _PAD_VERSION)[0]


def _squeeze(step: Step) -> Array:
    return np.squeeze(step.array(0), _axes(step))


def _unsqueeze(step: Step) -> Array:
    return np.expand_dims(step.array(0), _axes(step) or step.get("axes"))


# Of ONNX's own op.
_PAD_VERSION = 18

KERNELS: dict[str, Kernel] = {
    "iqPad": _pad,
    "ShuffleChannel": _shuffle_channels,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
