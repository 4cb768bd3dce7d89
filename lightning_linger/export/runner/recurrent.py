"""Recurrent layers."""

from __future__ import annotations

import torch

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import code_limits
from lightning_linger.export.runner.step import ROUNDING, Array, Kernel, Step, to_array, to_tensor
from lightning_linger.ops.recurrent.kernels import integer_lstm


def _lstm(step: Step) -> tuple[Array, ...]:
    x = step.codes(0)
    given = [array for array in step.inputs[1:] if array is not None]
    states, weights = given[:-4], [to_tensor(array) for array in given[-4:]]
    if x.dim() != 3 or x.shape[0] != 1 or int(step.get("batch_first")) != 0:
        msg = (
            f"{step.label}: the engine takes one sequence [1, T, I] with batch_first=0. Found "
            f"{list(x.shape)} with batch_first={step.get('batch_first')}."
        )
        raise UnsupportedError(msg)
    if len(weights) != 4 or len(states) not in (0, 2):
        msg = (
            f"{step.label}: expected x, then h and c or neither, two weights and two biases. Found "
            f"{len(step.inputs)} inputs."
        )
        raise UnsupportedError(msg)
    hidden = weights[1].shape[1]
    h, c = (
        [to_tensor(array).view(1, hidden) for array in states]
        if states
        else [torch.zeros(1, hidden), torch.zeros(1, hidden)]
    )
    bits_o = step.bits("o_bits")
    low, high = code_limits(bits_o)
    y, last, cell = integer_lstm(
        x=x,
        h=h,
        c=c,
        weight_ih=weights[0],
        weight_hh=weights[1],
        bias_ih=weights[2],
        bias_hh=weights[3],
        weight_hr=None,
        tables=None,
        batch_sizes=[],
        scale_x=step.step("scale_x"),
        scale_ih=[step.step("scale_iw")],
        scale_hh=[step.step("scale_hw")],
        scale_hr=[],
        scale_o=step.step("scale_o"),
        bits_x=step.bits("x_bits"),
        bits_w=step.bits("w_bits"),
        bits_o=bits_o,
        low=low,
        high=high,
        batch_first=True,
        reverse=not int(step.attributes.get("go_forward", 1)),
        fused=True,
        rounding=ROUNDING,
        platform=step.platform,
    )
    return to_array(y), to_array(last.unsqueeze(0)), to_array(cell.unsqueeze(0))


KERNELS: dict[str, Kernel] = {"QLSTM": _lstm}
