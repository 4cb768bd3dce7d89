"""Recurrent layers: the input's matrix product for all steps, then a Scan through time.

Everything is whole numbers: int32 and float64 products, float64 rescaling by one multiplication,
and the two curves as tables that the graph carries (see :mod:`lightning_linger.ops.recurrent`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxscript import ir

from lightning_linger.core.integer import code_limits, is_power_of_two
from lightning_linger.export.dialect import Results, dtype_of, shape_of
from lightning_linger.export.qdq.exact import DOUBLE, Steps
from lightning_linger.export.qdq.writer import (
    FLOAT,
    INT32,
    Write,
    Writer,
    array_of,
    mark,
    width_of,
)
from lightning_linger.ops.recurrent.arithmetic import CELL_STEP, UNIT, Formats, formats_of

_TABLE = "curves/sigmoid_tanh"


class _BodyWriter(Writer):
    """Adds nodes to the body of a Scan; constants stay in the graph around it."""

    def __init__(self, outer: Writer) -> None:
        super().__init__(outer.builder, outer.call, outer.form)
        self.nodes: list[ir.Node] = []

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int],
        attributes: dict[str, Any] | None = None,
        suffix: str = "",
        dtype: ir.DataType = FLOAT,
    ) -> ir.Value:
        value = self.value(suffix, dtype, shape)
        converted = ir.convenience.convert_attributes(attributes or {})
        self.nodes.append(
            ir.Node("", op_type, list(inputs), converted, outputs=[value], name=value.name)
        )
        return value

    def nodes_of(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        count: int,
        shape: Sequence[int],
        suffix: str,
    ) -> list[ir.Value]:
        """Add a node with several float64 outputs of one shape."""
        values = [self.value(f"{suffix}{i}", DOUBLE, shape) for i in range(count)]
        name = f"{self.call.name}/body/{suffix}"
        self.nodes.append(
            ir.Node(
                "",
                op_type,
                list(inputs),
                ir.convenience.convert_attributes({"axis": 1, "num_outputs": count}),
                outputs=values,
                name=name,
            )
        )
        return values

    def value(self, suffix: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """Return a new value."""
        return ir.Value(
            name=f"{self.call.name}/body/{suffix}",
            type=ir.TensorType(dtype),
            shape=ir.Shape(list(shape)),
        )

    def constant(self, value: Any, suffix: str) -> ir.Value:
        return super().constant(value, f"body/{suffix}")


@dataclass(frozen=True)
class _Matrix:
    """A product of codes, as the integer cells have it (their ``Product``).

    Args:
        weight: ``[O, K]``.
        bias: ``[O]`` or None.
        ratios: Steps of the accumulator in units of the result, one or ``[O]``.
    """

    weight: NDArray[Any]
    bias: NDArray[Any] | None
    ratios: list[float]

    def units(self, steps: Steps, x: ir.Value, name: str) -> ir.Value:
        """Return the product of stored codes, or of whole float64 numbers, before rounding."""
        shape = [*shape_of(x)[:-1], len(self.weight)]
        narrow = dtype_of(x) != DOUBLE and width_of(x) == 8 and self.weight.dtype == np.int8
        columns = np.ascontiguousarray(self.weight.T)
        if narrow:
            storage = steps.w.storage(8)
            inputs = [
                x,
                steps.number(f"{name}/weight", columns, np.int8),
                steps.number(f"{name}/x/zero_point", storage.zero, storage.numpy),
                steps.number(f"{name}/weight/zero_point", 0, np.int8),
            ]
            acc = steps.add(f"{name}/product", "MatMulInteger", inputs, shape, INT32)
            acc = steps.cast(f"{name}/accumulator", acc, DOUBLE)
        else:
            codes = x if dtype_of(x) == DOUBLE else steps.codes(x, DOUBLE, f"{name}/x")
            weight = steps.number(f"{name}/weight", columns)
            acc = steps.add(f"{name}/product", "MatMul", [codes, weight], shape)
        if self.bias is not None:
            bias = steps.number(f"{name}/bias", self.bias)
            acc = steps.add(f"{name}/add_bias", "Add", [acc, bias])
        ratios = np.asarray(self.ratios)
        factor = steps.number(f"{name}/ratio", ratios if len(ratios) > 1 else ratios[0])
        return steps.add(f"{name}/rescale", "Mul", [acc, factor])

    def whole(self, steps: Steps, x: ir.Value, bits: int, name: str) -> ir.Value:
        """Return the rounded product, saturated at a width."""
        rounded = steps.add(f"{name}/round", "Round", [self.units(steps, x, name)])
        return _clipped(steps, rounded, *code_limits(bits), name)


def _clipped(steps: Steps, x: ir.Value, low: float, high: float, name: str) -> ir.Value:
    edges = [steps.number(f"{name}/low", low), steps.number(f"{name}/high", high)]
    return steps.add(f"{name}/clip", "Clip", [x, *edges])


def _shifted(steps: Steps, x: ir.Value, shift: int, name: str) -> ir.Value:
    """Shift whole numbers right and round half up."""
    factor = steps.number(f"{name}/factor", 2.0**-shift)
    half = steps.number(f"{name}/half", 0.5)
    scaled = steps.add(f"{name}/scaled", "Mul", [x, factor])
    return steps.add(
        f"{name}/floor", "Floor", [steps.add(f"{name}/plus_half", "Add", [scaled, half])]
    )


def _table(w: Writer) -> ir.Value:
    """Return the table of both curves, which all layers of a graph share."""
    entries = array_of(w.call.tables).reshape(-1)
    known = w.builder.graph.initializers.get(_TABLE)
    if known is not None and np.array_equal(array_of(known), entries):
        return known
    tensor = ir.Tensor(entries, name=_TABLE)
    value = ir.Value(
        name=_TABLE,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(list(entries.shape)),
        const_value=tensor,
    )
    w.builder.graph.initializers[_TABLE] = value
    return value


def _curves(
    steps: Steps, table: ir.Value, x: ir.Value, functions: Sequence[str], name: str
) -> ir.Value:
    """Look up the curve of each group of columns."""
    size = shape_of(x)[-1] // len(functions)
    starts = [(1 << 15) + (function == "tanh") * (1 << 16) for function in functions]
    offsets = np.repeat(np.asarray(starts, np.float64), size)
    placed = steps.add(f"{name}/place", "Add", [x, steps.number(f"{name}/starts", offsets)])
    index = steps.cast(f"{name}/index", placed, INT32)
    found = steps.add(f"{name}/lookup", "Gather", [table, index], shape_of(x), dtype_of(table))
    return steps.cast(f"{name}/bent", found, DOUBLE)


class _Layer:
    """One direction of one layer, and what all kinds of cells share."""

    def __init__(self, w: Writer) -> None:
        self.w = w
        self.call = w.call
        self.kind = w.call.op
        self.formats: Formats = formats_of("table")
        self.relu = self.call.arguments.get("nonlinearity") == "relu"
        self.unit = self.call.scale_o if self.relu else 2.0**-self.formats.gate_fraction
        self.input = self._matrix("ih", self.call.scale_x, self.unit)
        self.recurrent = self._matrix("hh", self.call.scale_o, self.unit)
        self.size = len(self.input.weight) // {"lstm": 4, "gru": 3, "rnn": 1}[self.kind]
        self.storage = w.storage(self.call.bits_o)
        self.table = None if self.relu else _table(w)

    def _matrix(self, name: str, scale_x: float, unit: float) -> _Matrix:
        call = self.call
        bias: ir.Value | None = call.arguments[f"bias_{name}"]
        return _Matrix(
            array_of(call.arguments[f"weight_{name}"]),
            None if bias is None else array_of(bias),
            [scale_x * step / unit for step in call.arguments[f"scale_{name}"]],
        )

    def write(self) -> list[ir.Value]:
        """Write the layer: the hidden states of all steps, and the states at the end."""
        call, w = self.call, self.w
        x, shape = call.x, shape_of(call.x)
        if call.batch_sizes:  # the step of a cell
            shape = [1, *shape]
            x = w.reshape(x, shape, "x/one_step")
        elif call.batch_first:
            shape = [shape[1], shape[0], shape[2]]
            x = self._swapped(x, shape, "x/time_first")
        time, batch, _ = shape
        outer = Steps(w)
        if self.relu:
            projected = self.input.units(outer, x, "input")
        else:
            projected = self.input.whole(outer, x, self.formats.gate_bits, "input")
        states = [self._hidden_state()]
        if self.kind == "lstm":
            states.append(self._cell_state())
        *final, y = self._scan(projected, states, time, batch)
        wanted = shape_of(call.results[0])
        if call.batch_first and not call.batch_sizes:
            y = self._swapped(y, wanted, "y/batch_first")
        results = [w.reshape(y, wanted, "y/shape"), mark(final[0])]
        if self.kind == "lstm":
            results.append(
                w.node("Cast", [final[1]], shape_of(final[1]), {"to": INT32}, "c", INT32)
            )
        return results

    def _swapped(self, value: ir.Value, shape: Sequence[int], suffix: str) -> ir.Value:
        dtype = self.w.storages[width_of(value)].dtype
        return mark(self.w.node("Transpose", [value], shape, {"perm": [1, 0, 2]}, suffix, dtype))

    def _hidden_state(self) -> ir.Value:
        """Return the initial hidden state as stored codes."""
        call, w = self.call, self.w
        value: ir.Value = call.h
        if value.const_value is not None:
            array = array_of(value)
            if np.issubdtype(array.dtype, np.floating):
                units = array.astype(np.float32) / np.float32(call.scale_o)
                array = np.rint(units).clip(call.low, call.high)
            return mark(w.constant(self.storage.store(array), "h"))
        if dtype_of(value) != FLOAT:
            return value
        codes = w.quantize(value, call.scale_o, call.bits_o, "h/quantize")
        if (call.low, call.high) == code_limits(self.storage.bits):
            return codes
        return w.clamp(codes, call.scale_o, call.bits_o, call.low, call.high)

    def _cell_state(self) -> ir.Value:
        """Return the initial cell state as whole float64 numbers."""
        value: ir.Value = self.call.c
        low, high = code_limits(self.formats.cell_bits)
        if value.const_value is not None:
            array = array_of(value)
            if np.issubdtype(array.dtype, np.floating):
                array = np.rint(array.astype(np.float64) / CELL_STEP).clip(low, high)
            return self.w.constant(array.astype(np.float64), "c0")
        steps = Steps(self.w)
        wide = steps.cast("c0/wide", value, DOUBLE)
        if dtype_of(value) == INT32:
            return wide
        units = steps.add("c0/units", "Mul", [wide, steps.number("c0/per_unit", 1.0 / CELL_STEP)])
        return _clipped(steps, steps.add("c0/round", "Round", [units]), low, high, "c0")

    def _scan(
        self, projected: ir.Value, states: Sequence[ir.Value], time: int, batch: int
    ) -> list[ir.Value]:
        body = _BodyWriter(self.w)
        outputs = self.recurrent.weight.shape[1]
        h = mark(body.value("h", self.storage.dtype, [batch, outputs]))
        inputs = [h]
        if self.kind == "lstm":
            inputs.append(body.value("c", DOUBLE, [batch, self.size]))
        gx = body.value("gx", DOUBLE, shape_of(projected)[1:])
        after = _STEPS[self.kind](self, Steps(body), gx, inputs)
        # Each output of a body is a value of its own.
        output = body.node("Identity", [after[0]], shape_of(h), None, "y", self.storage.dtype)
        graph = ir.Graph(
            [*inputs, gx],
            [*after, output],
            nodes=body.nodes,
            name=f"{self.call.name}/body",
        )
        direction = int(self.call.reverse)
        attributes = {
            "body": graph,
            "num_scan_inputs": 1,
            "scan_input_directions": [direction],
            "scan_output_directions": [direction],
        }
        results = [(dtype_of(state), shape_of(state)) for state in after]
        results.append((self.storage.dtype, [time, batch, outputs]))
        *final, y = self.w.builder.nodes("Scan", [*states, projected], results, attributes)
        mark(final[0])
        return [*final, mark(y)]

    # --- pieces of a step -----------------------------------------------------------------------

    def gates(self, steps: Steps, gx: ir.Value, h: ir.Value) -> ir.Value:
        """Return the sum that goes into the curves."""
        bits = self.formats.gate_bits
        gh = self.recurrent.whole(steps, h, bits, "recurrent")
        return _clipped(steps, steps.add("gates/sum", "Add", [gx, gh]), *code_limits(bits), "gates")

    def curves(self, steps: Steps, x: ir.Value, functions: Sequence[str], name: str) -> ir.Value:
        """Look up the curve of each group of columns."""
        assert self.table is not None  # only a ReLU needs none
        return _curves(steps, self.table, x, functions, name)

    def parts(self, steps: Steps, x: ir.Value, count: int, name: str) -> list[ir.Value]:
        """Split columns into groups of equal size."""
        body = steps.w
        assert isinstance(body, _BodyWriter)
        batch, columns = shape_of(x)
        return body.nodes_of("Split", [x], count, [batch, columns // count], name)

    def rounded(self, steps: Steps, values: ir.Value, ratio: float) -> ir.Value:
        """Return stored codes of whole numbers that are multiplied by a ratio."""
        factor = steps.number("hidden/ratio", ratio)
        return self.nearest(steps, steps.add("hidden/units", "Mul", [values, factor]))

    def nearest(self, steps: Steps, units: ir.Value) -> ir.Value:
        """Return stored codes of numbers in units of the step."""
        call = self.call
        rounded = steps.add("hidden/round", "Round", [units])
        codes = _clipped(steps, rounded, call.low, call.high, "hidden")
        zero = steps.number("hidden/zero_point", self.storage.zero)
        stored = steps.add("hidden/store", "Add", [codes, zero])
        return mark(steps.cast("hidden/stored", stored, self.storage.dtype))

    def codes(self, steps: Steps, h: ir.Value) -> ir.Value:
        """Return stored codes as whole float64 numbers."""
        wide = steps.cast("hidden/wide", h, DOUBLE)
        zero = steps.number("hidden/zero", self.storage.zero)
        return steps.add("hidden/codes", "Sub", [wide, zero])


def _lstm_step(
    layer: _Layer, steps: Steps, gx: ir.Value, states: Sequence[ir.Value]
) -> list[ir.Value]:
    h, c = states
    formats, call = layer.formats, layer.call
    curves = ("sigmoid", "sigmoid", "tanh", "sigmoid")
    bent = layer.curves(steps, layer.gates(steps, gx, h), curves, "curves")
    i, f, g, o = layer.parts(steps, bent, 4, "gate")
    kept = steps.add("cell/kept", "Mul", [c, f])
    new = steps.add("cell/new", "Mul", [i, g])
    total = steps.add("cell/total", "Add", [kept, new])
    shifted = _shifted(steps, total, 2 * UNIT - formats.gate_fraction, "operand")
    operand = _clipped(steps, shifted, *code_limits(formats.gate_bits), "operand")
    after = _clipped(
        steps, _shifted(steps, total, UNIT, "after"), *code_limits(formats.cell_bits), "after"
    )
    curve = layer.curves(steps, operand, ("tanh",), "cell/curve")
    product = steps.add("hidden/product", "Mul", [o, curve])
    if call.weight_hr is None:
        return [layer.rounded(steps, product, 2.0 ** (-2 * UNIT) / call.scale_o), after]
    projection = _Matrix(
        array_of(call.weight_hr), None, [CELL_STEP * step / call.scale_o for step in call.scale_hr]
    )
    narrowed = _shifted(steps, product, UNIT, "product")
    return [layer.nearest(steps, projection.units(steps, narrowed, "projection")), after]


def _gru_step(
    layer: _Layer, steps: Steps, gx: ir.Value, states: Sequence[ir.Value]
) -> list[ir.Value]:
    (h,) = states
    bits, scale = layer.formats.gate_bits, layer.call.scale_o
    limits = code_limits(bits)
    x_r, x_z, x_n = layer.parts(steps, gx, 3, "input")
    h_r, h_z, h_n = layer.parts(
        steps, layer.recurrent.whole(steps, h, bits, "recurrent"), 3, "recurrent"
    )

    def gate(name: str, a: ir.Value, b: ir.Value) -> ir.Value:
        summed = _clipped(steps, steps.add(f"{name}/sum", "Add", [a, b]), *limits, name)
        return layer.curves(steps, summed, ("sigmoid",), name)

    r, z = gate("reset", x_r, h_r), gate("update", x_z, h_z)
    scaled = _shifted(steps, steps.add("new/reset", "Mul", [r, h_n]), UNIT, "new/shift")
    operand = _clipped(steps, steps.add("new/sum", "Add", [scaled, x_n]), *limits, "new")
    n = layer.curves(steps, operand, ("tanh",), "new/curve")
    power = is_power_of_two(scale)
    fraction = max(UNIT, round(-np.log2(scale))) if power else UNIT
    factor = steps.number("hidden/align", scale * 2.0**fraction)
    aligned = steps.add("hidden/aligned", "Mul", [layer.codes(steps, h), factor])
    wide_h = steps.add("hidden/whole", "Round", [aligned])
    wide_n = n
    if fraction > UNIT:
        up = steps.number("new/align", 2.0 ** (fraction - UNIT))
        wide_n = steps.add("new/aligned", "Mul", [n, up])
    change = steps.add("hidden/change", "Sub", [wide_h, wide_n])
    part = steps.add("hidden/part", "Mul", [change, z])
    unit = steps.number("new/unit", 2.0**UNIT)
    start = steps.add("hidden/start", "Mul", [wide_n, unit])
    total = steps.add("hidden/total", "Add", [part, start])
    return [layer.rounded(steps, total, 2.0 ** -(fraction + UNIT) / scale)]


def _rnn_step(
    layer: _Layer, steps: Steps, gx: ir.Value, states: Sequence[ir.Value]
) -> list[ir.Value]:
    (h,) = states
    if layer.relu:
        total = steps.add("sum", "Add", [gx, layer.recurrent.units(steps, h, "recurrent")])
        return [layer.nearest(steps, steps.add("positive", "Relu", [total]))]
    bent = layer.curves(steps, layer.gates(steps, gx, h), ("tanh",), "curve")
    return [layer.rounded(steps, bent, 2.0**-UNIT / layer.call.scale_o)]


_STEPS: dict[str, Any] = {"lstm": _lstm_step, "gru": _gru_step, "rnn": _rnn_step}


def _recurrent(w: Writer) -> Results:
    return _Layer(w).write()


TABLE: dict[str, Write] = {"lstm": _recurrent, "gru": _recurrent, "rnn": _recurrent}
