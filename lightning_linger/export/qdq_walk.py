"""Following a file in standard ONNX from its inputs to its outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx

from lightning_linger.export.chain import ENTERS, INTEGER, LEAVES, MOVES, REAL, NodeRow, listed
from lightning_linger.export.lowering import MOVEMENTS
from lightning_linger.export.reading import constants_of


@dataclass(frozen=True)
class _Grid:
    """Codes of a ``qdq`` file, or the real values that they mean."""

    kind: str
    step: str
    zero_point: str

    def __str__(self) -> str:
        return f"{self.kind} step {self.step} zero {self.zero_point}"


_ENTER, _LEAVE = "QuantizeLinear", "DequantizeLinear"
_CODE_ENDS = (_ENTER, _LEAVE)
# What stands between an op in real values and its QuantizeLinear.
_FUSED = (*MOVEMENTS, "Relu", "Clip", "MaxPool", "Concat", "Identity")
# What gives codes of the step that it reads, where nothing else says it.
_KEEPING = ("AveragePool", "ReduceMean", "ReduceMax", "ReduceMin", *_FUSED)
_REAL_TYPES = (
    *(onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE),
    *(onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16),
)


class QDQWalk:
    """A walk through a file in standard ONNX.

    An op between a DequantizeLinear and a QuantizeLinear counts as one in integers, and these two
    are no rows of their own, except where real values are quantized, or codes made real for good.
    So does arithmetic on codes themselves: a chain of any length that starts with DequantizeLinear
    of step 1, reads nothing else that varies, and ends with QuantizeLinear or in whole numbers.

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
        self.producers = {name: node for node in graph.node for name in node.output}
        self.outputs = {value.name for value in graph.output}
        self.grids: dict[str, _Grid] = {}
        # The rows of ops in integers, by what they give; and what is made of constants.
        self.fused: dict[str, int] = {}
        self.fixed: set[str] = set(self.constants)
        # What is computed with codes themselves, up to the codes of its result.
        self.on_codes = self._arithmetic_on_codes()
        self.rows: list[NodeRow] = []
        self.left: dict[str, _Grid] = {}
        self.problems: list[str] = []

    def run(self) -> None:
        """Go through the nodes."""
        for node in self.graph.node:
            if node.op_type == _ENTER:
                self._quantize(node)
            elif node.op_type == _LEAVE:
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
        self.rows.append(NodeRow(node.name, node.op_type, does, listed(reads), listed(gives)))

    def _quantize(self, node: onnx.NodeProto) -> None:
        if not (node.input and node.output):
            return
        grid = self._grid(node, "uint8")
        if grid is not None and self._is_unit(node):
            grid = self._read_as(node.output[0]) or self._kept(node.input[0], grid)
        if grid is not None:
            self.grids[node.output[0]] = grid
        row = self.fused.get(node.input[0])
        if row is None:
            self._add(node, ENTERS)
        else:
            self.rows[row] = replace(self.rows[row], gives=listed([grid]))

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
        if self.on_codes.intersection(node.output):
            return INTEGER
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
        if self.on_codes.intersection(node.output):
            return True
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

    # --- arithmetic on codes themselves -----------------------------------------------------

    def _arithmetic_on_codes(self) -> set[str]:
        """Return what is computed from codes themselves and becomes codes again."""
        bare, fixed = set[str](), set(self.constants)
        nodes: list[onnx.NodeProto] = []
        for node in self.graph.node:
            varying = [name for name in node.input if name and name not in fixed]
            if not varying:
                fixed.update(node.output)
            elif node.op_type == _LEAVE:
                bare.update(node.output if self._is_unit(node) else ())
            elif node.op_type != _ENTER and bare.issuperset(varying):
                bare.update(node.output)
                nodes.append(node)
        whole = {
            value.name
            for value in self.graph.output
            if value.type.tensor_type.elem_type not in (*_REAL_TYPES, onnx.TensorProto.UNDEFINED)
        }
        closed: set[str] = set()
        for node in reversed(nodes):
            given = [name for name in node.output if name]
            if all(self._is_closed(name, whole, closed) for name in given):
                closed.update(given)
        return closed

    def _is_closed(self, name: str, whole: set[str], closed: set[str]) -> bool:
        """Whether all that is made of a value is codes again, or whole numbers for the user."""
        if name in self.outputs and name not in whole:
            return False
        return all(
            reader.op_type == _ENTER or closed.issuperset(filter(None, reader.output))
            for reader in self.consumers.get(name, [])
        )

    def _is_unit(self, node: onnx.NodeProto) -> bool:
        """Whether a node takes codes for the numbers that they are."""
        step = self.constants.get(node.input[1]) if len(node.input) > 1 else None
        return step is not None and bool(np.all(step == 1))

    def _read_as(self, codes: str) -> _Grid | None:
        """Return the grid that readers take codes for, if one says more than their number."""
        waiting, seen = [codes], {codes}
        for name in waiting:  # which grows
            for reader in self.consumers.get(name, []):
                if reader.op_type == _LEAVE and reader.input[0] == name:
                    if not self._is_unit(reader):
                        return self._grid(reader, "uint8")
                elif reader.op_type in MOVEMENTS and reader.input[0] == name:
                    fresh = [made for made in reader.output if made not in seen]
                    waiting += fresh
                    seen.update(fresh)
        return None

    def _kept(self, value: str, own: _Grid) -> _Grid:
        """Return the grid of codes that are an operand's codes, or what they say themselves."""
        producer = self.producers.get(value)
        if producer is None or producer.op_type not in _KEEPING:
            return own
        operand = self.grids.get(producer.input[0])
        return own if operand is None else replace(own, step=operand.step)

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
