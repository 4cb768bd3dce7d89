"""Turning recorded ops into the nodes of a dialect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.capture import Captured
from lightning_linger.export.captured_nodes import (
    CAPTURE_DOMAIN,
    OPERAND_OPS,
    arguments_of,
    label_of,
)
from lightning_linger.export.dialect import Builder, Call, Dialect
from lightning_linger.platforms import PLATFORMS

Steps = dict[str, dict[str, Any]]

# Standard ops that only move values: codes pass through them as they are.
MOVEMENTS = (
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Expand", "Tile"),
    *("Gather", "DepthToSpace", "SpaceToDepth"),
)


@dataclass(frozen=True)
class Lowered:
    """What is known about a graph that was written in a dialect.

    Args:
        steps: The steps of each recorded op (``real = step * code``) by node name and argument.
        results: The value that holds the result of each site.
    """

    steps: Steps
    results: dict[str, ir.Value]


def lower(captured: Captured, dialect: Dialect) -> Lowered:
    """Replace every recorded op by the dialect's nodes.

    Raises:
        UnsupportedError: If the dialect has no translation of an op, or a site that contributes to
            an output is not in the graph exactly as often as it ran.
    """
    graph = captured.model.graph
    found: Counter[str] = Counter()
    names: Counter[str] = Counter()
    producers: dict[ir.Value, str] = {}
    steps: Steps = {}
    main: dict[str, ir.Value] = {}
    for node in list(graph):
        if node.domain != CAPTURE_DOMAIN:
            _follow(node, producers)
            continue
        call = _call(node, captured.sites, producers, names)
        if node.op_type not in OPERAND_OPS:
            found[call.site] += 1
        steps[call.name] = {n: v for n, v in call.arguments.items() if n.startswith("scale")}
        translation = dialect.table.get(node.op_type)
        if translation is None:
            msg = (
                f"`{call.site}`: the {dialect.name!r} dialect has no form of `{node.op_type}`. "
                f"Leave the layer in float with overrides={{'{call.site}': None}}."
            )
            raise UnsupportedError(msg)
        translated = translation(Builder(graph, node, call), call)
        results = [translated] if isinstance(translated, ir.Value) else translated
        for output, result in zip(node.outputs, results, strict=True):
            replace_value(graph, output, result)
            producers[result] = call.site
        if node.op_type not in OPERAND_OPS:
            main[call.site] = results[0]
        graph.remove(node, safe=True)
    _require_all(captured.live, found)
    dialect.finish(graph)
    return Lowered(steps, main)


def replace_value(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads ``old``, the graph's outputs included, read ``new``."""
    for node, index in list(old.uses()):
        node.replace_input_with(index, new)
    for index, output in enumerate(list(graph.outputs)):
        if output is old:
            graph.outputs[index] = new


def merge_duplicates(graph: ir.Graph, op_types: Mapping[str, str]) -> None:
    """Keep one of several nodes that compute the same thing.

    Args:
        graph: The graph.
        op_types: The ops to merge, with their domains.
    """
    known: dict[tuple[object, ...], ir.Node] = {}
    for node in list(graph):
        if op_types.get(node.op_type) != node.domain:
            continue
        attributes = tuple(sorted((name, str(a.value)) for name, a in node.attributes.items()))
        key = (node.op_type, *(id(value) for value in node.inputs), attributes)
        first = known.setdefault(key, node)
        if first is not node:
            replace_value(graph, node.outputs[0], first.outputs[0])
            graph.remove(node, safe=True)


def _call(
    node: ir.Node, sites: Mapping[str, str], producers: dict[ir.Value, str], names: Counter[str]
) -> Call:
    arguments = arguments_of(node)
    platform, label = label_of(arguments.get("platform") or "")
    source = node.inputs[0] if node.inputs else None
    fallback = producers.get(source, "") if source is not None else ""
    site = sites.get(label, fallback)
    name = site if node.op_type not in OPERAND_OPS else f"{site}/{node.op_type}"
    count = names[name]
    names[name] += 1
    return Call(
        op=node.op_type,
        name=f"{name}_{count}" if count else name,
        site=site,
        target=PLATFORMS.get(platform),
        arguments=arguments,
        results=list(node.outputs),
    )


def _follow(node: ir.Node, producers: dict[ir.Value, str]) -> None:
    """Note that a moved value still comes from the same site."""
    source = node.inputs[0] if node.inputs else None
    if source is not None and source in producers:
        for output in node.outputs:
            producers[output] = producers[source]


def _require_all(expected: Counter[str], found: Counter[str]) -> None:
    for key in sorted(set(expected) | set(found)):
        if expected[key] != found[key]:
            msg = (
                f"`{key}` should be in the exported graph {expected[key]} time(s), but is there "
                f"{found[key]} time(s). The ONNX conversion changed the model; please report it."
            )
            raise UnsupportedError(msg)
