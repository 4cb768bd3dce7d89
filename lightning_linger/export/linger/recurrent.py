"""Recurrent layers: the engine runs one sequence at a time through an LSTM."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.core.integer import code_limits
from lightning_linger.export.dialect import Builder, Call, Results, Translation, dtype_of, shape_of
from lightning_linger.export.linger.attributes import (
    common_attributes,
    payload_bits,
    reciprocal,
    refuse_because,
    reshape,
)
from lightning_linger.export.linger.schema import (
    COMMON,
    DOMAIN,
    O_GRID,
    OPTIONAL,
    X_GRID,
    type_by_o_bits,
)
from lightning_linger.export.schemas import CODE_TYPES, FLOAT, INT, input_of
from lightning_linger.ops.recurrent.arithmetic import CELL_STEP

_EIGHT = code_limits(8)


def _lstm(builder: Builder, call: Call) -> Results:
    _require_engine_form(call)
    one, steps, features = (1, *_time_and_features(call))
    hidden = shape_of(call.weight_hh)[1]
    x = call.x
    if not call.batch_first:
        x = _moved(builder, x, [one, steps, features], "batch_first")
    weights = [
        builder.parameter(call.weight_ih, "weight_ih"),
        builder.parameter(call.weight_hh, "weight_hh"),
        *(_bias(builder, call, name, 4 * hidden) for name in ("bias_ih", "bias_hh")),
    ]
    scale_o = reciprocal(call, call.scale_o)
    attributes = common_attributes(call) | {
        "input_size": features,
        "hidden_size": hidden,
        "num_layers": 1,
        # The engine reads time from axis 1 of [1, T, I] where this is 0, and from axis 2 otherwise.
        "batch_first": 0,
        "go_forward": int(not call.reverse),
        "x_bits": 8,
        "scale_x": reciprocal(call, call.scale_x),
        "w_bits": 8,
        "scale_iw": _weight_scale(call, call.scale_ih),
        "scale_hw": _weight_scale(call, call.scale_hh),
        "scale_h": scale_o,
        "scale_c": 1.0 / CELL_STEP,
        "o_bits": 8,
        "scale_o": scale_o,
        "has_hidden": 0,
        "has_cell": 0,
    }
    state = [one, one, hidden]
    outputs = [
        (ir.DataType.INT8, [one, steps, hidden]),
        (ir.DataType.INT8, state),
        (ir.DataType.INT32, state),
    ]
    results = builder.nodes("QLSTM", [x, *weights], outputs, attributes, domain=DOMAIN)
    wanted = [shape_of(result) for result in call.results]
    names = ("y", "hidden", "cell")
    return [
        _moved(builder, value, shape, name)
        for value, shape, name in zip(results, wanted, names, strict=True)
    ]


def _require_engine_form(call: Call) -> None:
    """Refuse what the engine's LSTM cannot do."""
    what = "an LSTM" if call.op == "lstm" else f"a {call.op.upper()}"
    if call.batch_sizes:
        refuse_because(
            call,
            f"{what} cell",
            "the engine runs whole sequences that start from zero states",
            "Use `nn.LSTM` on the whole sequence",
        )
    batch = shape_of(call.x)[0 if call.batch_first else 1]
    if batch != 1:
        refuse_because(
            call,
            f"{what} on {batch} sequences at once",
            "the engine takes one",
            "Export with example inputs of batch size 1",
        )
    if call.weight_hr is not None:
        refuse_because(
            call, f"{what} with a projection", "the engine has none", "Use one without `proj_size`"
        )
    if not (_is_zero(call.h) and _is_zero(call.c)):
        refuse_because(
            call,
            f"{what} with initial states",
            "the engine starts from zeros",
            "Do without the second argument of the layer",
        )
    if (call.low, call.high) != _EIGHT or payload_bits(call.bits_x) != 8 or call.bits_o != 8:
        refuse_because(
            call,
            f"{what} with {call.bits_x}-bit input and {call.bits_o}-bit hidden state",
            "the engine computes on 8 bits",
            "Quantize it with activation_bits=8 and output_bits=8",
        )
    if payload_bits(call.bits_w) != 8:
        refuse_because(
            call,
            f"{what} with {call.bits_w}-bit weights",
            "the engine reads bytes",
            "Quantize it with weight_bits=8",
        )


def _is_zero(value: ir.Value) -> bool:
    """Whether an initial state is a constant zero, as `nn.LSTM` makes where none is given."""
    return value.const_value is not None and not np.any(value.const_value.numpy())


def _time_and_features(call: Call) -> tuple[int, int]:
    shape = shape_of(call.x)
    return shape[1 if call.batch_first else 0], shape[2]


def _weight_scale(call: Call, steps: list[float]) -> float:
    if len(steps) != 1:
        refuse_because(
            call,
            "weights with one scale per channel",
            "the engine has one per weight",
            "Quantize it with granularity='tensor'",
        )
    return reciprocal(call, steps[0])


def _bias(builder: Builder, call: Call, name: str, size: int) -> ir.Value:
    """Return a bias, zeros where the layer has none: the engine reads both."""
    value: ir.Value | None = call.arguments[name]
    if value is None:
        return builder.constant(np.zeros(size, np.int32), name)
    return builder.parameter(value, name)


def _moved(builder: Builder, value: ir.Value, shape: list[int], suffix: str) -> ir.Value:
    """Reshape what has one sequence; only axes of size one move."""
    if shape_of(value) == shape:
        return value
    moved = reshape(builder, value, shape, suffix)
    moved.type = ir.TensorType(dtype_of(value))
    return moved


def _refuse_gru(builder: Builder, call: Call) -> Results:
    refuse_because(
        call,
        "a GRU",
        "no engine runs one with PyTorch's gates",
        "Use `nn.LSTM`, or quantize for platform='onnxruntime' and export with dialect='qdq'",
    )


def _refuse_rnn(builder: Builder, call: Call) -> Results:
    refuse_because(
        call,
        "a plain RNN",
        "the engine has no such op",
        "Use `nn.LSTM`, or quantize for platform='onnxruntime' and export with dialect='qdq'",
    )


TABLE: dict[str, Translation] = {
    "lstm": _lstm,
    "gru": _refuse_gru,
    "rnn": _refuse_rnn,
}


# --- schema -----------------------------------------------------------------------------------

_ATTRIBUTES = {
    **COMMON,
    **X_GRID,
    **O_GRID,
    **dict.fromkeys(("input_size", "hidden_size", "batch_first", "go_forward", "w_bits"), INT),
    **dict.fromkeys(("scale_iw", "scale_hw", "scale_h"), FLOAT),
}
_OPTIONAL = {
    **OPTIONAL,
    **dict.fromkeys(("num_layers", "has_hidden", "has_cell"), INT),
    "scale_c": FLOAT,
}


def _lstm_schema() -> OpSchema:
    """Return the schema of QLSTM: ``x [1, T, I]``, four weights; all states, the last, the cell."""
    inputs = [
        input_of("x", CODE_TYPES),
        *(input_of(name, ["tensor(int8)"]) for name in ("weight_ih", "weight_hh")),
        *(input_of(name, ["tensor(int32)"]) for name in ("bias_ih", "bias_hh")),
    ]
    parameter = OpSchema.FormalParameter
    schema = OpSchema(
        "QLSTM",
        DOMAIN,
        1,
        inputs=[formal for formal, _ in inputs],
        outputs=[
            parameter("output", "T_output"),
            parameter("hidden", "T_output"),
            parameter("cell", "T_cell"),
        ],
        type_constraints=[
            *(constraint for _, constraint in inputs),
            ("T_output", CODE_TYPES, ""),
            ("T_cell", ["tensor(int32)"], ""),
        ],
        attributes=[
            *(OpSchema.Attribute(n, t, required=True) for n, t in _ATTRIBUTES.items()),
            *(OpSchema.Attribute(n, t, required=False) for n, t in _OPTIONAL.items()),
        ],
    )
    schema.set_type_and_shape_inference_function(_infer)
    return schema


def _infer(context: Any) -> None:
    def number(name: str) -> int:
        return int(onnx.helper.get_attribute_value(context.get_attribute(name)))

    code_type = type_by_o_bits({"o_bits": number("o_bits")}, [])
    hidden = number("hidden_size")
    x = context.get_input_type(0)
    for index, dtype in enumerate((code_type, code_type, int(onnx.TensorProto.INT32))):
        result = onnx.TypeProto()
        result.tensor_type.elem_type = dtype
        if x is not None and len(x.tensor_type.shape.dim) == 3:
            batch, steps, _ = x.tensor_type.shape.dim
            shape = result.tensor_type.shape
            if index:
                shape.dim.add().dim_value = 1
                shape.dim.add().CopyFrom(batch)
            else:
                shape.dim.add().CopyFrom(batch)
                shape.dim.add().CopyFrom(steps)
            shape.dim.add().dim_value = hidden
        context.set_output_type(index, result)


SCHEMAS: list[OpSchema] = [_lstm_schema()]
