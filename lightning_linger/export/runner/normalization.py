"""Layer norm over the last axis."""

from __future__ import annotations

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.integer import code_limits
from lightning_linger.export.runner.step import ROUNDING, Array, Kernel, Step, to_array, to_tensor
from lightning_linger.ops.normalization import has_engine_kernel, integer_layer_norm

# The engine ignores what a node says.
ENGINE_EPS = 1e-5


def _layer_norm(step: Step) -> Array:
    x, weight, bias = step.codes(0), to_tensor(step.array(1)), to_tensor(step.array(2))
    scale_x, scale_w, scale_o = (step.step(name) for name in ("scale_x", "scale_w", "scale_o"))
    bits_x, bits_w, bits_o = (step.bits(name) for name in ("x_bits", "w_bits", "o_bits"))
    scales, bits, shape = (scale_x, scale_w, scale_o), (bits_x, bits_w, bits_o), (1, weight.numel())
    if not has_engine_kernel(step.platform, shape, 1, True, scales, bits):
        msg = (
            f"{step.label}: layer norms are known of arcs, mars and venusA with 8 bits. Found "
            f"{step.platform!r} with {bits} bits."
        )
        raise UnsupportedError(msg)
    low, high = code_limits(bits_o)
    y = integer_layer_norm(
        x,
        weight.view(shape),
        bias.view(shape),
        spread=1,
        centered=True,
        eps=ENGINE_EPS,
        scale_x=scale_x,
        scale_w=scale_w,
        scale_o=scale_o,
        bits_x=bits_x,
        bits_w=bits_w,
        bits_o=bits_o,
        low=low,
        high=high,
        rounding=ROUNDING,
        platform=step.platform,
    )
    return to_array(y)


KERNELS: dict[str, Kernel] = {"QLayerNorm2d": _layer_norm}
