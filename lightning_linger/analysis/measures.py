"""What rules look at: one number, or a few, of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_linger.analysis.layers import Layer, aligned, payload_bits
from lightning_linger.platforms.rules import Engine


@dataclass(frozen=True)
class Measured:
    """What was found.

    Args:
        value: What a rule compares.
        text: How a finding names it.
    """

    value: Any
    text: str


# Returns None where there is nothing to look at.
Measure = Callable[[Layer, Engine], Measured | None]

MEASURES: dict[str, Measure] = {}


def measure(function: Measure) -> Measure:
    """Make a measure known by the name of its function."""
    MEASURES[function.__name__] = function
    return function


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _bytes(number: int) -> Measured:
    return Measured(number, f"{number} bytes")


# --- geometry -----------------------------------------------------------------------------------


@measure
def kernel(layer: Layer, engine: Engine) -> Measured | None:
    """Size of the window."""
    window = layer.window
    return None if window is None else Measured(window.kernel, _by(window.kernel))


@measure
def stride(layer: Layer, engine: Engine) -> Measured | None:
    """Step of the window."""
    window = layer.window
    return None if window is None else Measured(window.stride, _by(window.stride))


@measure
def dilation(layer: Layer, engine: Engine) -> Measured | None:
    """Spacing of the window."""
    window = layer.window
    return None if window is None else Measured(window.dilation, _by(window.dilation))


@measure
def padding(layer: Layer, engine: Engine) -> Measured | None:
    """Zeros at each edge."""
    window = layer.window
    if window is None:
        return None
    edges = (*window.before, *window.after)
    return Measured(edges, _by(edges) if window.before != window.after else _by(window.before))


@measure
def stride_beyond_kernel(layer: Layer, engine: Engine) -> Measured | None:
    """By how much a step is longer than the window."""
    window = layer.window
    if window is None:
        return None
    beyond = max(s - k for s, k in zip(window.stride, window.kernel, strict=True))
    return Measured(beyond, f"stride {_by(window.stride)}, kernel {_by(window.kernel)}")


@measure
def padding_beyond_kernel(layer: Layer, engine: Engine) -> Measured | None:
    """By how much there are more zeros than the window is wide."""
    window = layer.window
    if window is None:
        return None
    edges = zip(window.kernel, window.before, window.after, strict=True)
    beyond = max(max(a, b) - k for k, a, b in edges)
    pads = _by(tuple(max(pair) for pair in zip(window.before, window.after, strict=True)))
    return Measured(beyond, f"padding {pads}, kernel {_by(window.kernel)}")


@measure
def kernel_beyond_input(layer: Layer, engine: Engine) -> Measured | None:
    """By how much the window is larger than the input, as the packer counts.

    For a convolution it adds the zeros above and below to the width, and those at the sides to the
    height.
    """
    window = layer.window
    if window is None or len(window.kernel) != 2:
        return None
    sizes = layer.inputs[0].shape[-2:]
    zeros = [a + b for a, b in zip(window.before, window.after, strict=True)]
    if layer.kind == "conv":
        zeros = zeros[::-1]
    room = [size + more for size, more in zip(sizes, zeros, strict=True)]
    beyond = max(k - r for k, r in zip(window.kernel, room, strict=True))
    text = f"input {_by(sizes)}, padding {_by(window.before)}, kernel {_by(window.kernel)}"
    return Measured(beyond, text)


# --- the rows that the engine works on ----------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """As many input rows as the window is high, in bytes: as they are, and with the axes exchanged.

    Args:
        straight: As they are.
        turned: With rows and columns exchanged.
    """

    straight: int
    turned: int


def _rows(layer: Layer, channels: int, columns: int) -> _Rows:
    window = layer.window
    assert window is not None
    depth = aligned(layer.channels[0], channels)
    height, width = layer.inputs[0].shape[-2:]
    step_down, step_right = window.stride
    high, wide = window.kernel
    return _Rows(
        straight=depth * aligned(width, columns * step_right) * high,
        turned=depth * aligned(height, columns * step_down) * wide,
    )


def _row_limit(layer: Layer, engine: Engine) -> int:
    return engine.depthwise_rows if "depthwise" in layer.traits else engine.rows


# The packer looks at groups of so many columns, whatever the engine then uses.
_CHECKED_COLUMNS = 8


@measure
def rows(layer: Layer, engine: Engine) -> Measured | None:
    """The input rows under the window, in the better of two layouts; large pools do without."""
    if layer.window is None or len(layer.window.kernel) != 2:
        return None
    if layer.kind.endswith("pool") and max(layer.window.kernel) > engine.large_pool:
        return None
    found = _rows(layer, engine.channels, _CHECKED_COLUMNS)
    return _bytes(min(found.straight, found.turned))


@measure
def straight_rows(layer: Layer, engine: Engine) -> Measured | None:
    """The input rows under the window, where only exchanging the axes brings them below the limit.

    None where they are below it as they are, or not even then.
    """
    if layer.window is None or len(layer.window.kernel) != 2:
        return None
    found, limit = _rows(layer, engine.channels, _CHECKED_COLUMNS), _row_limit(layer, engine)
    return _bytes(found.straight) if found.turned <= limit else None


@measure
def padded_rows(layer: Layer, engine: Engine) -> Measured | None:
    """The same with channels rounded up as in memory, in the layout that is taken."""
    if layer.window is None:
        return None
    depthwise = "depthwise" in layer.traits
    channels = engine.padded_depthwise_channels if depthwise else engine.padded_channels
    if len(layer.window.kernel) == 1:
        (step,) = layer.window.stride
        width = aligned(layer.inputs[0].shape[-1], engine.columns * step)
        return _bytes(aligned(layer.channels[0], channels) * width)
    taken, limit = _rows(layer, engine.channels, _CHECKED_COLUMNS), _row_limit(layer, engine)
    found = _rows(layer, channels, engine.columns)
    return _bytes(found.straight if taken.straight <= limit else found.turned)


@measure
def whole_input(layer: Layer, engine: Engine) -> Measured | None:
    """The whole input, with channels and columns rounded up as in memory."""
    if layer.window is None:
        return None
    *_, height, width = layer.inputs[0].shape
    columns = aligned(width, engine.columns * layer.window.stride[-1])
    return _bytes(aligned(layer.channels[0], engine.padded_channels) * columns * height)


# --- weights and results ------------------------------------------------------------------------


def packed_weights(layer: Layer, engine: Engine) -> int:
    """Return the bytes of a layer's weights as the engine stores them."""
    if layer.window is None:
        return layer.weight_elements * payload_bits(layer.weight_bits) // 8
    inputs, outputs = layer.channels
    *_, high, wide = (1, *layer.window.kernel)
    if "depthwise" in layer.traits:
        rows_of_kernel = aligned(high, engine.depthwise_weight_rows)
        return aligned(outputs, engine.depthwise_weight_channels) * rows_of_kernel * wide
    area = math.prod(layer.window.kernel)
    packed = aligned(outputs, engine.weight_channels) * aligned(inputs, 8) * area
    groups = layer.facts.get("groups", 1) if layer.kind != "deconv" else 1
    return packed * (groups if "grouped" in layer.traits else 1)


@measure
def weights(layer: Layer, engine: Engine) -> Measured | None:
    """Bytes of the weights of one group, as the engine stores them."""
    if not layer.weights:
        return None
    found = packed_weights(layer, engine)
    if "grouped" in layer.traits and layer.kind != "deconv":
        found //= layer.facts["groups"]
    passes = -(-found // engine.weights)
    text = f"{found} bytes" + (f", {passes} passes" if passes > 1 else "")
    return Measured(found, text)


@measure
def prefetched(layer: Layer, engine: Engine) -> Measured | None:
    """Bytes of weights and biases that are fetched before the layer runs."""
    return _bytes(prefetched_bytes(layer, engine)) if layer.weights else None


def prefetched_bytes(layer: Layer, engine: Engine) -> int:
    """Return the bytes of weights and biases that are fetched before the layer runs."""
    found = aligned(packed_weights(layer, engine), 16)
    passes = -(-found // engine.weights) if engine.external_split else 1
    groups = layer.facts.get("groups", 1) if "grouped" in layer.traits else 1
    if layer.kind in ("conv", "conv1d"):
        found = -(-found // (passes * groups))
    return found + aligned(4 * layer.biases, 16)


@measure
def results(layer: Layer, engine: Engine) -> Measured | None:
    """Bytes of the result."""
    found = sum(
        data.per_sample(layer.batch) * payload_bits(data.bits or 32) // 8 for data in layer.outputs
    )
    return _bytes(found)


# --- widths -------------------------------------------------------------------------------------


@measure
def operand_bits(layer: Layer, engine: Engine) -> Measured | None:
    """Width of each operand."""
    found = tuple(data.bits or 32 for data in layer.inputs)
    return Measured(found, f"{max(found)} bits") if found else None


@measure
def weight_bits(layer: Layer, engine: Engine) -> Measured | None:
    """Width in which weights are stored."""
    if not layer.weights:
        return None
    return Measured(payload_bits(layer.weight_bits), f"{layer.weight_bits} bits")


@measure
def result_bits(layer: Layer, engine: Engine) -> Measured | None:
    """Width in which results are stored; a float result comes from 32 bits."""
    found = [data.bits for data in layer.outputs]
    widths = tuple(32 if bits is None else payload_bits(bits) for bits in found)
    named = ["float" if bits is None else f"{bits} bits" for bits in found]
    return Measured(widths, ", ".join(dict.fromkeys(named))) if widths else None


@measure
def narrowing(layer: Layer, engine: Engine) -> Measured | None:
    """By how many bits a change of width narrows the storage."""
    before, after = (data.bits or 32 for data in (*layer.inputs, *layer.outputs))
    lost = payload_bits(before) - payload_bits(after)
    return Measured(lost, f"{before} to {after} bits")


# --- facts of one kind --------------------------------------------------------------------------


def _fact(name: str, text: Callable[[Any], str] = str) -> None:
    def found(layer: Layer, engine: Engine) -> Measured | None:
        value = layer.facts.get(name)
        return None if value is None else Measured(value, text(value))

    found.__name__ = name
    found.__doc__ = f"The fact {name!r} of a layer."
    measure(found)


def _lists(shapes: Any) -> str:
    return " and ".join(str(list(shape)) for shape in shapes)


_fact("rank", lambda rank: f"{rank} dimensions")
_fact("length", lambda length: f"{length} values")
_fact("eps")
_fact("operands", lambda count: f"{count} tensors")
_fact("steps", lambda steps: f"step {_by(steps)}")
_fact("pieces", lambda count: f"{count} pieces")
_fact("batch", lambda batch: f"{batch} sequences")
_fact("order", lambda order: "(" + ", ".join(map(str, order)) + ")")
_fact("shapes", _lists)
_fact("why")
_fact("groups", lambda groups: f"{groups} groups")
_fact("images", lambda count: f"{count} images")


@measure
def computed(layer: Layer, engine: Engine) -> Measured | None:
    """Whether places or masks are computed by the model."""
    value = layer.facts.get("computed")
    return None if value is None else Measured(value, "computed" if value else "constant")


@measure
def op(layer: Layer, engine: Engine) -> Measured | None:
    """The op of the model."""
    return Measured(layer.op, layer.op)


@measure
def channels(layer: Layer, engine: Engine) -> Measured | None:
    """Input and output channels."""
    inputs, outputs = layer.channels
    return Measured((inputs, outputs), f"{inputs} to {outputs} channels")


@measure
def channels_per_group(layer: Layer, engine: Engine) -> Measured | None:
    """Input channels of each group."""
    inputs, outputs = layer.channels
    found = inputs // max(layer.facts.get("groups", 1), 1)
    return Measured(found, f"{inputs} to {outputs} channels in {layer.facts.get('groups')} groups")


@measure
def features(layer: Layer, engine: Engine) -> Measured | None:
    """Input features of a linear layer."""
    return Measured(layer.channels[0], f"{layer.channels[0]} features")


@measure
def second_factor(layer: Layer, engine: Engine) -> Measured | None:
    """Bytes of one matrix of the second factor, as the engine stores it."""
    rows_of_it, columns = layer.facts["matrix"]
    return _bytes(aligned(rows_of_it, 8) * aligned(columns, 4))


@measure
def averaged_per_channel(layer: Layer, engine: Engine) -> Measured | None:
    """Averaged values, in room for one 32-bit number per channel; powers of two are shifted."""
    window = layer.window
    assert window is not None
    count = math.prod(window.kernel)
    if count & (count - 1) == 0:
        return None
    found = -(-count // (4 * layer.channels[0]))
    return Measured(found, f"{count} values of {layer.channels[0]} channels")


# --- other runtimes -----------------------------------------------------------------------------


@measure
def accumulator(layer: Layer, engine: Engine) -> Measured | None:
    """The largest sum that codes can make, where a layer has no integer kernel in onnxruntime."""
    wide = max(*(data.bits or 32 for data in layer.inputs), layer.weight_bits) > 8
    if not (wide or layer.kind == "deconv"):
        return None
    terms = layer.macs // max(math.prod(layer.outputs[0].shape), 1)
    if layer.kind == "deconv" and layer.window is not None:
        terms = layer.channels[0] * math.prod(layer.window.kernel)
    bits = (layer.inputs[0].bits or 8) + layer.weight_bits - 2
    found = terms << bits
    return Measured(found, f"up to {found}")


@measure
def sums(layer: Layer, engine: Engine) -> Measured | None:
    """The largest sum of the codes that one window averages."""
    if layer.window is None:
        return None
    found = math.prod(layer.window.kernel) << ((layer.inputs[0].bits or 8) - 1)
    return Measured(found, f"up to {found}")
