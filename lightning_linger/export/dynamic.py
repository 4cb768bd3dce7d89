"""Sizes that a graph leaves open, found by comparing the graphs of two sizes.

A recorded graph has fixed sizes. The model is recorded once more with an axis twice as long; what
then differs is what depends on that axis. Where it is a size that ONNX can leave open, it is; any
other difference is an error that names the node. Nothing is assumed about the ops between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxscript import ir
from torch import Tensor

from lightning_linger.core.errors import ConfigError, UnsupportedError, near_matches
from lightning_linger.export.capture_errors import FailingForwardError

# By name of an input: what its axes are called. An axis has one size wherever it stands.
DynamicAxes = Mapping[str, Mapping[int, str]]

# Nothing has the size 1 by accident: a size of 1 is broadcast, squeezed and moved for free.
_SMALLEST = 2
_TO_THE_END = np.iinfo(np.int64).max


def check_axes(
    axes: DynamicAxes, names: Sequence[str], tensors: Sequence[Tensor]
) -> dict[str, int]:
    """Return the size of each axis in the example.

    Raises:
        ConfigError: If there is no such input or axis, or an axis has two sizes.
    """
    sizes: dict[str, int] = {}
    inputs = dict(zip(names, tensors, strict=True))
    for name, dims in axes.items():
        if name not in inputs:
            msg = (
                f"`dynamic_axes` names an input {name!r}. Similar: {near_matches(name, inputs)}. "
                f"Inputs: {list(names)}."
            )
            raise ConfigError(msg)
        shape = tuple(inputs[name].shape)
        for dim, axis in dims.items():
            if not isinstance(dim, int) or not 0 <= dim < len(shape):
                msg = (
                    f"`dynamic_axes` names the axis {dim!r} of {name!r}, whose shape is {shape}. "
                    f"Axes are 0 to {len(shape) - 1}."
                )
                raise ConfigError(msg)
            if not isinstance(axis, str) or not axis.isidentifier():
                msg = f"`dynamic_axes` calls axis {dim} of {name!r} {axis!r}. Use a name: 'batch'."
                raise ConfigError(msg)
            if sizes.setdefault(axis, shape[dim]) != shape[dim]:
                msg = (
                    f"the axis {axis!r} has the sizes {sizes[axis]} and {shape[dim]} in the "
                    "example. Give different axes different names, or pass another example."
                )
                raise ConfigError(msg)
    return sizes


def resized(
    tensors: Sequence[Tensor], names: Sequence[str], axes: DynamicAxes, sizes: Mapping[str, int]
) -> list[Tensor]:
    """Repeat tensors along their open axes up to the given sizes."""
    result = []
    for name, tensor in zip(names, tensors, strict=True):
        for dim, axis in axes.get(name, {}).items():
            index = torch.arange(sizes.get(axis, tensor.shape[dim]), device=tensor.device)
            tensor = tensor.index_select(dim, index % tensor.shape[dim])
        result.append(tensor)
    return result


def open_axes(build: Callable[[Mapping[str, int]], ir.Model], sizes: Mapping[str, int]) -> ir.Model:
    """Return a graph that leaves the named axes open.

    Args:
        build: Makes the graph for sizes of the axes.
        sizes: In the example.

    Raises:
        UnsupportedError: If something but open sizes depends on an axis; names the node.
    """
    base = {axis: max(size, _SMALLEST) for axis, size in sizes.items()}
    model = _built(build, base, sizes)
    others = {
        axis: _built(build, {**base, axis: 2 * size}, {**base, axis: sizes[axis]})
        for axis, size in base.items()
    }
    _Opening(model.graph, {axis: other.graph for axis, other in others.items()}, base).run()
    return model


def _built(
    build: Callable[[Mapping[str, int]], ir.Model],
    sizes: Mapping[str, int],
    example: Mapping[str, int],
) -> ir.Model:
    """Build, and say which axes are others than in the example where the model fails."""
    try:
        return build(sizes)
    except FailingForwardError as error:
        other = {axis: size for axis, size in sizes.items() if size != example[axis]}
        if not other:
            raise
        axis = next(iter(other))
        held = ", ".join(f"{name}={size}" for name, size in other.items())
        msg = (
            f"the axis {axis!r} cannot stay open: with {held}, for {error.shapes}, the forward "
            f"fails at {error.location}: {error.reason} A size of the example, "
            f"{example[axis]}, is written into the model there. Write `x.shape[...]` or -1 in its "
            "place, or leave the axis out of `dynamic_axes` and export one file per size."
        )
        raise UnsupportedError(msg) from error


@dataclass(frozen=True)
class _Varying:
    """How a constant depends on the axes.

    Args:
        value: The constant at the sizes of the example.
        by_axis: At twice an axis.
    """

    value: NDArray[Any]
    by_axis: Mapping[str, NDArray[Any]]

    def indices(self) -> list[int]:
        """Return where it varies."""
        differs = np.zeros(self.value.shape, bool)
        for other in self.by_axis.values():
            differs |= other != self.value
        return [int(index) for index in np.flatnonzero(differs)]


class _Opening:
    """Compares a graph with its relatives of other sizes, and opens what differs.

    Args:
        graph: Of the sizes of the example; changed in place.
        others: By axis, the graph in which this axis is twice as long.
        sizes: Of the axes in ``graph``.
    """

    def __init__(
        self, graph: ir.Graph, others: Mapping[str, ir.Graph], sizes: Mapping[str, int]
    ) -> None:
        self.graph = graph
        self.others = others
        self.sizes = sizes
        # What stands in the place of a value of the graph, by axis.
        self.twins: dict[str, dict[int, ir.Value]] = {axis: {} for axis in others}

    def run(self) -> None:
        self._pair()
        shapes = {id(value): self._open_shape(value) for value in self._values()}
        for node in list(self.graph):
            self._open_node(node)
        for value in self._values():
            value.shape = ir.Shape(shapes[id(value)])

    def _values(self) -> list[ir.Value]:
        return [*self.graph.inputs, *(v for node in self.graph for v in node.outputs)]

    def _pair(self) -> None:
        for axis, other in self.others.items():
            ours, theirs = list(self.graph), list(other)
            for node, twin in zip(ours, theirs, strict=False):
                if _kind(node) != _kind(twin):
                    self._refuse(node, axis, "is another op, or has other attributes")
            if len(ours) != len(theirs):
                node = max(ours, theirs, key=len)[min(len(ours), len(theirs))]
                self._refuse(node, axis, "is needed at one size only")
            values = [v for node in theirs for v in node.outputs]
            pairs = zip(self._values(), [*other.inputs, *values], strict=True)
            self.twins[axis] = {id(value): twin for value, twin in pairs}
            for node, twin in zip(ours, theirs, strict=True):
                for value, counterpart in zip(node.inputs, twin.inputs, strict=True):
                    if value is not None and counterpart is not None:
                        self.twins[axis].setdefault(id(value), counterpart)

    def _open_shape(self, value: ir.Value) -> list[int | str | None]:
        """Return a shape with a name for an open axis, and nothing for what follows from one."""
        sizes: list[int | str | None] = list(_sizes(value))
        for axis, twins in self.twins.items():
            for dim, (here, there) in enumerate(
                zip(_sizes(value), _sizes(twins[id(value)]), strict=True)
            ):
                if here != there:
                    follows = isinstance(sizes[dim], int) and here == self.sizes[axis]
                    sizes[dim] = axis if follows and there == 2 * here else None
        return sizes

    def _open_node(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None:
                continue
            varying = self._varying(node, value)
            if not varying.indices():
                continue
            opened = _OPENERS.get((node.domain, node.op_type, index))
            result = opened(self, node, varying) if opened is not None else None
            if result is None:
                axis = next(
                    a for a, other in varying.by_axis.items() if (other != varying.value).any()
                )
                self._refuse(node, axis, f"takes a constant ({value.name}) that depends on it")
            else:
                node.replace_input_with(index, self._constant(node, index, result))

    def _varying(self, node: ir.Node, value: ir.Value) -> _Varying:
        array = _array(value)
        by_axis = {axis: _array(twins[id(value)]) for axis, twins in self.twins.items()}
        for axis, other in by_axis.items():
            if other.shape != array.shape:
                self._refuse(node, axis, f"takes a constant ({value.name}) as long as it")
        return _Varying(array, by_axis)

    def _constant(self, node: ir.Node, index: int, array: NDArray[Any]) -> ir.Value:
        tensor = ir.Tensor(array, name=f"{node.name}/open_{index}")
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(list(array.shape)),
            const_value=tensor,
        )
        self.graph.initializers[str(tensor.name)] = value
        return value

    def is_kept(self, node: ir.Node, dim: int, end: bool = False) -> bool:
        """Whether a dimension of the result is the same one of the node's first input.

        Args:
            node: The node.
            dim: The dimension of the result.
            end: Whether dimensions are counted from the end, as in broadcasting.
        """
        source, result = node.inputs[0], node.outputs[0]
        if source is None:
            return False
        before, after = _sizes(source), _sizes(result)
        at = dim - len(after) + len(before) if end else dim
        if not 0 <= at < len(before) or before[at] != after[dim]:
            return False
        return all(
            _sizes(twins[id(source)])[at] == _sizes(twins[id(result)])[dim]
            for twins in self.twins.values()
        )

    def _refuse(self, node: ir.Node, axis: str, why: str) -> None:
        msg = (
            f"`{node.name}` ({node.op_type}) {why}: the axis {axis!r} cannot stay open. Write the "
            "model so that this does not depend on its size (reshape to -1 in one place only), or "
            "leave the axis out of `dynamic_axes` and export one file per size."
        )
        raise UnsupportedError(msg)


def _open_reshape(opening: _Opening, node: ir.Node, target: _Varying) -> NDArray[Any] | None:
    """Copy open sizes from the same place of the input; one may follow from all others."""
    result = target.value.copy()
    inferred = []
    for dim in target.indices():
        if opening.is_kept(node, dim):
            result[dim] = 0
        else:
            inferred.append(dim)
    if len(inferred) > 1 or (inferred and (result == -1).any()):
        return None
    for dim in inferred:
        result[dim] = -1
    node.attributes.pop("allowzero", None)
    return result


def _open_expand(opening: _Opening, node: ir.Node, target: _Varying) -> NDArray[Any] | None:
    """Keep open sizes as they are."""
    result = target.value.copy()
    for dim in target.indices():
        if not opening.is_kept(node, dim, end=True):
            return None
        result[dim] = 1
    return result


def _open_slice(opening: _Opening, node: ir.Node, ends: _Varying) -> NDArray[Any] | None:
    """Slice to the end where the end is the end of the axis."""
    source = node.inputs[0]
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    if source is None or axes is None:
        return None
    result = ends.value.copy()
    for index in ends.indices():
        dim = int(_array(axes)[index])
        twins = [twin[id(source)] for twin in opening.twins.values()]
        reached = [(ends.value, source), *zip(ends.by_axis.values(), twins, strict=True)]
        if any(int(end[index]) != _sizes(value)[dim] for end, value in reached):
            return None
        result[index] = _TO_THE_END
    return result


_OPENERS: dict[
    tuple[str, str, int], Callable[[_Opening, ir.Node, _Varying], NDArray[Any] | None]
] = {
    ("", "Reshape", 1): _open_reshape,
    ("", "Expand", 1): _open_expand,
    ("", "Slice", 2): _open_slice,
}


def _kind(node: ir.Node) -> tuple[object, ...]:
    attributes = sorted((name, str(a.value)) for name, a in node.attributes.items())
    return (node.domain, node.op_type, len(node.inputs), len(node.outputs), *attributes)


def _sizes(value: ir.Value) -> list[int]:
    if value.shape is None:
        msg = f"internal: the value {value.name!r} has no shape."
        raise RuntimeError(msg)
    return [int(size) for size in value.shape.numpy()]


def _array(value: ir.Value) -> NDArray[Any]:
    if value.const_value is None:
        msg = f"internal: {value.name!r} is no constant."
        raise RuntimeError(msg)
    return value.const_value.numpy()
