"""Reading a graph of the ``linger`` dialect and running its nodes one after the other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from lightning_linger.core.errors import ConfigError, LingerError, UnsupportedError
from lightning_linger.export.generations import ALIASES, ATTRIBUTE_ALIASES, FIRST_PLATFORM
from lightning_linger.export.runner import (
    arithmetic,
    boundary,
    curves,
    elementwise,
    embedding,
    layers,
    matmul,
    movement,
    normalization,
    pool,
    recurrent,
    softmax,
)
from lightning_linger.export.runner.plain import run_plain
from lightning_linger.export.runner.step import Array, Kernel, Step
from lightning_linger.platforms import PLATFORMS

# By the newer generation's names.
KERNELS: dict[str, Kernel] = {
    **boundary.KERNELS,
    **layers.KERNELS,
    **elementwise.KERNELS,
    **pool.KERNELS,
    **curves.KERNELS,
    **softmax.KERNELS,
    **normalization.KERNELS,
    **embedding.KERNELS,
    **matmul.KERNELS,
    **recurrent.KERNELS,
    **arithmetic.KERNELS,
    **movement.KERNELS,
}


class OnnxIntegerRunner:
    """Interprets a graph of the ``linger`` dialect in integers.

    Args:
        model: Path of a file, its bytes, or a loaded model.

    Attributes:
        platform: The target, from the nodes; ``venus`` where none names it.
        input_names: Names of the graph's inputs.
        output_names: Names of the graph's outputs.

    Raises:
        ConfigError: If there is no such file, or it holds no ONNX model.
        UnsupportedError: If the nodes name several platforms.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes | onnx.ModelProto) -> None:
        self.model = _load(model)
        graph = self.model.graph
        self.constants: dict[str, Array] = {
            tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer
        }
        # Older exporters list the initializers among the inputs too.
        self.input_names = [v.name for v in graph.input if v.name not in self.constants]
        self.output_names = [v.name for v in graph.output]
        self.platform = _platform_of(graph)
        self._kernel_platform = _library_name(self.platform)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph.

        Args:
            inputs: An array per graph input. Where the graph quantizes an input, the codes
                themselves (an integer array) may be given instead of real values; where it does
                not, the scale of the op that reads them types them.

        Returns:
            An array per graph output, in the graph's dtype.

        Raises:
            ConfigError: If an input is missing or unknown.
            UnsupportedError: If a node has no integer meaning here; names the node and its op.
        """
        _check_names(self.input_names, inputs)
        values: dict[str, Array] = {**self.constants}
        values.update({name: np.asarray(array) for name, array in inputs.items()})
        for node in self.model.graph.node:
            results = self._run_node(node, values)
            values.update(zip(node.output, results, strict=False))
        return {name: values[name] for name in self.output_names}

    def _run_node(self, node: onnx.NodeProto, values: Mapping[str, Array]) -> list[Array]:
        inputs = [values[name] if name else None for name in node.input]
        op_type = ALIASES.get(node.op_type, node.op_type)
        kernel = KERNELS.get(op_type)
        label = f"node {node.name!r} ({node.op_type})"
        try:
            if kernel is not None:
                found = kernel(Step(label, _attributes(node), inputs, self._kernel_platform))
                return list(found) if isinstance(found, tuple) else [found]
            if node.domain not in ("", "ai.onnx"):
                msg = f"{label}: the domain {node.domain!r} has no op of this name that is known."
                raise UnsupportedError(msg)
            return run_plain(node, inputs, _opset_version(self.model))
        except LingerError:
            raise
        except Exception as error:
            msg = f"{label} cannot be run: {type(error).__name__}: {error}"
            raise UnsupportedError(msg) from error


def _load(model: str | os.PathLike[str] | bytes | onnx.ModelProto) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    try:
        if isinstance(model, bytes):
            return onnx.load_from_string(model)
        return onnx.load(os.fspath(model))
    except Exception as error:
        shown = "bytes" if isinstance(model, bytes) else repr(os.fspath(model))
        msg = f"cannot read an ONNX model from {shown}: {error}"
        raise ConfigError(msg) from error


def _platform_of(graph: onnx.GraphProto) -> str:
    found = {
        attribute.s.decode(): node.name
        for node in graph.node
        for attribute in node.attribute
        if attribute.name == "platform"
    }
    if len(found) > 1:
        msg = f"the nodes name several platforms, by example: {found}. A graph has one."
        raise UnsupportedError(msg)
    return next(iter(found), FIRST_PLATFORM)


def _library_name(engine_name: str) -> str:
    named = {p.engine_name.lower(): name for name, p in PLATFORMS.items()}
    if engine_name.lower() not in named:
        msg = f"the nodes name the platform {engine_name!r}. Known: {sorted(named)}."
        raise UnsupportedError(msg)
    return named[engine_name.lower()]


def _check_names(names: list[str], inputs: Mapping[str, Array]) -> None:
    missing, unknown = set(names) - set(inputs), set(inputs) - set(names)
    if missing or unknown:
        msg = (
            f"the graph's inputs are {names}. Missing: {sorted(missing)}; unknown: "
            f"{sorted(unknown)}."
        )
        raise ConfigError(msg)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return the attributes by the names of the newer generation."""
    result: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        name = ATTRIBUTE_ALIASES.get(attribute.name, attribute.name)
        result[name] = value.decode() if isinstance(value, bytes) else value
    return result


def _opset_version(model: onnx.ModelProto) -> int:
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    return max(versions, default=onnx.defs.onnx_opset_version())
