"""Vectors measured on the engine's own simulation, rebuilt as ONNX graphs.

A file holds the codes that went in and came out over several runs, the constants, and the graph
with the attributes of every node. The packer refuses a graph without a constant, so where the op
under test has none, the measured graph carries an unrelated branch whose ends were not recorded.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

FOLDER = Path(__file__).parents[1] / "data" / "golden" / "thinker"


@dataclass(frozen=True)
class Vector:
    """One measured graph.

    Args:
        name: File name without its ending, ``op_case__platform``.
        model: The graph.
        inputs: Per graph input ``[runs, ...]`` codes.
        outputs: Per graph output ``[runs, ...]`` codes.
    """

    name: str
    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    @property
    def runs(self) -> int:
        return len(next(iter(self.inputs.values())))


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*__*.npz"))


def load(name: str) -> Vector:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    described = json.loads(str(arrays.pop("attrs_json")))
    attributes = {key.partition("/")[2]: value for key, value in described["attrs"].items()}
    nodes = [
        onnx.helper.make_node(
            op_type,
            inputs,
            outputs,
            name=f"{op_type}_{outputs[0]}",
            **attributes.get(f"{op_type}_{outputs[0]}", {}),
        )
        for op_type, inputs, outputs in described["graph"]
    ]
    constants = {
        key.removeprefix("const_"): array
        for key, array in arrays.items()
        if key.startswith("const_")
    }
    measured_out = _numbered(arrays, "out")
    read = {value for node in nodes for value in node.input}
    ends = [value for node in nodes for value in node.output if value not in read]
    output_names = ends[: len(measured_out)]
    nodes = _contributing(nodes, output_names)
    produced = {value for node in nodes for value in node.output}
    starts = [
        value
        for node in nodes
        for value in node.input
        if value not in produced and value not in constants
    ]
    input_names = list(dict.fromkeys(starts))
    graph = onnx.helper.make_graph(
        nodes,
        name,
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in input_names],
        [onnx.ValueInfoProto(name=n) for n in output_names],
        [onnx.numpy_helper.from_array(array, key) for key, array in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)])
    return Vector(
        name,
        model,
        dict(zip(input_names, _numbered(arrays, "in"), strict=True)),
        dict(zip(output_names, measured_out, strict=True)),
    )


def _numbered(arrays: dict[str, np.ndarray], prefix: str) -> list[np.ndarray]:
    found = [key for key in arrays if key.startswith(prefix) and key[len(prefix) :].isdigit()]
    return [arrays[key] for key in sorted(found, key=lambda key: int(key[len(prefix) :]))]


def _contributing(nodes: list[onnx.NodeProto], outputs: list[str]) -> list[onnx.NodeProto]:
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]
