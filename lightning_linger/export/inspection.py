"""What an ONNX file computes in integers, at which scales, and where it leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from lightning_linger.export.chain import INTEGER, REAL, Chain, Walk
from lightning_linger.export.flow import Engine, engine_of
from lightning_linger.export.generations import LINGER1, LINGER1_DOMAIN, ONLY_READ, TYPED_NAMES
from lightning_linger.export.linger_walk import LingerWalk
from lightning_linger.export.qdq_walk import QDQWalk
from lightning_linger.export.reading import (
    Source,
    input_names,
    label_of,
    platform_of,
    read_model,
)


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
    standard = dialect in ("qdq", "onnx")
    walk: Walk = QDQWalk(graph) if standard else LingerWalk(graph, engines)
    walk.run()
    readers = _readers(graph)
    version = f" {model.producer_version}" if model.producer_version else ""
    return Inspection(
        dialect=dialect,
        platform="" if standard else platform_of(graph),
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
        older |= {*ONLY_READ, *TYPED_NAMES}
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
