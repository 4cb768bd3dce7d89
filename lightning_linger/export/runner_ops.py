"""The integer ops of the ``linger`` dialect on numpy arrays, by the library's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import (
    EXACT_FLOAT32,
    code_limits,
    dequantize,
    is_power_of_two,
    quantize,
    requantize,
)
from lightning_linger.ops.conv import integer_conv
from lightning_linger.ops.elementwise import integer_add, integer_cat, integer_mul
from lightning_linger.ops.linear import integer_linear
from lightning_linger.ops.norm import integer_scale_shift
from lightning_linger.ops.pool import integer_avg_pool, integer_max_pool

Array = NDArray[Any]

# Every engine of the dialect rounds this way, whatever a node says.
ROUNDING = "half_up"


@dataclass(frozen=True)
class Step:
    """One node to run.

    Args:
        label: Names the node and its op, for messages.
        attributes: By the newer generation's names.
        inputs: Arrays, None where an optional input is missing.
        platform: The library's name of the target.
    """

    label: str
    attributes: dict[str, Any]
    inputs: list[Array | None]
    platform: str

    def get(self, name: str) -> Any:
        """Return an attribute that the node must have."""
        if name not in self.attributes:
            msg = f"{self.label} lacks the attribute {name!r}. Found: {sorted(self.attributes)}."
            raise UnsupportedError(msg)
        return self.attributes[name]

    def step(self, name: str) -> float:
        """Return the step (``real = step * code``) that a scale attribute means."""
        scale = float(self.get(name))
        if not is_power_of_two(scale):
            msg = f"{self.label}: {name} must be a power of two. Found: {scale}."
            raise UnsupportedError(msg)
        return 1.0 / scale

    def bits(self, name: str, default: int = 8) -> int:
        """Return a width."""
        return int(self.attributes.get(name, default))

    def array(self, index: int) -> Array:
        """Return an input that the node must have."""
        array = self.inputs[index] if index < len(self.inputs) else None
        if array is None:
            msg = f"{self.label} lacks its input {index}."
            raise UnsupportedError(msg)
        return array

    def codes(self, index: int, scale: str = "scale_x", bits: str = "x_bits") -> Tensor:
        """Return an operand as codes; real values are quantized by the node's own scale."""
        array = self.array(index)
        if np.issubdtype(array.dtype, np.floating):
            return _quantized(_tensor(array), self.step(scale), self.bits(bits), self.platform)
        return _tensor(array)


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))  # a copy: inputs may be read-only


def _array(x: Tensor) -> Array:
    array: Array = x.numpy()
    return array


def _quantized(x: Tensor, step: float, bits: int, platform: str) -> Tensor:
    # The largest 32-bit code is no float32.
    values = x.double() if bits > 16 else x.float()
    codes: Tensor = quantize(values, step, bits, *code_limits(bits), ROUNDING, platform)
    return codes


def _is_exact(weight: Tensor, bias: Tensor | None, bits_x: int, ratio: float) -> bool:
    """Whether no accumulator, with what is added to store its code, can reach 2^24."""
    bound = float(weight.double().abs().flatten(1).sum(1).max()) * 2.0 ** (bits_x - 1)
    if bias is not None:
        bound += float(bias.double().abs().max())
    return bound + 128.5 / min(ratio, 1.0) < EXACT_FLOAT32


# --- entering, leaving and changing the grid --------------------------------------------------


def _quant(step: Step) -> Array:
    x = step.array(0)
    if not np.issubdtype(x.dtype, np.floating):
        return x  # codes were given in the place of real values
    bits = step.bits("x_bits")
    return _array(_quantized(_tensor(x), step.step("scale_x"), bits, step.platform))


def _dequant(step: Step) -> Array:
    return _array(dequantize(_tensor(step.array(0)), step.step("scale_o"), step.platform))


def _requant(step: Step) -> Array:
    x = step.codes(0)
    step_x, step_o = step.step("scale_x"), step.step("scale_o")
    bits_x, bits_o = step.bits("x_bits"), step.bits("o_bits")
    if bits_o > bits_x and step_o <= step_x:
        # The engine widens by a plain shift, without saturation.
        shift = round(np.log2(step_x / step_o))
        wide = np.int16 if bits_o <= 16 else np.int32
        shifted: Array = np.left_shift(_array(x).astype(wide), shift)
        return shifted
    return _array(requantize(x, step_x, step_o, bits_x, bits_o, ROUNDING, step.platform))


# --- layers -----------------------------------------------------------------------------------


def _layer(step: Step, dims_after_channel: int) -> dict[str, Any]:
    """Return the arguments that all layers share."""
    weight = _tensor(step.array(1))
    bias = _tensor(step.inputs[2]) if len(step.inputs) > 2 and step.inputs[2] is not None else None
    step_x, step_w, step_o = (step.step(name) for name in ("scale_x", "scale_w", "scale_o"))
    bits_x, bits_o = step.bits("x_bits"), step.bits("o_bits")
    low, high = code_limits(bits_o)
    rows = weight if dims_after_channel == 0 else weight.reshape(weight.shape[0], -1)
    return {
        "weight": weight,
        "bias": bias,
        "scale_x": step_x,
        "scale_w": [step_w],
        "scale_o": step_o,
        "bits_x": bits_x,
        "bits_w": step.bits("w_bits"),
        "bits_o": bits_o,
        "low": low,
        "high": high,
        "rounding": ROUNDING,
        "platform": step.platform,
        "exact_in_float32": bits_o <= 16
        and _is_exact(rows, bias, bits_x, step_x * step_w / step_o),
    }


def _split_pads(pads: Sequence[int]) -> tuple[list[int], list[int]]:
    half = len(pads) // 2
    return list(pads[:half]), list(pads[half:])


def _padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: int) -> Tensor:
    sides = [n for pair in reversed(list(zip(before, after, strict=True))) for n in pair]
    return F.pad(x, sides, value=value)


def _conv(dims: int, transposed: bool) -> Callable[[Step], Array]:
    def run(step: Step) -> Array:
        x = step.codes(0)
        before, after = _split_pads(step.get("pads"))
        arguments = _layer(step, dims)
        if transposed:
            # Its rows are the input channels.
            arguments["exact_in_float32"] = False
            if before != after:
                msg = f"{step.label}: uneven pads of a transposed convolution are not supported."
                raise UnsupportedError(msg)
        elif before != after:
            x, before = _padded(x, before, after, 0), [0] * dims
        y = integer_conv(
            x=x,
            stride=list(step.get("strides")),
            padding=before,
            dilation=list(step.attributes.get("dilations", [1] * dims)),
            groups=int(step.attributes.get("group", 1)),
            transposed=transposed,
            output_padding=list(step.attributes.get("output_padding", [0] * dims)),
            **arguments,
        )
        return _array(y)

    return run


def _linear(step: Step) -> Array:
    return _array(integer_linear(x=step.codes(0), **_layer(step, 0)))


def _batch_norm(step: Step) -> Array:
    arguments = _layer(step, 1)
    if arguments["bias"] is None:
        arguments["bias"] = torch.zeros_like(arguments["weight"], dtype=torch.int32)
    return _array(integer_scale_shift(x=step.codes(0), **arguments))


# --- elementwise ------------------------------------------------------------------------------


def _pair(step: Step) -> dict[str, Any]:
    low, high = code_limits(step.bits("o_bits"))
    return {
        "x": step.codes(0),
        "y": step.codes(1, "scale_y", "y_bits"),
        "scale_x": step.step("scale_x"),
        "scale_y": step.step("scale_y"),
        "scale_o": step.step("scale_o"),
        "bits_o": step.bits("o_bits"),
        "low": low,
        "high": high,
        "rounding": ROUNDING,
        "platform": step.platform,
    }


def _add(sign: int) -> Callable[[Step], Array]:
    def run(step: Step) -> Array:
        return _array(integer_add(sign=sign, round_operands=True, **_pair(step)))

    return run


def _mul(step: Step) -> Array:
    return _array(integer_mul(**_pair(step)))


def _cat(step: Step) -> Array:
    parts = [
        step.codes(index, f"scale_x_{index}", f"x_{index}_bits")
        for index in range(len(step.inputs))
    ]
    steps = [step.step(f"scale_x_{index}") for index in range(len(parts))]
    y = integer_cat(
        parts,
        int(step.get("axis")),
        steps,
        step.step("scale_o"),
        step.bits("o_bits"),
        ROUNDING,
        step.platform,
    )
    return _array(y)


def _relu(step: Step) -> Array:
    x = step.array(0)
    positive: Array = np.maximum(x, x.dtype.type(0))
    return positive


def _clip(step: Step) -> Array:
    x = step.array(0)
    edges = [*step.inputs[1:], None, None][:2]
    low, high = (None if edge is None else edge.astype(x.dtype) for edge in edges)
    return x if low is None and high is None else np.clip(x, low, high)


# --- pools ------------------------------------------------------------------------------------


def _refuse_ceil_mode(step: Step) -> None:
    if step.attributes.get("ceil_mode", 0):
        msg = f"{step.label}: the engine ignores ceil_mode=1. Export with ceil_mode=0."
        raise UnsupportedError(msg)


def _avg_pool(step: Step) -> Array:
    _refuse_ceil_mode(step)
    x = step.codes(0)
    before, after = _split_pads(step.get("pads"))
    counts_pads = bool(step.attributes.get("count_include_pad", 1))
    if before != after:
        if not counts_pads:
            msg = f"{step.label}: uneven pads that do not count are not supported."
            raise UnsupportedError(msg)
        x, before = _padded(x, before, after, 0), [0] * len(before)
    y = integer_avg_pool(
        x,
        list(step.get("kernel_shape")),
        list(step.get("strides")),
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
    return _array(y)


def _max_pool(step: Step) -> Array:
    _refuse_ceil_mode(step)
    x = _tensor(step.array(0))
    kernel = list(step.get("kernel_shape"))
    before, after = _split_pads(step.attributes.get("pads", [0] * (2 * len(kernel))))
    if before != after or any(2 * pad > size for pad, size in zip(before, kernel, strict=True)):
        lowest = -float("inf") if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
        x, before = _padded(x, before, after, lowest), [0] * len(kernel)  # type: ignore[arg-type]
    y = integer_max_pool(
        x,
        kernel,
        list(step.attributes.get("strides", [1] * len(kernel))),
        before,
        list(step.attributes.get("dilations", [1] * len(kernel))),
        False,
        step.platform,
    )
    return _array(y)


Kernel = Callable[[Step], Array]

# By the newer generation's names.
KERNELS: dict[str, Kernel] = {
    "Quant": _quant,
    "Dequant": _dequant,
    "Requant": _requant,
    **{f"QConv{dims}d": _conv(dims, transposed=False) for dims in (1, 2)},
    **{f"QConvTranspose{dims}d": _conv(dims, transposed=True) for dims in (1, 2)},
    "QLinear": _linear,
    **{f"QBatchNorm{dims}d": _batch_norm for dims in (1, 2)},
    "QAdd": _add(1),
    "QSub": _add(-1),
    "QMul": _mul,
    "QCat": _cat,
    **{f"QAvgPool{dims}d": _avg_pool for dims in (1, 2)},
    "Relu": _relu,
    "Clip": _clip,
    "MaxPool": _max_pool,
}
