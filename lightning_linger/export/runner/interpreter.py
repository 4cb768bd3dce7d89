"""Reading a graph of the ``linger`` dialect and running its nodes one after the other."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from lightning_linger.core.errors import ConfigError, LingerError, UnsupportedError
from lightning_linger.export.files import check_target, write_atomically
from lightning_linger.export.generations import ALIASES, ATTRIBUTE_ALIASES
from lightning_linger.export.reading import (
    Source,
    attributes_of,
    constants_of,
    input_names,
    label_of,
    platform_of,
    read_model,
)
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
    reduction,
    softmax,
)
from lightning_linger.export.runner.plain import run_plain
from lightning_linger.export.runner.sizes import Resized, declared_shapes
from lightning_linger.export.runner.step import Array, Kernel, Step, check_types
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
    **reduction.KERNELS,
    **movement.KERNELS,
}


class OnnxIntegerRunner:
    """Interprets a graph of the ``linger`` dialect in integers, in either generation of its names.

    The domains of nodes are ignored, as the engine's packer does.

    Args:
        model: Path of a file, its bytes, or a loaded model.

    Attributes:
        platform: The target, from the nodes; ``venus`` where none names it.
        input_names: Names of the graph's inputs.
        output_names: Names of the graph's outputs.

    Raises:
        ConfigError: If there is no such file, or it holds no ONNX model, or a damaged one.
        UnsupportedError: If the nodes name several platforms.
    """

    def __init__(self, model: Source) -> None:
        self.model = read_model(model)
        graph = self.model.graph
        self.constants: dict[str, Array] = constants_of(graph)
        self.input_names = input_names(graph)
        self.output_names = [v.name for v in graph.output]
        self._shapes = declared_shapes(graph)
        self.platform = platform_of(graph)
        self._kernel_platform = _library_name(self.platform)

    def run(
        self, inputs: Mapping[str, Array], dump: str | os.PathLike[str] | None = None
    ) -> dict[str, Array]:
        """Run the graph.

        Args:
            inputs: An array per graph input. Where the graph quantizes an input, the codes
                themselves (an integer array) may be given instead of real values; where it does
                not, the scale of the op that reads them types them. Other sizes than the file
                names are fine as long as nothing in it depends on them.
            dump: A ``.npz`` file to write, with every tensor of :meth:`trace` by name.

        Returns:
            An array per graph output, in the graph's dtype.

        Raises:
            ConfigError: If an input is missing or unknown or has a size that something in the file
                depends on, or the dump cannot be written.
            UnsupportedError: If a node has no integer meaning here; names the node and its op.
        """
        target = None if dump is None else check_target(dump)
        values = self.trace(inputs)
        if target is not None:
            write_atomically(target, _npz(values))
        return {
            name: values[name] if name in values else self.constants[name]
            for name in self.output_names
        }

    def trace(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph and return its inputs and everything that is computed, by name.

        Args:
            inputs: See :meth:`run`.

        Raises:
            ConfigError: If an input is missing or unknown, or has a size that something in the file
                depends on.
            UnsupportedError: If a node has no integer meaning here; names the node and its op.
        """
        _check_names(self.input_names, inputs)
        values = {name: np.asarray(array) for name, array in inputs.items()}
        resized = Resized.of(self._shapes, values)
        for node in self.model.graph.node:
            try:
                found = self._run_node(node, values)
            except UnsupportedError as error:
                if not resized.sizes or error.__cause__ is None:
                    raise
                why = f"What depends on it is baked in: {error}"
                raise resized.refusal(why) from error
            if resized.sizes and node.op_type == "Reshape":
                self._check_reshape(resized, node, values)
            values.update((n, result) for n, result in zip(node.output, found, strict=False) if n)
        if resized.sizes:
            for name in self.output_names:
                if name in values and name in self._shapes:
                    resized.check_output(name, self._shapes[name], values[name].shape)
        return values

    def _check_reshape(
        self, resized: Resized, node: onnx.NodeProto, values: Mapping[str, Array]
    ) -> None:
        source, target = [*node.input, "", ""][:2]
        if source in values and target in self.constants:
            named = [size for size in self._shapes.get(source, []) if size is not None]
            example = tuple(named) if len(named) == len(self._shapes.get(source, [])) else None
            sizes = [int(size) for size in self.constants[target].reshape(-1)]
            resized.check_reshape(node, example, values[source].shape, sizes)

    def _run_node(self, node: onnx.NodeProto, values: Mapping[str, Array]) -> list[Array]:
        inputs = [
            None if not name else values[name] if name in values else self.constants[name]
            for name in node.input
        ]
        kernel = KERNELS.get(ALIASES.get(node.op_type, node.op_type))
        label = label_of(node)
        try:
            if kernel is None:
                found = run_plain(node, inputs, _opset_version(self.model))
            else:
                attributes = _attributes(node)
                check_types(label, attributes)
                result = kernel(Step(label, attributes, inputs, self._kernel_platform))
                found = list(result) if isinstance(result, tuple) else [result]
        except LingerError:
            raise
        except Exception as error:
            msg = f"{label} cannot be run: {type(error).__name__}: {error}"
            raise UnsupportedError(msg) from error
        wanted = max((i + 1 for i, name in enumerate(node.output) if name), default=0)
        if len(found) < wanted:
            msg = f"{label} has {wanted} outputs, and gives {len(found)}."
            raise UnsupportedError(msg)
        return found


def _npz(values: Mapping[str, Array]) -> bytes:
    """Return an ``.npz`` of arrays by any name; ``np.savez`` takes some for its own arguments."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in values.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)
    return buffer.getvalue()


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
    found = attributes_of(node)
    return {ATTRIBUTE_ALIASES.get(name, name): value for name, value in found.items()}


def _opset_version(model: onnx.ModelProto) -> int:
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    return max(versions, default=onnx.defs.onnx_opset_version())
