"""What flows between the nodes of a ``linger`` file: real values, or codes of some scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.generations import ALIASES, ATTRIBUTE_ALIASES
from lightning_linger.export.lowering import MOVEMENTS
from lightning_linger.export.reading import attributes_of, label_of
from lightning_linger.export.runner.step import check_types

_PAYLOADS = {8: onnx.TensorProto.INT8, 16: onnx.TensorProto.INT16, 32: onnx.TensorProto.INT32}

QUANT, DEQUANT, REQUANT, IDENTITY = "Quant", "Dequant", "Requant", "Identity"
_BETWEEN = (QUANT, DEQUANT)

# Standard ops of which one operand may be codes, and the result is codes of the same scale.
_KEEPING = (*MOVEMENTS, "Relu", "MaxPool", "Split", "ShuffleChannel", "Dropout", IDENTITY)
# Standard ops that take codes, and give something else.
ABOUT_CODES = ("Shape", "Size", "ArgMax", "ArgMin")


@dataclass(frozen=True)
class Codes:
    """Codes of one scale.

    Args:
        bits: Their width.
        scale: The reciprocal of the step, as the dialect writes it; None where nothing says it.
    """

    bits: int
    scale: float | None

    @property
    def element_type(self) -> int:
        """The type of a tensor that holds them."""
        return int(_PAYLOADS[8 if self.bits <= 8 else 16 if self.bits <= 16 else 32])

    def __str__(self) -> str:
        """Return the width and the step."""
        step = "of unknown step" if self.scale is None else f"step {1 / self.scale:g}"
        return f"int{self.bits} {step}"


# Codes, or None for real values, places, sizes and the like.
State = Codes | None


@dataclass(frozen=True)
class Engine:
    """A node of the engine's own, by the newer generation's names.

    Args:
        node: The node.
        op_type: Its name.
        attributes: Its attributes.
    """

    node: onnx.NodeProto
    op_type: str
    attributes: Mapping[str, Any]

    def codes(self, scale: str, bits: str) -> Codes | None:
        """Return codes by the names of two attributes, None where there is no such scale."""
        value = self.attributes.get(scale)
        if value is None:
            return None
        if not (np.isfinite(value) and value > 0):
            msg = f"{label_of(self.node)}: {scale} must be a positive number. Found: {value}."
            raise UnsupportedError(msg)
        width = self.attributes.get(bits, 8)
        if not 2 <= width <= 32:
            msg = f"{label_of(self.node)}: {bits} must be from 2 to 32. Found: {width}."
            raise UnsupportedError(msg)
        return Codes(width, float(value))

    @property
    def operands(self) -> dict[int, Codes]:
        """The codes that the operands have to be, by place."""
        names = {0: ("scale_x", "x_bits"), 1: ("scale_y", "y_bits")}
        if "scale_x_0" in self.attributes:
            names = {i: (f"scale_x_{i}", f"x_{i}_bits") for i in range(len(self.node.input))}
        found = {place: self.codes(*pair) for place, pair in names.items()}
        return {
            place: codes
            for place, codes in found.items()
            if codes is not None and place < len(self.node.input) and self.node.input[place]
        }

    @property
    def results(self) -> list[State]:
        """What the outputs are."""
        if self.op_type == QUANT:
            return [self.codes("scale_x", "x_bits")]
        first = self.codes("scale_o", "o_bits")
        if first is None and self.op_type == "Gather":
            first = self.codes("scale_w", "w_bits")
        if self.op_type == "QLSTM":
            cell = self.attributes.get("scale_c", 2.0**15)
            return [first, first, Codes(32, float(cell))][: len(self.node.output)]
        return [first] * len(self.node.output)


def engine_of(node: onnx.NodeProto) -> Engine | None:
    """Return a node as one of the engine's, None if it is a standard one.

    Raises:
        UnsupportedError: If an attribute holds something else than its name says.
    """
    try:
        given = attributes_of(node)
    except Exception as error:
        msg = f"{label_of(node)}: its attributes cannot be read: {error}"
        raise UnsupportedError(msg) from error
    attributes = {ATTRIBUTE_ALIASES.get(name, name): value for name, value in given.items()}
    if not any(name.startswith("scale_") for name in attributes):
        if node.op_type in (*_BETWEEN, REQUANT):
            msg = f"{label_of(node)} lacks its scale. Found: {sorted(attributes)}."
            raise UnsupportedError(msg)
        return None
    check_types(label_of(node), attributes)
    engine = Engine(node, ALIASES.get(node.op_type, node.op_type), attributes)
    needed = {QUANT: ("scale_x",), DEQUANT: ("scale_o",), REQUANT: ("scale_x", "scale_o")}
    missing = [name for name in needed.get(engine.op_type, ()) if name not in attributes]
    if missing:
        msg = f"{label_of(node)} lacks the attribute {missing[0]!r}. Found: {sorted(attributes)}."
        raise UnsupportedError(msg)
    if engine.op_type in needed and not (len(node.input) == 1 and len(node.output) == 1):
        found = f"{len(node.input)} inputs and {len(node.output)} outputs"
        msg = f"{label_of(node)} needs one input and one output. Found: {found}."
        raise UnsupportedError(msg)
    return engine


def keeps_codes(
    node: onnx.NodeProto, states: Sequence[State], constants: Mapping[str, np.dtype[Any]]
) -> bool:
    """Whether a standard node gives codes of the scale of its first operand, if that is codes.

    Args:
        node: The node.
        states: Of its inputs.
        constants: The element types of the initializers, by name.
    """
    if not states or states[0] is None:
        return False
    others = [constants.get(name) for name in node.input[1:] if name]
    if node.op_type == "Concat":
        return all(state == states[0] for state in states)
    if node.op_type == "Clip":  # real edges mean real values
        given = not any(attribute.name in ("min", "max") for attribute in node.attribute)
        return given and all(_is_whole(edge) for edge in others)
    if node.op_type in ("Pad", "iqPad"):
        return len(node.input) < 3 or not node.input[2] or _is_whole(constants.get(node.input[2]))
    return node.op_type in _KEEPING


def state_of_input(value: onnx.ValueInfoProto) -> State:
    """Return what a graph input is: short whole numbers are codes, longer ones places."""
    kind = value.type.tensor_type.elem_type
    if kind not in (onnx.TensorProto.INT8, onnx.TensorProto.INT16):
        return None
    return Codes(8 if kind == onnx.TensorProto.INT8 else 16, None)


def _is_whole(dtype: np.dtype[Any] | None) -> bool:
    return dtype is not None and bool(np.issubdtype(dtype, np.integer))
