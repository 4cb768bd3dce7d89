"""Whether a file computes what the model computes, and where it stops doing so."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_linger.core.calls import Event
from lightning_linger.core.errors import ConfigError, NotReadyError, UnsupportedError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.tags import tag_of
from lightning_linger.export.engines import engine_of
from lightning_linger.export.files import check_target, write_atomically
from lightning_linger.export.inputs import Inputs
from lightning_linger.export.metadata import METADATA_PREFIX
from lightning_linger.export.reading import input_names, read_model
from lightning_linger.export.runner import OnnxIntegerRunner
from lightning_linger.simulate.divergence import main_result
from lightning_linger.simulate.integer import integer
from lightning_linger.stages.prepare import no_trace

Array = NDArray[Any]
Arrays = Mapping[str, Array]

# A batch for a graph that leaves its size open.
_OPEN_BATCH = 32


@dataclass(frozen=True)
class Difference:
    """Where a file and its model first give different values.

    Args:
        site: Key of the site, or the name of an output.
        batch: Which batch, from 0.
        index: Of the first element that differs.
        expected: What the model has there: an integer, or a real value where ``step`` is None.
        found: What the file has there.
        step: ``real = step * integer``.
        differing: Elements of this tensor that differ.
        elements: Of how many.
        scales: The steps that the file was written with at this site, by argument.
    """

    site: str
    batch: int
    index: tuple[int, ...]
    expected: int | float
    found: int | float
    step: float | None
    differing: int
    elements: int
    scales: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Describe it in a line, or two where the steps are known."""
        at = ", ".join(map(str, self.index))
        text = f"`{self.site}` [{at}] in batch {self.batch}: expected {self._shown(self.expected)}"
        text += f", found {self._shown(self.found)}"
        text += f" ({self.differing} of {self.elements} differ)"
        steps = ", ".join(f"{name}={value}" for name, value in self.scales.items())
        return f"{text}\n  steps: {steps}" if steps else text

    def _shown(self, value: int | float) -> str:
        return f"{value}" if self.step is None else f"{value} ({value * self.step:g})"


@dataclass
class Verdict:
    """What a comparison found.

    Attributes:
        path: The file.
        batches: How many were compared.
        elements: Output elements that were compared.
        differing: Those that differ.
        first: The first site, in the order of the forward, at which they do; None if they do not.
    """

    path: Path
    batches: int = 0
    elements: int = 0
    differing: int = 0
    first: Difference | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.differing == 0

    def __str__(self) -> str:
        """Say so in words."""
        if self.equal:
            return f"{self.path}: equal, {self.elements} output elements in {self.batches} batches"
        count = f"{self.differing} of {self.elements} output elements differ"
        return f"{self.path}: DIFFERENT, {count}\nfirst difference: {self.first}"


def verify(
    model: nn.Module,
    path: str | os.PathLike[str],
    data: Arrays,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> Verdict:
    """Compare an exported file with the integer forward of its model, element by element.

    A ``linger`` file runs in :class:`OnnxIntegerRunner`, a ``qdq`` file in onnxruntime. The model
    is left as it was.

    Args:
        model: The model the file was made of, quantized.
        path: The file.
        data: Samples by name of the graph's inputs, with the batch first. They are cut into the
            graph's batches; the last one is filled up from the start.
        args: Positional inputs of one forward: which tensors go where.
        kwargs: Keyword inputs.

    Raises:
        ConfigError: If the data do not fit the graph, or the graph does not fit the model.
        NotReadyError: If the quantize stage is off.
        UnsupportedError: If the file cannot be run here.
    """
    source = Path(path)
    proto = read_model(source)
    inputs = Inputs(model, args, kwargs or {})
    names = input_names(proto.graph)
    if len(names) != len(inputs.tensors):
        msg = (
            f"{str(source)!r} has the inputs {names}, and {type(model).__name__}.forward takes "
            f"{inputs.names}. Pass the model that the file was made of."
        )
        raise ConfigError(msg)
    if _metadata(proto, "inputs") or _metadata(proto, "outputs"):
        msg = (
            f"{str(source)!r} takes or gives codes, the model real values. Verify a file that was "
            "exported without `integer_inputs` and `integer_outputs`."
        )
        raise ConfigError(msg)
    if not instrumentation_of(model).switches.quantize:
        msg = "the quantize stage is off: there are no integers to compare the file with."
        raise NotReadyError(msg)
    run = engine_of(source, dialect_in(proto))
    verdict = Verdict(source)
    with no_trace(model):
        model.eval()
        for batch in batches(proto.graph, data):
            pairs = zip(names, inputs.tensors, strict=True)
            arrays = [batch[name].astype(_dtype_of(x), copy=False) for name, x in pairs]
            _compare(verdict, run(arrays), _integers(model, inputs, arrays))
            if not verdict.equal and verdict.first is None:
                verdict.first = _locate(model, inputs, proto, arrays, verdict)
            verdict.batches += 1
    return verdict


def dialect_in(proto: onnx.ModelProto) -> str:
    """Return the dialect of a file: ``qdq`` where all its nodes are standard ONNX."""
    standard = all(node.domain in ("", "ai.onnx") for node in proto.graph.node)
    return "qdq" if standard else "linger"


def batches(graph: onnx.GraphProto, data: Arrays) -> Iterator[dict[str, Array]]:
    """Cut samples into the batches that a graph takes.

    Raises:
        ConfigError: If an input is missing, has another shape, or another number of samples.
    """
    counts, sizes = set(), set()
    for value in graph.input:
        if value.name not in data:
            continue
        array, wanted = data[value.name], _declared(value)
        fits = array.ndim == len(wanted) and all(
            size in (None, found) for size, found in zip(wanted[1:], array.shape[1:], strict=True)
        )
        if not fits or not array.size:
            shape = "x".join("?" if size is None else str(size) for size in wanted)
            msg = (
                f"the data for the input {value.name!r} have the shape {array.shape}. The graph "
                f"takes {shape}; the first axis counts samples."
            )
            raise ConfigError(msg)
        if wanted:
            counts.add(len(array))
            sizes.add(wanted[0])
    missing = [name for name in input_names(graph) if name not in data]
    if missing or len(counts) > 1 or len(sizes) > 1:
        what = f"no data for {missing}" if missing else f"{sorted(counts)} samples"
        msg = f"found {what}. Pass as many samples for each of the inputs {input_names(graph)}."
        raise ConfigError(msg)
    names = input_names(graph)
    if not counts:
        yield {name: data[name] for name in names}
        return
    (count,), (size,) = counts, sizes
    step = size or min(count, _OPEN_BATCH)
    for start in range(0, count, step):
        index = np.arange(start, start + step) % count
        yield {name: data[name][index] for name in names}


def _declared(value: onnx.ValueInfoProto) -> list[int | None]:
    found = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else None for d in found]


# --- the model and the file ---------------------------------------------------------------------


@torch.no_grad()
def _integers(model: nn.Module, inputs: Inputs, arrays: Sequence[Array]) -> list[Array]:
    bound = inputs.bind(_tensors(inputs, arrays))
    with integer(model):
        leaves = tree_leaves(model(*bound.args, **bound.kwargs))
    return [x.cpu().numpy() for x in leaves if isinstance(x, Tensor)]


def _dtype_of(x: Tensor) -> np.dtype[Any]:
    return torch.empty(0, dtype=x.dtype).numpy().dtype


def _tensors(inputs: Inputs, arrays: Sequence[Array]) -> list[Tensor]:
    pairs = zip(inputs.tensors, arrays, strict=True)
    return [torch.from_numpy(array).to(x.device, x.dtype) for x, array in pairs]


def _compare(verdict: Verdict, found: Sequence[Array], expected: Sequence[Array]) -> None:
    if [x.shape for x in found] != [x.shape for x in expected]:
        msg = (
            f"{str(verdict.path)!r} gives the shapes {[x.shape for x in found]}, the model "
            f"{[x.shape for x in expected]}. Pass the model that the file was made of."
        )
        raise ConfigError(msg)
    verdict.elements += sum(x.size for x in expected)
    verdict.differing += sum(int((x != y).sum()) for x, y in zip(found, expected, strict=True))


def _locate(
    model: nn.Module,
    inputs: Inputs,
    proto: onnx.ModelProto,
    arrays: Sequence[Array],
    verdict: Verdict,
) -> Difference:
    """Find the first site whose result differs, or else the first output."""
    results = _metadata(proto, "results")
    # A file that cannot be looked into is compared at its outputs.
    with contextlib.suppress(UnsupportedError):
        traced = _trace(verdict.path, proto, [*results.values()], arrays)
        for site, (codes, step) in _site_results(model, inputs, arrays).items():
            there = traced.get(results.get(site, ""))
            if there is None or there.shape != codes.shape:
                continue
            if step is None and there.dtype.kind != "f":
                continue
            there = there if step is None else _codes(there)
            if there is not None and (there != codes).any():
                scales = _metadata(proto, "steps").get(site, {})
                return _difference(site, verdict.batches, codes, there, step, scales)
    found = engine_of(verdict.path, dialect_in(proto))(arrays)
    expected = _integers(model, inputs, arrays)
    for value, one, other in zip(proto.graph.output, expected, found, strict=True):
        if (one != other).any():
            return _difference(value.name, verdict.batches, one, other, None, {})
    msg = "internal: a difference has gone."
    raise RuntimeError(msg)


def _difference(
    site: str,
    batch: int,
    expected: Array,
    found: Array,
    step: float | None,
    scales: Mapping[str, Any],
) -> Difference:
    wrong = np.argwhere(expected != found)
    index = tuple(int(i) for i in wrong[0])
    values = expected[index].item(), found[index].item()
    return Difference(site, batch, index, *values, step, len(wrong), expected.size, scales)


@torch.no_grad()
def _site_results(
    model: nn.Module, inputs: Inputs, arrays: Sequence[Array]
) -> dict[str, tuple[Array, float | None]]:
    """Return the integers, or the real values, of every quantized site and their step."""
    found: dict[str, tuple[Array, float | None]] = {}

    def keep(event: Event) -> None:
        result = main_result(event.result)
        if result is None or not event.site.quantized or event.result is event.call[0]:
            return
        tag = tag_of(result)
        coded = tag is not None and not result.dtype.is_floating_point
        # A clone: a later in-place op of the model must not change what is compared.
        array = result.detach().clone().cpu().numpy()
        found[event.site.key] = array, float(tag.step) if coded and tag is not None else None

    instrumentation = instrumentation_of(model)
    before, instrumentation.tap = instrumentation.tap, keep
    try:
        _integers(model, inputs, arrays)
    finally:
        instrumentation.tap = before
    return found


def _metadata(proto: onnx.ModelProto, name: str) -> dict[str, Any]:
    found = {p.key: p.value for p in proto.metadata_props}.get(METADATA_PREFIX + name)
    return dict(json.loads(found)) if found else {}


def _trace(
    path: Path, proto: onnx.ModelProto, names: Sequence[str], arrays: Sequence[Array]
) -> dict[str, Array]:
    """Run a file and return values inside it."""
    inputs = dict(zip(input_names(proto.graph), arrays, strict=True))
    if dialect_in(proto) == "linger":
        return OnnxIntegerRunner(path).trace(inputs)
    import onnxruntime

    types = {value.name: value for value in proto.graph.value_info}
    outputs = {value.name for value in proto.graph.output}
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    wanted = [name for name in names if name in types and name not in outputs]
    watched.graph.output.extend(types[name] for name in wanted)
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return dict(zip(wanted, session.run(wanted, inputs), strict=True)) if wanted else {}


def _codes(stored: Array) -> Array | None:
    """Return the codes that are stored, unsigned ones around the middle of their range."""
    if stored.dtype.kind == "u":
        return np.asarray(stored.astype(np.int64) - 2 ** (8 * stored.itemsize - 1))
    return np.asarray(stored.astype(np.int64)) if stored.dtype.kind == "i" else None


# --- the engine's own files ---------------------------------------------------------------------


def engine_input(path: str | os.PathLike[str], batch: Arrays) -> dict[str, Array]:
    """Return what the engine is given for a batch: the codes of each input.

    Args:
        path: A ``linger`` file.
        batch: Real values by name of the graph's inputs.
    """
    runner = OnnxIntegerRunner(path)
    values = runner.trace(batch)
    found = {}
    for name in runner.input_names:
        quant = [n for n in runner.model.graph.node if name in n.input and n.op_type == "Quant"]
        found[name] = values[quant[0].output[0]] if quant else values[name]
    return found


def engine_output(path: str | os.PathLike[str], batch: Arrays) -> dict[str, tuple[Array, float]]:
    """Return what the engine has to give for a batch: the codes of each output, and their step."""
    runner = OnnxIntegerRunner(path)
    values = {**runner.constants, **runner.trace(batch)}
    makers = {name: node for node in runner.model.graph.node for name in node.output}
    found = {}
    for name in runner.output_names:
        maker = makers.get(name)
        step, source = math.nan, name
        if maker is not None and maker.op_type == "Dequant":
            source = maker.input[0]
            step = 1.0 / next(a.f for a in maker.attribute if a.name == "scale_o")
        found[name] = values[source], step
    return found


def write_raw(array: Array, path: str | os.PathLike[str]) -> Path:
    """Write the bytes of an array as the engine reads them: in order, little-endian, no header."""
    target = check_target(path)
    write_atomically(target, array.astype(array.dtype.newbyteorder("<")).tobytes())
    return target


def compare_raw(
    path: str | os.PathLike[str], name: str, expected: Array, step: float
) -> Difference | None:
    """Compare a file that the engine or a board wrote with the codes of an output.

    Raises:
        ConfigError: If it cannot be read, or has another size.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        msg = f"cannot read {str(path)!r}: {error.strerror or error}."
        raise ConfigError(msg) from error
    if len(content) != expected.nbytes:
        msg = (
            f"{str(path)!r} has {len(content)} bytes. The output {name!r} has {expected.nbytes}: "
            f"{expected.shape} of {expected.dtype}."
        )
        raise ConfigError(msg)
    found = np.frombuffer(content, expected.dtype.newbyteorder("<")).reshape(expected.shape)
    if (found == expected).all():
        return None
    return _difference(name, 0, expected, found, None if math.isnan(step) else step, {})
