"""What an ONNX file computes in integers, at which scales, and where it leaves them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import onnx

from lightning_linger.core.table import Table
from lightning_linger.export.flow import (
    ABOUT_CODES,
    DEQUANT,
    QUANT,
    Codes,
    Engine,
    State,
    engine_of,
    keeps_codes,
    state_of_input,
)
from lightning_linger.export.generations import LINGER1, LINGER1_DOMAIN
from lightning_linger.export.lowering import MOVEMENTS
from lightning_linger.export.reading import (
    Source,
    constants_of,
    input_names,
    label_of,
    platform_of,
    read_model,
)

# What a node does.
ENTERS, LEAVES, INTEGER, MOVES, REAL = "enters", "leaves", "integer", "moves", "float"


@dataclass(frozen=True)
class NodeRow:
    """One node.

    Args:
        node: Its name.
        op: Its op type.
        does: ``enters`` or ``leaves`` integers, computes in them (``integer``), ``moves`` codes, or
            works on real values, places and sizes (``float``).
        reads: The codes of its operands.
        gives: The codes of its results.
    """

    node: str
    op: str
    does: str
    reads: str
    gives: str


class Chain(Table[NodeRow]):
    """The nodes in their order."""

    row_type = NodeRow


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` finds.

    Args:
        dialect: ``linger3``, ``linger1``, ``qdq``, or ``onnx`` where nothing is quantized.
        platform: The engine's name of the target, empty where the dialect names none.
        producer: Who wrote the file.
        inputs: Name and type of each input.
        outputs: Name and type of each output.
        chain: The nodes.
        leaves: Where integers are left: the codes, and who reads their real values.
        problems: What contradicts itself, and what ``lightning-linger repair`` would change.
    """

    dialect: str
    platform: str
    producer: str
    inputs: list[str]
    outputs: list[str]
    chain: Chain
    leaves: list[str]
    problems: list[str]

    def __str__(self) -> str:
        """Return a report."""
        target = f" for {self.platform}" if self.platform else ""
        counts = {does: sum(row.does == does for row in self.chain) for does in (INTEGER, REAL)}
        lines = [
            f"dialect: {self.dialect}{target}",
            f"producer: {self.producer or 'unknown'}",
            f"inputs: {', '.join(self.inputs) or 'none'}",
            f"outputs: {', '.join(self.outputs)}",
            "",
            str(self.chain),
            "",
            f"{counts[INTEGER]} node(s) compute in integers, {counts[REAL]} do not",
        ]
        for title, found in (("leaves integers", self.leaves), ("problems", self.problems)):
            lines += ["", f"{title}:", *(f"  {line}" for line in found or ["none"])]
        return "\n".join(lines)


def inspect_model(source: Source) -> Inspection:
    """Follow a file from its inputs to its outputs.

    Args:
        source: Path of a file in any dialect, its bytes, or a loaded model.

    Raises:
        ConfigError: If there is no such file, or it holds no ONNX model, or a damaged one.
        UnsupportedError: If an attribute of the engine's ops holds something else than its name
            says, or the nodes name several platforms.
    """
    model = read_model(source)
    graph = model.graph
    engines = {node.output[0]: engine_of(node) for node in graph.node if node.output}
    dialect = _dialect_of(graph, engines)
    walk: _Linger | _QDQ = _QDQ(graph) if dialect in ("qdq", "onnx") else _Linger(graph, engines)
    walk.run()
    readers = _readers(graph)
    version = f" {model.producer_version}" if model.producer_version else ""
    return Inspection(
        dialect=dialect,
        platform="" if dialect in ("qdq", "onnx") else platform_of(graph),
        producer=f"{model.producer_name}{version}",
        inputs=[_typed(value) for value in graph.input if value.name in set(input_names(graph))],
        outputs=[_typed(value) for value in graph.output],
        chain=Chain(walk.rows),
        leaves=[
            f"{name} ({codes}): {', '.join(readers.get(name, ['nobody']))}"
            for name, codes in walk.left.items()
        ],
        problems=walk.problems,
    )


def _dialect_of(graph: onnx.GraphProto, engines: Mapping[str, Engine | None]) -> str:
    if any(engines.values()):
        older = {s.op_type for name, s in LINGER1.items() if s.op_type != name}
        named = any(node.op_type in older for node in graph.node)
        domain = any(node.domain == LINGER1_DOMAIN for node in graph.node)
        return "linger1" if named or domain else "linger3"
    quantized = any(node.op_type == "QuantizeLinear" for node in graph.node)
    return "qdq" if quantized else "onnx"


def _readers(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """Return who reads each value."""
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(label_of(node))
    for value in graph.output:
        readers.setdefault(value.name, []).append(f"the output {value.name!r}")
    return readers


def _typed(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    kinds = onnx.TensorProto.DataType
    known = tensor.elem_type in kinds.values()
    kind = kinds.Name(tensor.elem_type).lower() if known and tensor.elem_type else "untyped"
    if not tensor.HasField("shape"):
        return f"{value.name} {kind}"
    sizes = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim]
    return f"{value.name} {kind}[{', '.join(sizes)}]"


def _listed(states: Iterable[object]) -> str:
    return ", ".join(str(state) for state in states if state is not None)


class _Linger:
    """A walk through a file of the ``linger`` dialect, as it stands.

    Args:
        graph: The graph.
        engines: The engine's nodes by their first result.
    """

    def __init__(self, graph: onnx.GraphProto, engines: Mapping[str, Engine | None]) -> None:
        self.graph = graph
        self.engines = engines
        self.constants = constants_of(graph)
        inputs = set(input_names(graph))
        self.states: dict[str, State] = {
            value.name: state_of_input(value) for value in graph.input if value.name in inputs
        }
        self.rows: list[NodeRow] = []
        self.left: dict[str, Codes] = {}
        self.problems: list[str] = []
        self._quants: dict[tuple[str, State], str] = {}
        self._dequants: dict[str, str] = {}

    def run(self) -> None:
        """Go through the nodes."""
        for node in self.graph.node:
            engine = self.engines.get(node.output[0]) if node.output else None
            if engine is None:
                does, given = self._standard(node)
            else:
                does, given = self._engine(node, engine)
            reads = [self.states.get(name) for name in node.input]
            known = any(name in self.states for name in node.input)
            if engine is not None or known:
                self.states.update(zip(node.output, given, strict=False))
            self.rows.append(NodeRow(node.name, node.op_type, does, _listed(reads), _listed(given)))

    def _engine(self, node: onnx.NodeProto, engine: Engine) -> tuple[str, list[State]]:
        source = node.input[0] if node.input else ""
        state = self.states.get(source)
        if engine.op_type == QUANT:
            if state is not None:
                self.problems.append(f"{label_of(node)} quantizes codes ({state})")
            wanted = engine.results[0]
            if source in self._dequants:
                self.problems.append(f"{label_of(node)} undoes `{self._dequants[source]}`")
            first = self._quants.setdefault((source, wanted), node.name)
            if first != node.name:
                self.problems.append(f"{label_of(node)} repeats `{first}`")
            return ENTERS, [wanted]
        if engine.op_type == DEQUANT:
            said = engine.codes("scale_o", "")
            if state is None and source in self.states:
                self.problems.append(f"{label_of(node)} dequantizes what is no code")
            elif state is not None and said is not None:
                self._compare(node, state, Codes(state.bits, said.scale))
            if state is not None:
                self.left[node.output[0]] = state
            self._dequants[node.output[0]] = node.name
            return LEAVES, [None]
        for place, wanted in engine.operands.items():
            if node.input[place] in self.states:
                found = self.states[node.input[place]]
                if found is None:
                    self.problems.append(f"{label_of(node)} reads real values, wants {wanted}")
                else:
                    self._compare(node, found, wanted)
        return INTEGER, engine.results

    def _compare(self, node: onnx.NodeProto, found: Codes, wanted: Codes) -> None:
        if found.scale is not None and found.scale != wanted.scale:
            self.problems.append(f"{label_of(node)} reads {found} as {wanted}")

    def _standard(self, node: onnx.NodeProto) -> tuple[str, list[State]]:
        states = [self.states.get(name) for name in node.input]
        if keeps_codes(node, states, self.constants):
            return MOVES, [states[0]] * len(node.output)
        if node.op_type not in ABOUT_CODES:
            self.problems += [
                f"{label_of(node)} reads codes ({state}) as real values"
                for state in states
                if state is not None and state.scale is not None
            ]
        return REAL, [None] * len(node.output)


@dataclass(frozen=True)
class _Grid:
    """Codes of a ``qdq`` file, or the real values that they mean."""

    kind: str
    step: str
    zero_point: str

    def __str__(self) -> str:
        return f"{self.kind} step {self.step} zero {self.zero_point}"


_CODE_ENDS = ("QuantizeLinear", "DequantizeLinear")
# What stands between an op in real values and its QuantizeLinear.
_FUSED = (*MOVEMENTS, "Relu", "Clip", "MaxPool", "Concat", "Identity")


class _QDQ:
    """A walk through a file in standard ONNX.

    An op between a DequantizeLinear and a QuantizeLinear counts as one in integers, and these two
    are no rows of their own, except where real values are quantized, or codes made real for good.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants = constants_of(graph)
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.consumers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self.grids: dict[str, _Grid] = {}
        # The rows of ops in integers, by what they give; and what is made of constants.
        self.fused: dict[str, int] = {}
        self.fixed: set[str] = set(self.constants)
        self.rows: list[NodeRow] = []
        self.left: dict[str, _Grid] = {}
        self.problems: list[str] = []

    def run(self) -> None:
        """Go through the nodes."""
        for node in self.graph.node:
            if node.op_type == "QuantizeLinear":
                self._quantize(node)
            elif node.op_type == "DequantizeLinear":
                self._dequantize(node)
            else:
                does = self._plain(node)
                if does == INTEGER:
                    self.fused.update(dict.fromkeys(node.output, len(self.rows)))
                self._add(node, does)

    def _add(self, node: onnx.NodeProto, does: str) -> None:
        reads = [self.grids.get(name) for name in node.input if name not in self.fixed]
        gives = [self.grids.get(name) for name in node.output]
        gives = [] if does == LEAVES else gives
        self.rows.append(NodeRow(node.name, node.op_type, does, _listed(reads), _listed(gives)))

    def _quantize(self, node: onnx.NodeProto) -> None:
        grid = self._grid(node, "uint8")
        if not (node.input and node.output):
            return
        if grid is not None:
            self.grids[node.output[0]] = grid
        row = self.fused.get(node.input[0])
        if row is None:
            self._add(node, ENTERS)
        else:
            self.rows[row] = replace(self.rows[row], gives=_listed([grid]))

    def _dequantize(self, node: onnx.NodeProto) -> None:
        if not (node.input and node.output):
            return
        source, result = node.input[0], node.output[0]
        grid = self.grids.get(source) or self._grid(node, "codes")
        if grid is not None:
            self.grids[result] = grid
        if source in self.fixed:
            self.fixed.add(result)
            return
        readers = self.consumers.get(result, [])
        stays = bool(readers) and all(self._in_integers(reader) for reader in readers)
        if not stays or result in self.outputs:
            self.left[result] = grid or _Grid("codes", "unknown", "unknown")
            self._add(node, LEAVES)

    def _plain(self, node: onnx.NodeProto) -> str:
        grid = self.grids.get(node.input[0]) if node.input else None
        if grid is not None and node.op_type in MOVEMENTS:
            self.grids.update(dict.fromkeys(node.output, grid))
            return MOVES
        fused = node.op_type in _FUSED and bool(node.input) and node.input[0] in self.fused
        others = [name for name in node.input if name and name not in self.constants]
        on_grid = bool(others) and all(name in self.grids for name in others)
        return INTEGER if (on_grid or fused) and self._in_integers(node) else REAL

    def _in_integers(self, node: onnx.NodeProto) -> bool:
        """Whether everything that a node gives is quantized again, behind what fuses with it."""
        seen: set[str] = set()
        waiting = [node]
        while waiting:
            found = waiting.pop()
            if found.op_type in _CODE_ENDS:
                continue
            for name in found.output:
                if name in seen:
                    continue
                seen.add(name)
                readers = self.consumers.get(name, [])
                if name in self.outputs or not readers:
                    return False
                if any(reader.op_type not in (*_CODE_ENDS, *_FUSED) for reader in readers):
                    return False
                waiting += readers
        return True

    def _grid(self, node: onnx.NodeProto, kind: str) -> _Grid | None:
        step = self.constants.get(node.input[1]) if len(node.input) > 1 else None
        zero = self.constants.get(node.input[2]) if len(node.input) > 2 else None
        codes = self.constants.get(node.input[0]) if node.input else None
        if step is None:
            return None
        like = zero if zero is not None else codes
        steps = f"{float(step.reshape(-1)[0]):g}" if step.size == 1 else f"{step.size} channels"
        zeros = "0" if zero is None or not zero.any() else str(zero.reshape(-1)[0])
        return _Grid(kind if like is None else str(like.dtype), steps, zeros)
