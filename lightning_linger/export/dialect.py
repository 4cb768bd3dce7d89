"""What a dialect is: one function per integer op, and how the functions build nodes.

A dialect is a table ``{op name: translation}``. The op names are those of ``torch.ops.linger``
(``conv``, ``linear``, ``add`` ...). A translation is called once per recorded op with a
:class:`Builder` and a :class:`Call`, adds nodes, and returns the value that takes the place of the
op's result; a list of values where the op has several results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxscript import ir

from lightning_linger.core.platform import Platform
from lightning_linger.core.sites import Site


@dataclass(frozen=True)
class Call:
    """One recorded op.

    The op's own arguments are attributes: ``call.scale_o``, ``call.stride``. Tensors are values of
    the graph (``call.x``, ``call.weight``), None where an optional one is missing, lists where the
    op takes a list. Steps are ``real = step * code``.

    Args:
        op: Name of the op, e.g. ``conv``.
        name: Name of its node: the site's key, with a suffix for what only feeds the site.
        site: Key of the site; of the value's producer for ``dequantize``.
        target: The platform, None for ``dequantize``, which is the same everywhere.
        arguments: The op's arguments by name.
        results: The op's results, whose dtypes and shapes the translation has to produce.
    """

    op: str
    name: str
    site: str
    target: Platform | None
    arguments: Mapping[str, Any]
    results: list[ir.Value]

    @property
    def result(self) -> ir.Value:
        """The op's first result, which most ops have only."""
        return self.results[0]

    def __getattr__(self, name: str) -> Any:
        arguments = self.__dict__.get("arguments", {})
        if name in arguments:
            return arguments[name]
        msg = f"`{self.__dict__.get('op')}` has no argument {name!r}. Known: {sorted(arguments)}."
        raise AttributeError(msg)


class Builder:
    """Adds nodes to the graph in the place of one recorded op.

    Args:
        graph: The graph.
        before: The node to insert in front of.
        call: The op that is translated.
    """

    def __init__(self, graph: ir.Graph, before: ir.Node, call: Call) -> None:
        self.graph = graph
        self.before = before
        self.call = call

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        suffix: str = "",
        dtype: ir.DataType | None = None,
        shape: Sequence[int] | None = None,
    ) -> ir.Value:
        """Add a node and return its output.

        Args:
            op_type: Name of the ONNX op.
            inputs: Its inputs; trailing None are left away.
            attributes: Python numbers, strings and lists.
            domain: Of the op.
            suffix: Tells helper nodes of a site from its main node, which has none.
            dtype: Of the output; None takes that of the recorded op's result.
            shape: Of the output; None takes that of the recorded op's result.
        """
        result = self.call.result
        output = ir.Value(
            type=ir.TensorType(dtype if dtype is not None else dtype_of(result)),
            shape=ir.Shape(list(shape)) if shape is not None else result.shape,
        )
        self._insert(op_type, inputs, attributes, domain, suffix, [output])
        return output

    def nodes(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[tuple[ir.DataType, Sequence[int]]],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        suffix: str = "",
    ) -> list[ir.Value]:
        """Add a node with several outputs and return them.

        Args:
            op_type: Name of the ONNX op.
            inputs: Its inputs; trailing None are left away.
            outputs: Type and shape of each output.
            attributes: Python numbers, strings and lists.
            domain: Of the op.
            suffix: See :meth:`node`.
        """
        values = [
            ir.Value(type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
            for dtype, shape in outputs
        ]
        self._insert(op_type, inputs, attributes, domain, suffix, values)
        return values

    def _insert(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None,
        domain: str,
        suffix: str,
        outputs: Sequence[ir.Value],
    ) -> None:
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        name = f"{self.call.name}/{suffix}" if suffix else self.call.name
        for index, output in enumerate(outputs):
            output.name = f"{name}/output{index}" if index else name
        converted = ir.convenience.convert_attributes(dict(attributes or {}))
        node = ir.Node(domain, op_type, given, converted, outputs=outputs, name=name)
        self.graph.insert_before(self.before, node)

    def constant(self, array: NDArray[Any], suffix: str) -> ir.Value:
        """Add an initializer of the site and return it."""
        return self._initializer(ir.Tensor(array), suffix)

    def parameter(self, value: ir.Value, suffix: str) -> ir.Value:
        """Return a copy of an initializer that belongs to this site alone.

        Alike initializers were merged; a consumer of the file may rewrite each for its layer.
        """
        if value.const_value is None:
            return value
        return self._initializer(value.const_value, suffix)

    def _initializer(self, tensor: ir.TensorProtocol, suffix: str) -> ir.Value:
        name = f"{self.call.name}/{suffix}"
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(list(np.shape(tensor.numpy()))),
            const_value=ir.Tensor(tensor.numpy(), name=name),
        )
        self.graph.initializers[name] = value
        return value


# One value, or as many as the op has results.
Results = ir.Value | Sequence[ir.Value]
Translation = Callable[[Builder, Call], Results]


@dataclass(frozen=True)
class Boundary:
    """The nodes of a dialect between real values and codes.

    Args:
        enter: Op type that turns real values into codes.
        leave: Op type that turns codes into real values.
        grid: Step and zero point of either.
    """

    enter: str
    leave: str
    grid: Callable[[ir.Node], tuple[float, int]]


@dataclass(frozen=True)
class Dialect:
    """One way to write an integer model as ONNX.

    Args:
        name: What users write.
        table: The translation of each op.
        opset_version: Version of the standard ONNX domain.
        ir_version: Of the file.
        domains: Further domains and their versions.
        check: Refuses a model that the dialect cannot express, before anything is recorded; gets
            the quantized sites.
        finish: Works on the graph after every op is translated.
        boundary: The nodes between real values and codes.
    """

    name: str
    table: dict[str, Translation]
    opset_version: int
    ir_version: int
    domains: Mapping[str, int]
    check: Callable[[Sequence[Site]], None]
    finish: Callable[[ir.Graph], None]
    boundary: Boundary


def dtype_of(value: ir.Value) -> ir.DataType:
    """Return the element type of a value, which every recorded value has."""
    if value.dtype is None:
        msg = f"internal: the value {value.name!r} has no type."
        raise RuntimeError(msg)
    return value.dtype


def shape_of(value: ir.Value) -> list[int]:
    """Return the sizes of a value, which are numbers in every recorded graph."""
    if value.shape is None:
        msg = f"internal: the value {value.name!r} has no shape."
        raise RuntimeError(msg)
    return [int(size) for size in value.shape.numpy()]
