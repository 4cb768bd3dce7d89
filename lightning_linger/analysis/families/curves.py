"""Functions of one value, norms and embeddings."""

from __future__ import annotations

import math

from lightning_linger.analysis.walk import Reader, Visit
from lightning_linger.ops.activation import window_of


def read_clamp(visit: Visit) -> None:
    """Read a clamp: a ReLU, or what only saturation gives."""
    window = window_of(visit.call)
    x, out = visit.operand(0), visit.result()
    if (window.low, window.high) == (0.0, math.inf) or not visit.shifts:
        visit.add("relu", (x,), (out,))
    else:
        visit.add("unsupported", (x,), (out,), facts={"instead": "use a ReLU"})


def read_curve(visit: Visit) -> None:
    """Read a function that the engine has a kernel for."""
    visit.add(visit.node.op, (visit.operand(0),), (visit.result(),))


def read_layer_norm(visit: Visit) -> None:
    """Read a layer norm over the last axes."""
    call, x = visit.call, visit.operand(0)
    length = call.channels * call.spread
    visit.add(
        "layer_norm",
        (x,),
        (visit.result(),),
        weights=((length,),),
        biases=length,
        weight_bits=visit.weight_bits,
        facts={"length": length, "eps": call.eps},
    )


def read_embedding(visit: Visit) -> None:
    """Read a table."""
    table = tuple(visit.call.weight.shape)
    out = visit.result(0, visit.weight_bits)
    visit.add("embedding", (), (out,), weights=(table,), weight_bits=visit.weight_bits)


def read_interpolation(visit: Visit) -> None:
    """Read an interpolation: nearest neighbours are moved values."""
    if visit.call.mode not in ("nearest", "nearest-exact") and visit.shifts:
        visit.refuse("use mode='nearest', or a transposed convolution")
        return
    visit.add("move", (visit.operand(0),), (visit.result(),))


READERS: dict[str, Reader] = {
    **dict.fromkeys(("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"), read_clamp),
    **dict.fromkeys(("sigmoid", "tanh", "gelu", "silu", "glu"), read_curve),
    "layer_norm": read_layer_norm,
    "embedding": read_embedding,
    "interpolate": read_interpolation,
}
