"""Describing ops to ONNX, so that its checker and its shape inference understand a dialect."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
from onnx.defs import OpSchema

TENSOR_TYPES: list[str] = [
    f"tensor({name})"
    for name in (
        *("float", "double", "float16", "bfloat16", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
]
FLOAT_TYPES = ["tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"]
CODE_TYPES = ["tensor(int8)", "tensor(int16)", "tensor(int32)"]

INT, FLOAT, STRING = OpSchema.AttrType.INT, OpSchema.AttrType.FLOAT, OpSchema.AttrType.STRING
INTS = OpSchema.AttrType.INTS

Shape = list[int | str | None]
# Computes the output shape from the attributes by name and the input shapes.
ShapeRule = Callable[[Mapping[str, Any], Sequence[Shape]], Shape]
# Computes the output element type from the attributes and the input element types.
TypeRule = Callable[[Mapping[str, Any], Sequence[int]], int]


def input_of(
    name: str, types: Sequence[str], optional: bool = False, variadic: bool = False
) -> tuple[OpSchema.FormalParameter, tuple[str, Sequence[str], str]]:
    """Return a formal parameter with a type variable of its own, and that variable's constraint."""
    options = OpSchema.FormalParameterOption
    option = options.Optional if optional else options.Variadic if variadic else options.Single
    variable = f"T_{name}"
    return (
        OpSchema.FormalParameter(name, variable, param_option=option, is_homogeneous=True),
        (variable, list(types), ""),
    )


def schema_of(
    op_type: str,
    domain: str,
    inputs: Sequence[tuple[OpSchema.FormalParameter, tuple[str, Sequence[str], str]]],
    output_types: Sequence[str],
    required: Mapping[str, OpSchema.AttrType],
    optional: Mapping[str, OpSchema.AttrType],
    shape: ShapeRule,
    dtype: TypeRule,
) -> OpSchema:
    """Build the schema of an op with one output.

    Args:
        op_type: Name of the op.
        domain: Its domain, version 1.
        inputs: See :func:`input_of`.
        output_types: What the output may be.
        required: Attributes a node must have.
        optional: Attributes a node may have.
        shape: Rule of the output's shape.
        dtype: Rule of the output's element type.
    """
    schema = OpSchema(
        op_type,
        domain,
        1,
        inputs=[parameter for parameter, _ in inputs],
        outputs=[OpSchema.FormalParameter("output", "T_output")],
        type_constraints=[
            *(constraint for _, constraint in inputs),
            ("T_output", list(output_types), ""),
        ],
        attributes=[
            *(OpSchema.Attribute(n, t, required=True) for n, t in required.items()),
            *(OpSchema.Attribute(n, t, required=False) for n, t in optional.items()),
        ],
    )
    names = [*required, *optional]

    def infer(context: Any) -> None:
        attributes = {}
        for name in names:
            attribute = context.get_attribute(name)
            if attribute is not None:
                attributes[name] = onnx.helper.get_attribute_value(attribute)
        types = [context.get_input_type(i) for i in range(context.get_num_inputs())]
        known = [t for t in types if t is not None]
        result = onnx.TypeProto()
        result.tensor_type.elem_type = dtype(attributes, [t.tensor_type.elem_type for t in known])
        if all(t.tensor_type.HasField("shape") for t in known):
            for size in shape(attributes, [_shape_of(t) for t in known]):
                dimension = result.tensor_type.shape.dim.add()
                if isinstance(size, int):
                    dimension.dim_value = size
                elif size is not None:
                    dimension.dim_param = size
        context.set_output_type(0, result)

    schema.set_type_and_shape_inference_function(infer)
    return schema


def register_schemas(schemas: Sequence[OpSchema]) -> None:
    """Make ops known to ONNX; ops known already stay as they are."""
    for schema in schemas:
        if not onnx.defs.has(schema.name, schema.domain):
            onnx.defs.register_schema(schema)
            # Up to onnx 1.22, what Python's inference functions leave behind in the C++ library
            # crashes the process when it ends.
            atexit.register(
                onnx.defs.deregister_schema, schema.name, schema.since_version, schema.domain
            )


def _shape_of(proto: onnx.TypeProto) -> Shape:
    return [
        d.dim_value if d.HasField("dim_value") else d.dim_param or None
        for d in proto.tensor_type.shape.dim
    ]
