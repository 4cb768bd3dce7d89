"""Running a file on other sizes than it was exported for: fine until something depends on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from lightning_linger.core.errors import ConfigError
from lightning_linger.export.reading import label_of
from lightning_linger.export.runner.step import Array

Shape = tuple[int, ...]


def declared_shapes(graph: onnx.GraphProto) -> dict[str, list[int | None]]:
    """Return the sizes that a file names for its values, None where it leaves them open."""
    return {
        value.name: [
            size.dim_value if size.dim_value > 0 else None
            for size in value.type.tensor_type.shape.dim
        ]
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


@dataclass(frozen=True)
class Resized:
    """Inputs of other sizes than the file names.

    Args:
        sizes: By input and axis, the size in the file and the one that is given.
    """

    sizes: Mapping[tuple[str, int], tuple[int, int]]

    @classmethod
    def of(cls, declared: Mapping[str, list[int | None]], inputs: Mapping[str, Array]) -> Resized:
        """Compare arrays with what a file names.

        Args:
            declared: See :func:`declared_shapes`.
            inputs: The arrays by name.

        Raises:
            ConfigError: If an array has another number of dimensions.
        """
        found: dict[tuple[str, int], tuple[int, int]] = {}
        for name, array in inputs.items():
            wanted, shape = declared.get(name), array.shape
            if wanted is None:
                continue
            if len(shape) != len(wanted):
                msg = (
                    f"the input {name!r} has the shape {list(shape)}, and the file takes "
                    f"{len(wanted)} dimensions: {shown(wanted)}."
                )
                raise ConfigError(msg)
            for axis, (size, given) in enumerate(zip(wanted, shape, strict=True)):
                if size is not None and size != given:
                    found[name, axis] = (size, given)
        return cls(found)

    def refusal(self, why: str) -> ConfigError:
        """Return the error for something that depends on a size, which ``why`` names."""
        (name, axis), (size, given) = next(iter(self.sizes.items()))
        return ConfigError(
            f"the file was exported with axis {axis} of {name!r} fixed at {size}, and is given "
            f"{given}. {why} Export with dynamic_axes={{{name!r}: {{{axis}: 'batch'}}}} to leave "
            f"the size open, or pass inputs of {size}."
        )

    def check_reshape(
        self, node: onnx.NodeProto, example: Shape | None, x: Shape, target: Sequence[int]
    ) -> None:
        """Refuse a reshape to ``[4, -1]`` that puts numbers of several samples into one row.

        Such a target holds the size of the example. What stands in front of the size that follows
        has to be whole dimensions of the operand, and the same ones as in the example.

        Args:
            node: The reshape.
            example: The shape of its operand in the file, None if it says none.
            x: The shape of its operand.
            target: What it reshapes to: 0 keeps a size, -1 follows from the others.
        """
        if -1 not in target:
            return  # a target without one has as many numbers as it names
        front = list(target)[: list(target).index(-1)]
        known = example if example is not None and len(example) == len(x) else x
        there, here = (
            math.prod(size or shape[axis] for axis, size in enumerate(front))
            for shape in (known, x)
        )
        if not any(
            math.prod(known[:axis]) == there and math.prod(x[:axis]) == here
            for axis in range(len(x) + 1)
        ):
            why = f"{label_of(node)} holds that size: it reshapes to {list(target)}."
            raise self.refusal(why)

    def check_output(self, name: str, wanted: Sequence[int | None], shape: Shape) -> None:
        """Refuse a result with as many rows as the example where the inputs have other ones."""
        fixed = {size for (_, axis), (size, _) in self.sizes.items() if axis == 0}
        if wanted and shape and wanted[0] == shape[0] and wanted[0] in fixed:
            why = f"The output {name!r} has {shape[0]} rows all the same."
            raise self.refusal(why)


def shown(shape: Sequence[int | None]) -> str:
    """Return a shape with question marks for open sizes."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
