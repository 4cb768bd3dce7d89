"""The nodes of a captured graph that stand for the library's ops, with all their arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import ir
from onnxscript.values import Op, Opset

from lightning_linger.export.schemas import TENSOR_TYPES

# Domain of the nodes that stand for the library's ops until a dialect has translated them.
CAPTURE_DOMAIN = "lightning_linger.capture"
NAMESPACE = "linger"
ARGUMENTS = "arguments"

# Ops that bring operands to a site; a site itself is its other op.
OPERAND_OPS = ("quantize", "requantize", "dequantize")

_LABEL_MARK = "#"


def op_name(func: Any) -> str:
    """Return the bare name of one of the library's ops, e.g. ``conv``."""
    return str(func.name()).partition("::")[2].partition(".")[0]


def bind(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an op by name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def labelled(platform: str, label: str) -> str:
    """Return the name of a platform with a label behind it."""
    return f"{platform}{_LABEL_MARK}{label}"


def label_of(platform: str) -> tuple[str, str]:
    """Split a labelled platform into the platform's name and the label."""
    name, _, label = platform.partition(_LABEL_MARK)
    return name, label


def translation(func: Any) -> Callable[..., Any]:
    """Return a function for ``torch.onnx`` that records the op with all its arguments."""
    parameter = OpSchema.FormalParameter
    any_number = OpSchema.FormalParameterOption.Variadic
    schema = OpSchema(
        op_name(func),
        CAPTURE_DOMAIN,
        1,
        inputs=[
            parameter("inputs", "T", param_option=any_number, is_homogeneous=False, min_arity=0)
        ],
        outputs=[parameter(f"output{i}", "R") for i in range(len(func._schema.returns))],
        type_constraints=[("T", TENSOR_TYPES, ""), ("R", TENSOR_TYPES, "")],
        attributes=[OpSchema.Attribute(ARGUMENTS, OpSchema.AttrType.STRING, required=True)],
    )
    node = Op(Opset(CAPTURE_DOMAIN, 1), op_name(func), schema)

    def translate(*args: Any, **kwargs: Any) -> Any:
        inputs: list[Any] = []
        values: dict[str, Any] = {}
        for name, value in bind(func, args, kwargs).items():
            argument = next(a for a in func._schema.arguments if a.name == name)
            if not _takes_tensors(argument):
                values[name] = value
            elif isinstance(value, list | tuple):
                values[name] = len(value)
                inputs += value
            else:
                values[name] = None if value is None else 1
                inputs += [] if value is None else [value]
        return node(*inputs, **{ARGUMENTS: json.dumps(values)})

    return translate


def arguments_of(node: ir.Node) -> dict[str, Any]:
    """Return the arguments of a captured node by name; tensors are values of the graph."""
    func = getattr(getattr(torch.ops, NAMESPACE), node.op_type).default
    recorded = json.loads(node.attributes[ARGUMENTS].as_string())
    inputs = iter(node.inputs)
    arguments: dict[str, Any] = {}
    for argument in func._schema.arguments:
        value = recorded.get(argument.name)
        if _takes_tensors(argument) and value is not None:
            is_list = "List" in str(argument.type)
            value = [next(inputs) for _ in range(value)] if is_list else next(inputs)
        arguments[argument.name] = value
    return arguments


def _takes_tensors(argument: Any) -> bool:
    return "Tensor" in str(argument.type)
