"""The older generation of the dialect: the finished graph of the newer one, spelled anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx
from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.export.generations import (
    CHIP_ATTRIBUTES,
    FIRST_PLATFORM,
    LINGER1,
    LINGER1_DOMAIN,
    LINGER3_DOMAIN,
    PLATFORM,
    ROUNDING,
    Spelling,
)


def respell(graph: ir.Graph) -> None:
    """Give the engine's ops the names and attributes of the older generation.

    Raises:
        UnsupportedError: If it has no name for an op, or none for what an attribute says.
    """
    for node in graph:
        if node.domain != LINGER3_DOMAIN:
            continue
        spelling = LINGER1.get(node.op_type)
        if spelling is None:
            msg = (
                f"`{node.name}`: the 'linger1' dialect has no name for {node.op_type}. Export with "
                f"dialect='linger', or leave the layer in float with overrides."
            )
            raise UnsupportedError(msg)
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        attributes = _respelled(str(node.name), spelling, given)
        node.attributes.clear()
        node.attributes.update({a.name: a for a in ir.convenience.convert_attributes(attributes)})
        node.domain, node.op_type = LINGER1_DOMAIN, spelling.op_type


def _respelled(node: str, spelling: Spelling, given: Mapping[str, Any]) -> dict[str, Any]:
    first = given.get(PLATFORM) == FIRST_PLATFORM
    result: dict[str, Any] = {}
    for name, value in given.items():
        allowed = _implied(spelling, name)
        if allowed is not None:
            if not any(np.float32(value) == np.float32(known) for known in allowed):
                msg = (
                    f"`{node}`: {spelling.op_type} of the 'linger1' dialect has no attribute for "
                    f"{name}={value}: it stands for {allowed[0]}. Export with dialect='linger'."
                )
                raise UnsupportedError(msg)
        elif not (first and name in CHIP_ATTRIBUTES):
            result[spelling.renamed.get(name, name)] = value
    return result | (ROUNDING if "quant_mode" in given else {})


def _implied(spelling: Spelling, name: str) -> tuple[Any, ...] | None:
    return next((v for pattern, v in spelling.implied.items() if fnmatchcase(name, pattern)), None)


# --- schemas ----------------------------------------------------------------------------------


def older_schemas(schemas: Sequence[OpSchema]) -> list[OpSchema]:
    """Return the schemas of the older generation, from those of the newer one."""
    return [_older(schema) for schema in schemas if schema.name in LINGER1]


def _older(schema: OpSchema) -> OpSchema:
    spelling = LINGER1[schema.name]
    attributes: list[OpSchema.Attribute] = []
    for name, attribute in sorted(schema.attributes.items()):
        if _implied(spelling, name) is None:
            required = attribute.required and name not in CHIP_ATTRIBUTES
            older = spelling.renamed.get(name, name)
            attributes.append(OpSchema.Attribute(older, attribute.type, required=required))
    present = {attribute.name for attribute in attributes}
    attributes += [
        OpSchema.Attribute(name, getattr(OpSchema.AttrType, kind), required=False)
        for name, kind in spelling.ignored.items()
        if name not in present
    ]
    older_schema = OpSchema(
        spelling.op_type,
        LINGER1_DOMAIN,
        1,
        inputs=schema.inputs,
        outputs=schema.outputs,
        type_constraints=[
            (c.type_param_str, c.allowed_type_strs, c.description) for c in schema.type_constraints
        ],
        attributes=attributes,
    )

    def infer(context: Any) -> None:
        """Infer by the newer generation's rule, from a node in its words."""
        types = [context.get_input_type(i) for i in range(context.get_num_inputs())]
        inputs = {f"x{i}": t for i, t in enumerate(types) if t is not None}
        outputs = [f"y{i}" for i in range(context.get_num_outputs())]
        node = onnx.helper.make_node(schema.name, list(inputs), outputs, domain=LINGER3_DOMAIN)
        for name in schema.attributes:
            found = context.get_attribute(spelling.renamed.get(name, name))
            allowed = _implied(spelling, name)
            if found is not None:
                added = node.attribute.add()
                added.CopyFrom(found)
                added.name = name
            elif name in CHIP_ATTRIBUTES:
                node.attribute.append(onnx.helper.make_attribute(name, FIRST_PLATFORM))
            elif allowed is not None and schema.attributes[name].required:
                node.attribute.append(onnx.helper.make_attribute(name, allowed[0]))
        found_types = onnx.shape_inference.infer_node_outputs(schema, node, inputs)
        for index, name in enumerate(outputs):
            if name in found_types:
                context.set_output_type(index, found_types[name])

    older_schema.set_type_and_shape_inference_function(infer)
    return older_schema
