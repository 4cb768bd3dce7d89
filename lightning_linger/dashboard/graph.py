"""The quantized model as a graph that TensorBoard shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_linger.dashboard.records import Layer, LayerError

_INPUT = "input"


def graph_def(layers: Iterable[Layer], errors: Iterable[LayerError] = ()) -> Any:
    """Return a ``GraphDef`` with one node per layer, nested as the modules are.

    Args:
        layers: The layers in execution order.
        errors: What was measured; shown among a node's attributes.
    """
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.versions_pb2 import VersionDef

    measured = {error.site: error for error in errors}
    graph = GraphDef(versions=VersionDef(producer=22))
    graph.node.add(name=_INPUT, op="Placeholder")
    for layer in layers:
        node = graph.node.add(name=_name(layer.site), op=layer.op)
        node.input.extend([_name(site) for site in layer.inputs] or [_INPUT])
        for name, value in _attributes(layer, measured.get(layer.site)).items():
            node.attr[name].s = value.encode()
    return graph


def _attributes(layer: Layer, error: LayerError | None) -> dict[str, str]:
    found = {"bits (weight/input/output)": layer.bits, "float because": layer.why_float}
    if error is not None:
        found["SQNR accumulated"] = f"{error.sqnr:.1f} dB"
        found["SQNR isolated"] = f"{error.isolated_sqnr:.1f} dB"
        if error.exponent is not None:
            found["step"] = f"2^{error.exponent:.4g}"
    return {name: value for name, value in found.items() if value}


def _name(site: str) -> str:
    path, op, index = site.rsplit("/", 2)
    leaf = op if index == "0" else f"{op}_{index}"
    return "/".join([*filter(None, path.replace("@", "_call").split(".")), leaf])
