"""From the recorded dataflow of a model to the layers that an engine runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_linger.analysis.layers import Data, Layer, Padding, Shape
from lightning_linger.core.graph import Node, Run, TensorSpec
from lightning_linger.core.platform import Platform
from lightning_linger.core.registry import op_of
from lightning_linger.core.sites import Site
from lightning_linger.ops.attention import MultiHeadAttentionOp
from lightning_linger.ops.dropout import DropoutOp
from lightning_linger.ops.recurrent.op import RecurrentOp

# Reads one call of the model and adds what runs for it.
Reader = Callable[["Visit"], None]

_WIDE = 32

# Ops that an engine lacks, but for some calls that are written with what it has.
_SOMETIMES = ("conv_transpose1d", "div", "sub")


class Walk:
    """Reads one recorded forward, call by call.

    Args:
        run: The forward.
        sites: The sites as the quantize stage plans them, by key.
        platform: The target.
        readers: How each op is read, by kind.

    Attributes:
        batch: Samples that were recorded together. Layers are those of one sample.
        layers: What runs, in order.
        inputs: What the graph takes.
        outputs: What it gives.
    """

    def __init__(
        self,
        run: Run,
        sites: Mapping[str, Site],
        platform: Platform,
        readers: Mapping[str, Reader],
    ) -> None:
        self.sites = sites
        self.platform = platform
        self.layers: list[Layer] = []
        self._readers = readers
        self._data: dict[int, Data] = {}
        self._constants: set[int] = set()
        self._inner = 0
        self._made = {spec.value for node in run.nodes for spec in node.outputs}
        self._given = run.given
        nodes = _live(run)
        self._used = {spec.value for node in nodes for spec in node.inputs} | set(run.returned)
        self.batch = _batch_of(nodes, run.given)
        for node in nodes:
            self._visit(node)
        self.outputs = self._returned(run)
        self.inputs = [
            data
            for value, data in self._data.items()
            if value not in self._made and not data.constant and data.bits is not None
        ]

    # --- values -----------------------------------------------------------------------------

    def data(self, spec: TensorSpec) -> Data:
        """Return a tensor of the model."""
        found = self._data.get(spec.value)
        if found is None:
            found = Data(spec.value, spec.shape, None, self._is_constant(spec))
            self._data[spec.value] = found
        return found

    def define(self, spec: TensorSpec, data: Data) -> Data:
        """Say what a tensor of the model is."""
        self._data[spec.value] = data
        return data

    def is_computed(self, spec: TensorSpec) -> bool:
        """Whether a tensor follows from other activations.

        What the model is given counts, too; what the forward makes of nothing is a constant.
        """
        return not self._is_constant(spec)

    def is_used(self, spec: TensorSpec) -> bool:
        """Whether anything reads a tensor, or it is returned."""
        return spec.value in self._used

    def inner(self, shape: Shape, bits: int | None) -> Data:
        """Return a new tensor inside an op."""
        self._inner += 1
        return Data(("inner", self._inner), shape, bits)

    def written(self, data: Data) -> Data:
        """Return a tensor with its padding written out."""
        if data.padding is None:
            return data
        result = self.inner(data.shape, data.bits)
        inside = dataclasses.replace(data, padding=None)
        site = data.padding.site
        self.layers.append(Layer(site, "pad", "pad", (inside,), (result,), batch=self.batch))
        return result

    def entered(self, spec: TensorSpec, bits: int) -> Data:
        """Return a plain tensor as it is once it is quantized."""
        return self.define(spec, dataclasses.replace(self.data(spec), bits=bits))

    # --- calls ------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        op = op_of(node.op)
        if node.inputs and all(self._is_constant(spec) for spec in node.inputs):
            self._constants |= {spec.value for spec in node.outputs}
            return
        site = self.sites.get(node.key)
        visit = Visit(self, node, site)
        if op is None:
            self._leave(visit, f"the library has no op for {node.function!r}")
        elif not op.has_site:
            self._readers.get(node.op, _move)(visit)
        elif isinstance(op, DropoutOp):
            visit.same(visit.source())
        elif site is None or not site.quantized:
            self._leave(visit, (site and site.why_float) or "not reached")
        elif site.completes_fold:
            visit.same(visit.source())
        elif node.op in self.platform.unsupported and node.op not in _SOMETIMES:
            visit.refuse(f"use {self.platform.unsupported[node.op]}")
        else:
            self._readers.get(node.op, _unknown)(visit)

    def _is_constant(self, spec: TensorSpec) -> bool:
        made_of_nothing = spec.value not in self._made and spec.value not in self._given
        return spec.constant or made_of_nothing or spec.value in self._constants

    def _returned(self, run: Run) -> list[Data]:
        found = [self.written(self._data[value]) for value in run.returned if value in self._data]
        for again in (data for i, data in enumerate(found) if data in found[:i]):
            layer = Layer("<output>", "identity", "identity", (again,), (again,), batch=self.batch)
            self.layers.append(layer)
        return found

    def _leave(self, visit: Visit, why: str) -> None:
        """Read a call that stays float."""
        node = visit.node
        if not any(spec.floating for spec in (*node.inputs, *node.outputs)):
            return
        inputs = tuple(self.written(self.data(spec)) for spec in node.inputs if spec.floating)
        zeros = visit.zeros() if node.op == "pad" else None
        if zeros is not None:  # a convolution takes them over, before its quantizer or behind
            (spec,) = node.outputs
            self.define(spec, dataclasses.replace(inputs[0], shape=spec.shape, padding=zeros))
            return
        outputs = tuple(
            self.define(spec, Data(spec.value, spec.shape))
            for spec in node.outputs
            if spec.floating
        )
        self.layers.append(Layer(node.key, node.op, "float", inputs, outputs, facts={"why": why}))


@dataclass(frozen=True)
class Visit:
    """One call that is being read.

    Args:
        walk: The whole forward.
        node: The call.
        site: Its site, None for what only moves values.
    """

    walk: Walk
    node: Node
    site: Site | None

    @property
    def call(self) -> Any:
        """The bound arguments."""
        assert self.site is not None  # readers of sites ask
        return self.site.recorded_call

    @property
    def engine(self) -> str:
        """Name of the platform."""
        return self.walk.platform.name

    # --- widths -----------------------------------------------------------------------------

    @property
    def activation_bits(self) -> int:
        """Width that operands have."""
        assert self.site is not None
        assert self.site.config is not None  # only quantized sites are read
        return self.site.config.activation_bits

    @property
    def weight_bits(self) -> int:
        """Width of weights."""
        return self.site.weights.bits if self.site is not None else 8

    @property
    def output_bits(self) -> int:
        """Width of the result; 32 for an accumulator that becomes float."""
        assert self.site is not None
        if self.site.output is not None:
            return self.site.output.grid.bits
        if self.site.op.output_scale == "inputs":
            return self.activation_bits
        return _WIDE

    # --- tensors ----------------------------------------------------------------------------

    def source(self) -> Data:
        """Return the first tensor of the call as it arrives."""
        return self.walk.data(self.node.inputs[0])

    def arriving(self, position: int) -> Data | None:
        """Return an operand with its padding; None if it is a number."""
        assert self.site is not None
        spec = self.site.op.operands(self.call)[position]
        if not isinstance(spec, TensorSpec):
            return None
        bits = self.site.width_of_operand(position, self.activation_bits)
        data = self.walk.data(spec)
        if data.constant:
            return dataclasses.replace(data, bits=bits)
        if data.bits is None:
            return self.walk.entered(spec, bits)
        if data.bits == bits:
            return data
        data = self.walk.written(data)
        result = self.walk.inner(data.shape, bits)
        self.add("requantize", (data,), (result,))
        return result

    def operand(self, position: int) -> Data:
        """Return an operand that is a tensor."""
        data = self.arriving(position)
        assert data is not None  # the reader knows which operands are numbers
        return self.walk.written(data)

    def operands(self) -> list[Data | None]:
        """Return all operands, None for numbers."""
        assert self.site is not None
        found = [self.arriving(i) for i in range(len(self.site.op.operands(self.call)))]
        return [None if data is None else self.walk.written(data) for data in found]

    def result(self, index: int = 0, bits: int | None = None) -> Data:
        """Return a result as new memory."""
        spec = self.node.outputs[index]
        width = self.output_bits if bits is None else bits
        plain = width == _WIDE and self._is_real
        return self.walk.define(spec, Data(spec.value, spec.shape, None if plain else width))

    def zeros(self) -> Padding | None:
        """Return the zeros that a pad puts around a tensor; None for another pad."""
        call, rank = self.call, len(self.node.inputs[0].shape)
        if call.mode != "constant" or call.value or min(call.pad, default=0) < 0:
            return None
        pairs = list(zip(call.pad[::2], call.pad[1::2], strict=True))[::-1]
        return Padding(self.node.key, (*[(0, 0)] * (rank - len(pairs)), *pairs))

    @property
    def _is_real(self) -> bool:
        config = self.site.config if self.site is not None else None
        return config is None or config.output_bits is None

    def inner(self, shape: Sequence[int], bits: int | None = None) -> Data:
        """Return a new tensor inside the op."""
        return self.walk.inner(tuple(shape), self.activation_bits if bits is None else bits)

    def same(self, data: Data) -> None:
        """Say that every result is the memory of a tensor, reshaped."""
        for spec in self.node.outputs:
            self.walk.define(spec, data.reshaped(spec.shape))

    # --- layers -----------------------------------------------------------------------------

    def add(
        self,
        kind: str,
        inputs: Sequence[Data],
        outputs: Sequence[Data],
        traits: Sequence[str] = (),
        macs: int = 0,
        **fields: Any,
    ) -> None:
        """Add what runs; ``macs`` are those of all samples."""
        batch = self.walk.batch
        layer = Layer(
            site=self.node.key,
            op=self.node.op,
            kind=kind,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            traits=frozenset(traits),
            macs=macs // batch if macs % batch == 0 else macs,
            batch=batch,
            **fields,
        )
        self.walk.layers.append(layer)

    @property
    def shifts(self) -> bool:
        """Whether the engine is one of those that shift, whose kernels are few."""
        return self.walk.platform.right_shift_only

    def refuse(self, instead: str = "") -> None:
        """Add what the engine does not have, and what to do instead."""
        inputs = [data for data in self.operands() if data is not None]
        outputs = [self.result(i) for i, spec in enumerate(self.node.outputs) if spec.floating]
        self.add("unsupported", inputs, outputs, facts={"instead": instead})


def _unknown(visit: Visit) -> None:
    """Read an op that nothing is known about."""
    inputs = [data for data in visit.operands() if data is not None]
    outputs = [visit.result(i) for i, spec in enumerate(visit.node.outputs) if spec.floating]
    visit.add("unverified", inputs, outputs)


def _move(visit: Visit) -> None:
    """Read a movement that nothing is known about."""
    data = visit.walk.written(visit.source())
    outputs = [
        visit.walk.define(spec, Data(spec.value, spec.shape, data.bits))
        for spec in visit.node.outputs
        if spec.floating
    ]
    visit.add("unverified", (data,), outputs)


def _live(run: Run) -> list[Node]:
    """Return the calls that something returned depends on, in order."""
    wanted: set[int] = set(run.returned)
    found: list[Node] = []
    for node in reversed(run.nodes):
        values: set[Hashable] = {spec.value for spec in node.outputs}
        if node.written is not None:
            values.add(node.written)
        if values & wanted:
            wanted |= {spec.value for spec in node.inputs}
            found.append(node)
    return found[::-1]


def _batch_of(nodes: Sequence[Node], given: set[int]) -> int:
    """Return how many samples were recorded together.

    They are the first dimension of what the model takes, unless a layer that wants time first finds
    time there.
    """
    taken = (spec.shape for node in nodes for spec in node.inputs if spec.value in given)
    first = next((shape[0] for shape in taken if shape), 1)
    for node in nodes:
        op = op_of(node.op)
        if isinstance(op, RecurrentOp) and not op.is_cell:
            call = op.bind(*node.args, **node.kwargs)
            time_first = call.batch_sizes is None and not call.batch_first
        else:
            time_first = isinstance(op, MultiHeadAttentionOp)
        shape = node.inputs[0].shape if node.inputs else ()
        if time_first and len(shape) == 3 and shape[0] == first:
            return max(shape[1], 1)
    return max(first, 1)
