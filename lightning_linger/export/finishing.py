"""The graph of a captured model, made ready to be read: names, versions, nothing unused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from onnxscript import ir

from lightning_linger.export.dialect import Dialect


def finish(
    model: ir.Model, input_names: list[str], output_names: list[str], dialect: Dialect
) -> None:
    """Give a captured graph the names it has for users, and leave out what only a capture needs.

    Args:
        model: Changed in place.
        input_names: One per input of the graph.
        output_names: One per output.
        dialect: Whose opsets and version of the format it has.
    """
    graph = model.graph
    remove_unused(graph)
    _name_ends(graph, input_names, output_names)
    _make_names_unique(graph)
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in _values(graph):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    used = {node.domain for node in graph}
    graph.opset_imports.clear()
    graph.opset_imports[""] = dialect.opset_version
    for domain, version in dialect.domains.items():
        if domain in used:
            graph.opset_imports[domain] = version
    model.ir_version = dialect.ir_version


def remove_unused(graph: ir.Graph) -> None:
    """Take out the nodes and initializers that no output depends on."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not any(output is value for output in graph.outputs):
            del graph.initializers[name]


def _name_ends(graph: ir.Graph, input_names: list[str], output_names: list[str]) -> None:
    """Give inputs and outputs the model's names; every output is a value of its own."""
    for value, name in zip(graph.inputs, input_names, strict=True):
        value.name = name
    taken = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    for index, name in enumerate(output_names):
        output = graph.outputs[index]
        wanted = name if name not in input_names else f"{name}_output"
        if id(output) in taken:
            node = ir.Node("", "Identity", [output], name=wanted, num_outputs=1)
            node.outputs[0].type, node.outputs[0].shape = output.type, output.shape
            graph.append(node)
            graph.outputs[index] = output = node.outputs[0]
        taken.add(id(output))
        output.name = wanted


def _make_names_unique(graph: ir.Graph) -> None:
    ends = {value.name for value in (*graph.inputs, *graph.outputs)}
    taken: Counter[str] = Counter(str(name) for name in ends)
    for value in _values(graph):
        if any(value is end for end in (*graph.inputs, *graph.outputs)):
            continue
        value.name = _free(str(value.name), taken)
    renamed = {str(value.name): value for value in graph.initializers.values()}
    graph.initializers.clear()
    graph.initializers.update(renamed)
    nodes: Counter[str] = Counter()
    for node in graph:
        node.name = _free(str(node.name or node.op_type), nodes)


def _free(name: str, taken: Counter[str]) -> str:
    candidate = name
    while taken[candidate]:
        taken[name] += 1
        candidate = f"{name}_{taken[name] - 1}"
    taken[candidate] += 1
    return candidate


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from list(graph.initializers.values())
    for node in graph:
        yield from node.outputs
