"""Following a ``linger`` file from its inputs to its outputs, as it stands."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from lightning_linger.export.chain import ENTERS, INTEGER, LEAVES, MOVES, REAL, NodeRow, listed
from lightning_linger.export.flow import (
    ABOUT_CODES,
    DEQUANT,
    QUANT,
    Codes,
    Engine,
    State,
    keeps_codes,
    state_of_input,
)
from lightning_linger.export.reading import constant_types, input_names, label_of


class LingerWalk:
    """A walk through a file of the ``linger`` dialect, as it stands.

    Args:
        graph: The graph.
        engines: The engine's nodes by their first result.
    """

    def __init__(self, graph: onnx.GraphProto, engines: Mapping[str, Engine | None]) -> None:
        self.graph = graph
        self.engines = engines
        self.constants = constant_types(graph)
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
            self.rows.append(NodeRow(node.name, node.op_type, does, listed(reads), listed(given)))

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
