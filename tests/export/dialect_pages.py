"""Writes the pages of the dialects from their schemas and tables.

Run ``python -m tests.export.dialect_pages`` after a schema, a spelling or a row has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
from onnx.defs import OpSchema

from lightning_linger.export.generations import LINGER1, Spelling
from lightning_linger.export.linger import LINGER, OLDER_SCHEMAS, SCHEMAS
from lightning_linger.export.linger.elementwise import MAX_CAT_OPERANDS
from lightning_linger.export.qdq import QDQ, qdq_dialect
from lightning_linger.export.qdq.writer import SIGNED, UNSIGNED

DOCS = Path(__file__).parents[2] / "docs"
NOTE = "<!-- Written by `python -m tests.export.dialect_pages`; the tests compare. -->"

# What an attribute means, by the newer generation's name.
MEANINGS = {
    "platform": "the chip: `venus`, `arcs`, `venusA` or `mars`; without it, `venus`",
    "quant_mode": "the rounding, always `floor_add`: half up",
    "platform_quant": "the rounding as venus reads it, always `luna_quant`",
    "x_bits": "width of the operand",
    "y_bits": "width of the second operand",
    "w_bits": "width of the weight, which lies in whole bytes",
    "o_bits": "width of the result",
    "data_bits": "width of what `Quant` gives and `Requant` takes; of the operand in `linger1`",
    "x_i_bits": "width of each part",
    "scale_x": "scale of the operand, for `Quant` that of its result",
    "scale_y": "scale of the second operand",
    "scale_w": "scale of the weight",
    "scale_o": "scale of the result, for `Dequant` that of its operand",
    "scale_x_i": "scale of each part",
    "scale_iw": "scale of the input weights",
    "scale_hw": "scale of the recurrent weights",
    "scale_h": "scale of the hidden state",
    "scale_c": "scale of the cell state",
    "kernel_shape": "size of the window",
    "strides": "distance of the windows",
    "dilations": "distance of the numbers in a window",
    "pads": "in front and then behind, for each dimension",
    "output_padding": "what is added behind",
    "group": "groups of channels",
    "axis": "the axis",
    "dim": "the axis, as venus reads it; for `QGLU` on every chip",
    "ceil_mode": "always 0",
    "count_include_pad": "always 1",
    "divisor_override": "always -1: none",
    "epsilon": "always 1e-5",
    "zero_point": "always 0",
    "input_size": "features of the input",
    "hidden_size": "features of the state",
    "num_layers": "always 1",
    "batch_first": "always 0",
    "go_forward": "1, or 0 from the end of the sequence to its start",
    "has_hidden": "whether a first hidden state is an operand: always 0",
    "has_cell": "whether a first cell state is an operand: always 0",
    "castor_mode": "read by nobody; other exporters write it",
    "mode": "read by nobody; other exporters write it",
    "dropout": "read by nobody; other exporters write it",
    "parameter_bits": "width of the weight, which lies in whole bytes",
    "scale_i": "scale of the operand",
}

LINGER_HEAD = f"""# The linger dialect

{NOTE}

What `export_onnx(..., dialect="linger")` writes, and `dialect="linger1"` in the older generation of
names; [Export](export.md) says what is guaranteed. The file has opset {LINGER.opset_version} and IR
version {LINGER.ir_version}. The schemas are registered when `lightning_linger.export` is imported:
`onnx.checker` and `onnx.shape_inference` know every op below.

- A scale is the reciprocal of a step, and a power of two: `code = floor(x * scale + 0.5)`.
- Weights are int8 or int16 initializers in PyTorch's layout. Biases are int32, at the scale of the
  accumulator, `scale_x * scale_w`.
- Between the engine's ops stand standard ones on codes: Relu, Clip, MaxPool, Reshape, Flatten,
  Transpose, Slice, Expand, ArgMax.
- An attribute in parentheses is optional. The older generation names a chip only where it is not
  venus, and its rounding is `platform_quant`.
"""

OLDER_HEAD = """
## The older generation

Domain `thinker`. Ops and attributes that are not listed are spelled alike. What an op lacks has to
be what it stands for; everything else is refused, and so are the ops that have no name here:
"""

QDQ_HEAD = f"""# The qdq dialect

{NOTE}

What `export_onnx(..., dialect="qdq")` writes: standard ONNX with no domain of its own, opset
{QDQ.opset_version}, IR version {QDQ.ir_version}; [Export](export.md) says what is guaranteed.
ONNX's scale is a step: `x = scale * (code - zero_point)`.

## Storage of activations

"""


def linger_page() -> str:
    """Return the page of the linger dialect."""
    refused = [f"`{s.name}`" for s in SCHEMAS if s.name not in LINGER1]
    parts = [
        LINGER_HEAD,
        "## Ops\n\nDomain `linger`.\n",
        _table(["op", "operands", "results", "attributes"], map(_op_row, SCHEMAS)),
        "## Attributes\n",
        _table(["attribute", "type", "means"], _attribute_rows([*SCHEMAS, *OLDER_SCHEMAS])),
        f"{OLDER_HEAD.strip()}\n{', '.join(refused)}.\n",
        _table(["op", "older name", "attributes", "what it lacks stands for"], _older_rows()),
    ]
    return "\n".join(parts)


def qdq_page() -> str:
    """Return the page of the qdq dialect."""
    storages = [
        [f"{s.bits} bit", f"`{s.dtype.name.lower()}`", str(s.zero)]
        for s in (*UNSIGNED.values(), *SIGNED.values())
    ]
    ends = [
        onnx.defs.get_schema(name, QDQ.opset_version, "")
        for name in (QDQ.boundary.enter, QDQ.boundary.leave)
    ]
    parts = [
        QDQ_HEAD.rstrip() + "\n",
        _table(["codes", "element type", "zero point"], storages),
        "The unsigned ones are the default. Weights are int8 or int16 with zero point 0, and have "
        "one step\nper channel, whose axis `DequantizeLinear` names, or one; biases are int32.\n",
        "## The nodes between real values and codes\n",
        _table(["op", "operands", "results", "attributes"], map(_op_row, ends)),
        "Only `axis` is written. Operands and results may have further types in ONNX.\n",
        "## Integer ops that are written\n",
        "Each between a `DequantizeLinear` and a `QuantizeLinear`, or on codes as whole numbers. "
        "What is not\nhere is an error that names the site; [Operators](operators.md) says it by "
        "op.\n",
        _wrapped(f"`{name}`" for name in sorted(qdq_dialect().table)) + "\n",
    ]
    return "\n".join(parts)


PAGES: dict[str, Callable[[], str]] = {
    "dialect-linger.md": linger_page,
    "dialect-qdq.md": qdq_page,
}


# --- tables -----------------------------------------------------------------------------------


def _table(titles: list[str], rows: Iterable[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _op_row(schema: OpSchema) -> list[str]:
    kinds = {c.type_param_str: _kinds(c.allowed_type_strs) for c in schema.type_constraints}
    operands = [
        f"`{p.name}`{_OPTIONS[p.option.name]}: {kinds.get(p.type_str, p.type_str)}"
        for p in schema.inputs
    ]
    results = [f"`{p.name}`: {kinds.get(p.type_str, p.type_str)}" for p in schema.outputs]
    return [f"`{schema.name}`", "; ".join(operands), "; ".join(results), _attributes(schema)]


_OPTIONS = {"Single": "", "Optional": " (optional)", "Variadic": "..."}
# The types that files of the dialects hold.
_KNOWN = ("float", "int8", "uint8", "int16", "uint16", "int32", "int64")


def _kinds(allowed: Iterable[str]) -> str:
    names = [name.removeprefix("tensor(").removesuffix(")") for name in allowed]
    return ", ".join(name for name in _KNOWN if name in names)


def _attributes(schema: OpSchema) -> str:
    required, optional = [], []
    for name, attribute in sorted(schema.attributes.items()):
        shown = _numbered(name)
        (required if attribute.required else optional).append(shown)
    shown = [f"`{name}`" for name in dict.fromkeys(required)]
    return ", ".join([*shown, *(f"(`{name}`)" for name in dict.fromkeys(optional))])


def _numbered(name: str) -> str:
    """Return the common name of the attributes of a join's parts."""
    for index in range(MAX_CAT_OPERANDS):
        if name in (f"scale_x_{index}", f"x_{index}_bits"):
            return "scale_x_i" if name.startswith("scale") else "x_i_bits"
    return name


def _attribute_rows(schemas: Iterable[OpSchema]) -> list[list[str]]:
    kinds = {
        _numbered(name): attribute.type.name
        for schema in schemas
        for name, attribute in schema.attributes.items()
    }
    return [[f"`{name}`", kinds[name], MEANINGS[name]] for name in sorted(kinds)]


def _older_rows() -> list[list[str]]:
    schemas = {schema.name: schema for schema in OLDER_SCHEMAS}
    return [
        [f"`{name}`", f"`{s.op_type}`", _attributes(schemas[s.op_type]), _implied(s)]
        for name, s in LINGER1.items()
    ]


def _implied(spelling: Spelling) -> str:
    found = []
    for name, values in spelling.implied.items():
        numbers = [value for value in values if not (name.endswith("_bits") and value < 8)]
        meant = " or ".join(f"{number:g}" for number in numbers)
        found.append(f"`{name.replace('*', 'i')}` {meant}")
    return ", ".join(found)


def _wrapped(words: Iterable[str]) -> str:
    lines = [""]
    for word in words:
        joined = f"{lines[-1]}, {word}" if lines[-1] else word
        if len(joined) > 96:
            lines[-1] += ","
            lines.append(word)
        else:
            lines[-1] = joined
    return "\n".join(lines) + "."


if __name__ == "__main__":
    for file, written in PAGES.items():
        (DOCS / file).write_text(written())
