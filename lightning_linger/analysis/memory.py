"""What a model takes of an engine's memories, estimated from its layers.

The packer places tensors in share memory so that those that live at the same time do not overlap.
The estimate adds up what lives at the same time, which is what the best placement takes. For most
models it is what the packer asks for, byte by byte; where a layer runs in several passes, or
operands of a sum are brought to its scale, the packer asks for more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from lightning_linger.analysis.layers import ALIGNMENT, Data, Layer, aligned
from lightning_linger.analysis.measures import Measured, packed_weights, prefetched_bytes
from lightning_linger.analysis.walk import Walk
from lightning_linger.platforms.rules import PREFETCHED, Engine


@dataclass(frozen=True)
class Plan:
    """Where the bytes of a model go.

    Args:
        share_memory: Activations that live at the same time, workspace and buffers for weights.
        psram: Weights and biases, and activations that are too large for share memory.
        constants: Bytes of weights and biases, which the image in flash holds.
        live: Bytes of activations in share memory while each layer runs, with its workspace.
        buffers: The two buffers into which weights are fetched in turn.
        fullest: Site of the layer at which share memory is fullest.
    """

    share_memory: int
    psram: int
    constants: int
    live: tuple[int, ...]
    buffers: tuple[int, int]
    fullest: str


def constant_bytes(layer: Layer, engine: Engine) -> tuple[int, int]:
    """Return the bytes of a layer's weights and of its biases in the image."""
    weights = aligned(packed_weights(layer, engine), ALIGNMENT) if layer.weights else 0
    return weights, aligned(4 * layer.biases, ALIGNMENT)


def plan_memory(walk: Walk, engine: Engine) -> Plan:
    """Estimate where the bytes of a model go."""
    layers = walk.layers
    sizes, spans = _spans(walk)
    live, spilled = [], []
    for step, layer in enumerate(layers):
        alive = [size for key, size in sizes.items() if spans[key][0] <= step <= spans[key][1]]
        outside = sum(size for size in alive if size > engine.largest_activation)
        workspace = aligned(_workspace(layer, engine), ALIGNMENT)
        live.append(sum(alive) - outside + workspace)
        spilled.append(outside)
    fetched = [prefetched_bytes(layer, engine) for layer in layers if _is_fetched(layer)]
    buffers = (max(fetched[::2], default=0), max(fetched[1::2], default=0))
    constants = sum(sum(constant_bytes(layer, engine)) for layer in layers)
    peak = max(live, default=0)
    return Plan(
        share_memory=peak + sum(buffers),
        psram=constants + max(spilled, default=0),
        constants=constants,
        live=tuple(live),
        buffers=buffers,
        fullest=layers[live.index(peak)].site if layers else "",
    )


def _is_fetched(layer: Layer) -> bool:
    return layer.kind in PREFETCHED and bool(layer.weights)


def _spans(walk: Walk) -> tuple[dict[Hashable, int], dict[Hashable, tuple[int, int]]]:
    """Return the bytes of each tensor, and the first and last layer during which it lives."""
    sizes: dict[Hashable, int] = {}
    spans: dict[Hashable, tuple[int, int]] = {}
    merged = _merged(walk)

    def note(data: Data, step: int) -> None:
        key = merged.get(data.key, data.key)
        if data.constant:
            return
        sizes[key] = max(sizes.get(key, 0), data.bytes(walk.batch))
        first, last = spans.get(key, (step, step))
        spans[key] = (min(first, step), max(last, step))

    for data in walk.inputs:
        note(data, 0)
    for step, layer in enumerate(walk.layers):
        for data in (*layer.inputs, *layer.outputs):
            note(data, step)
    for data in walk.outputs:
        note(data, len(walk.layers) - 1)
    return sizes, spans


def _merged(walk: Walk) -> dict[Hashable, Hashable]:
    """Return the results of ReLUs that become part of the convolution before them."""
    readers: dict[Hashable, int] = {}
    makers: dict[Hashable, str] = {}
    for layer in walk.layers:
        for data in layer.inputs:
            readers[data.key] = readers.get(data.key, 0) + 1
        for data in layer.outputs:
            makers.setdefault(data.key, layer.kind)
    merged: dict[Hashable, Hashable] = {}
    for layer in walk.layers:
        if layer.kind == "relu":
            (source,), (result,) = layer.inputs, layer.outputs
            if makers.get(source.key) in ("conv", "deconv") and readers[source.key] == 1:
                merged[result.key] = source.key
    return merged


# --- workspace ----------------------------------------------------------------------------------


def _workspace(layer: Layer, engine: Engine) -> int:
    estimate = _WORKSPACES.get(layer.kind)
    return 0 if estimate is None else estimate(layer, engine)


def _of_linear(layer: Layer, engine: Engine) -> int:
    per_input, per_result = engine.workspace.linear
    return per_input * layer.inputs[0].bytes(layer.batch) + per_result * layer.outputs[0].bytes(
        layer.batch
    )


def _of_average(layer: Layer, engine: Engine) -> int:
    window = layer.window
    assert window is not None
    results, count = layer.outputs[0].per_sample(layer.batch), math.prod(window.kernel)
    shifted = count & (count - 1) == 0
    if "global" in layer.traits:
        sums = 4 * layer.channels[0]
        return max(count, sums) + (0 if shifted else sums)
    return results * (engine.workspace.average if shifted else 8)


def _of_softmax(layer: Layer, engine: Engine) -> int:
    per_value, per_place = engine.workspace.softmax
    needed = per_value * layer.inputs[0].per_sample(layer.batch) + per_place * layer.facts["length"]
    return min(int(needed), engine.workspace.most)


def _of_curve(layer: Layer, engine: Engine) -> int:
    return engine.workspace.curve * layer.inputs[0].per_sample(layer.batch)


def _of_layer_norm(layer: Layer, engine: Engine) -> int:
    return 4 * layer.weight_elements


def _of_lstm(layer: Layer, engine: Engine) -> int:
    hidden = layer.weights[1][1]
    copied = sum(constant_bytes(layer, engine)) if engine.workspace.recurrent_weights else 0
    return 32 * hidden + copied


def _of_mul(layer: Layer, engine: Engine) -> int:
    if "spread" not in layer.traits:
        return 0
    x, y = (data.per_sample(layer.batch) for data in layer.inputs)
    return x + x // y


_WORKSPACES: dict[str, Callable[[Layer, Engine], int]] = {
    "linear": _of_linear,
    "avg_pool": _of_average,
    "softmax": _of_softmax,
    "log_softmax": _of_softmax,
    "sigmoid": _of_curve,
    "layer_norm": _of_layer_norm,
    "lstm": _of_lstm,
    "mul": _of_mul,
}


# --- what rules look at -------------------------------------------------------------------------


MODEL_MEASURES: dict[str, Callable[[Plan], Measured]] = {
    "share_memory": lambda plan: Measured(
        plan.share_memory, f"{plan.share_memory} bytes, most of them at {plan.fullest}"
    ),
    "psram": lambda plan: Measured(plan.psram, f"{plan.psram} bytes"),
    "packer": lambda plan: Measured(None, "none"),
}
