"""Recurrent layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import code_limits
from lightning_linger.export.runner.step import ROUNDING, Array, Kernel, Step, to_array, to_tensor
from lightning_linger.ops.recurrent.kernels import integer_gru, integer_lstm


@dataclass(frozen=True)
class _Layer:
    """The operands of one direction of one layer.

    Args:
        x: ``[1, T, I]``.
        states: Before the first step, ``[1, H]`` each; zeros where none is given.
        parameters: What both kinds of layers take.
    """

    x: Tensor
    states: list[Tensor]
    parameters: dict[str, Any]


def _layer(step: Step, count: int) -> _Layer:
    """Read a node with so many states."""
    x = step.codes(0)
    given = [array for array in step.inputs[1:] if array is not None]
    states, weights = given[:-4], [to_tensor(array) for array in given[-4:]]
    if x.dim() != 3 or x.shape[0] != 1 or int(step.get("batch_first")) != 0:
        msg = (
            f"{step.label}: the engine takes one sequence [1, T, I] with batch_first=0. Found "
            f"{list(x.shape)} with batch_first={step.get('batch_first')}."
        )
        raise UnsupportedError(msg)
    if states and states[0].dtype == np.int64:
        _check_length(step, states.pop(0), x.shape[1])
    if len(weights) != 4 or len(states) not in (0, count):
        msg = (
            f"{step.label}: expected x, its length or not, then {count} state(s) or none, two "
            f"weights and two biases. Found {len(step.inputs)} inputs."
        )
        raise UnsupportedError(msg)
    hidden, bits_o = weights[1].shape[1], step.bits("o_bits")
    low, high = code_limits(bits_o)
    parameters = {
        **dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=True)),
        **{"tables": None, "batch_sizes": [], "scale_x": step.step("scale_x")},
        **{"scale_ih": [step.step("scale_iw")], "scale_hh": [step.step("scale_hw")]},
        **{"scale_o": step.step("scale_o"), "bits_x": step.bits("x_bits")},
        **{"bits_w": step.bits("w_bits"), "bits_o": bits_o, "low": low, "high": high},
        # [1, T, I] is a batch of one.
        **{"batch_first": True, "reverse": not int(step.attributes.get("go_forward", 1))},
        **{"fused": True, "rounding": ROUNDING, "platform": step.platform},
    }
    zeros = [torch.zeros(1, hidden) for _ in range(count)]
    return _Layer(x, [to_tensor(s).view(1, hidden) for s in states] or zeros, parameters)


def _check_length(step: Step, lengths: Array, steps: int) -> None:
    if lengths.reshape(-1).tolist() != [steps]:
        msg = (
            f"{step.label}: one whole sequence is run, of {steps} steps. Found the lengths "
            f"{lengths.reshape(-1).tolist()[:8]}. Cut the input."
        )
        raise UnsupportedError(msg)


def _lstm(step: Step) -> tuple[Array, ...]:
    layer = _layer(step, 2)
    h, c = layer.states
    y, last, cell = integer_lstm(
        x=layer.x, h=h, c=c, weight_hr=None, scale_hr=[], **layer.parameters
    )
    return to_array(y), to_array(last.unsqueeze(0)), to_array(cell.unsqueeze(0))


def _gru(step: Step) -> tuple[Array, ...]:
    """Run PyTorch's gates on every platform: none of the engines has a usable GRU."""
    layer = _layer(step, 1)
    y, last = integer_gru(x=layer.x, h=layer.states[0], **layer.parameters)
    return to_array(y), to_array(last.unsqueeze(0))


KERNELS: dict[str, Kernel] = {"QLSTM": _lstm, "QGRU": _gru}
