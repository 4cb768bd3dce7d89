"""The cells of LSTM, GRU and RNN on integers.

With ``sat`` the saturation of the gates' format, ``move`` the platform's rounding of an accumulator
to it and ``rs`` a right shift that rounds half up (formats: :mod:`.arithmetic`)::

    gx = move(W_ih x + b_ih),  gh = move(W_hh h + b_hh)

    LSTM  i, f, o = sigmoid(sat(gx + gh)),  g = tanh(sat(gx + gh))
          c' = f c + i g                      (Q30; saturated, then kept as Q15)
          h' = round(o tanh(c'))              (with a projection W_hr round(o tanh(c')), rounded)
    GRU   r, z = sigmoid(sat(gx + gh)),  n = tanh(sat(gx + rs(r gh, 15)))
          h' = round(n + z (h - n))
    RNN   h' = round(tanh(sat(gx + gh)))      or  h' = round(max(W_ih x + b_ih + W_hh h + b_hh, 0))

Gates and updates are PyTorch's. The LSTM is the engines' (arcs and venusa measured on the engine);
no engine has a usable GRU or plain RNN.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_linger.ops.recurrent.arithmetic import (
    CELL_STEP,
    UNIT,
    HiddenGrid,
    Holder,
    Product,
    curves_for,
    curves_of,
    formats_of,
    saturated,
    shifted,
)

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True)
class Weights:
    """The codes of one direction of one layer.

    Args:
        ih: ``[gates * H, I]``.
        hh: ``[gates * H, P]``.
        bias_ih: ``[gates * H]`` at ``scale_x * scale_ih``, or None.
        bias_hh: ``[gates * H]`` at ``scale_h * scale_hh``, or None.
        hr: ``[P, H]`` or None.
        scale_ih: Steps of ``ih``, one or one per row, like the next two.
        scale_hh: Of ``hh``.
        scale_hr: Of ``hr``; empty without it.
        bits: Width of the codes of all matrices.
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None
    scale_ih: Sequence[float]
    scale_hh: Sequence[float]
    scale_hr: Sequence[float]
    bits: int


@dataclass(frozen=True)
class Numbers:
    """The grids around a recurrent layer.

    Args:
        scale_x: Step of the input.
        bits_x: Width of the input.
        bits_h: Width of the hidden state.
        hidden: What the hidden state is rounded to.
        platform: Name of the target.
        tables: See :func:`.arithmetic.curve_tables`.
    """

    scale_x: float
    bits_x: int
    bits_h: int
    hidden: HiddenGrid
    platform: str
    tables: Tensor | None


class Trace:
    """What a forward leaves for backward: real values by name, one row per input row.

    Args:
        widths: Number of columns by name.
        batch_sizes: Rows of each time step.
        like: A tensor of the dtype and device.
    """

    def __init__(self, widths: Mapping[str, int], batch_sizes: Sequence[int], like: Tensor) -> None:
        sizes = list(batch_sizes)
        self.values = {name: like.new_empty(sum(sizes), n) for name, n in widths.items()}
        self._steps = {name: buffer.split_with_sizes(sizes) for name, buffer in self.values.items()}

    def keep(self, t: int, **values: Tensor) -> None:
        """Note the values of one time step."""
        for name, value in values.items():
            self._steps[name][t].copy_(value)

    def scale(self, factors: Mapping[str, float]) -> None:
        """Turn codes into real values."""
        for name, factor in factors.items():
            self.values[name].mul_(factor)


class Cell(ABC):
    """One step of a layer on codes.

    Args:
        weights: Its weights.
        numbers: The grids around it.
        trace: Where to leave what backward needs, None for nothing.
    """

    kind: str

    def __init__(self, weights: Weights, numbers: Numbers, trace: Trace | None) -> None:
        self.weights = weights
        self.numbers = numbers
        self.trace = trace
        self.hidden = numbers.hidden
        self.formats = formats_of(curves_of(numbers.platform))
        self.gate_bits = self.formats.gate_bits
        self.size = len(weights.ih) // GATES[self.kind]
        self.input = self._product(
            weights.ih,
            weights.bias_ih,
            numbers.scale_x,
            weights.scale_ih,
            numbers.bits_x,
            bounded=trace is None,
        )
        self.recurrent = self._product(
            weights.hh, weights.bias_hh, self.hidden.scale, weights.scale_hh, numbers.bits_h
        )

    def _product(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scale_x: float,
        scale_w: Sequence[float],
        bits_x: int,
        bounded: bool = True,
    ) -> Product:
        return Product(
            weight,
            bias,
            scale_x,
            scale_w,
            bits_x,
            self.weights.bits,
            self.unit,
            self.hidden.rounding,
            bounded,
        )

    @property
    def unit(self) -> float:
        """Step of the gates."""
        return 2.0**-self.formats.gate_fraction

    def project(self, rows: Tensor) -> Tensor:
        """Return what the input contributes to the gates, for any number of rows."""
        return self.input.whole(rows, self.gate_bits, torch.int32)

    @abstractmethod
    def step(self, t: int, gx: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the states after one time step.

        Args:
            t: Index of the step.
            gx: What :meth:`project` gave for its rows.
            states: The hidden state, whole numbers in the dtype of the recurrent product, and the
                cell state (int64) of an LSTM.
        """

    @abstractmethod
    def finish_trace(self) -> None:
        """Turn what was traced into real values."""

    # --- for a compiled step ----------------------------------------------------------------

    def held_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a step reads besides its arguments, by a name."""
        found: dict[str, Tensor] = {}
        for name, value in self._read_by_step():
            if isinstance(value, Holder):
                found |= {f"{name}.{part}": x for part, x in value.tensors().items()}
            elif isinstance(value, Tensor):
                found[name] = value
        return found

    def holding(self, tensors: Mapping[str, Tensor]) -> Cell:
        """Return a copy that reads other tensors in their place."""
        moved = copy.copy(self)
        for name, value in self._read_by_step():
            if isinstance(value, Holder):
                mine = {part: tensors[f"{name}.{part}"] for part in value.tensors()}
                setattr(moved, name, value.holding(mine))
            elif isinstance(value, Tensor):
                setattr(moved, name, tensors[name])
        return moved

    def signature(self) -> Hashable:
        """Return all else that a step depends on: cells of one signature do the same."""
        rest = [
            (name, value.constants() if isinstance(value, Holder) else value)
            for name, value in self._read_by_step()
            if not isinstance(value, Tensor)
        ]
        return (type(self), self.recurrent.saturates(self.gate_bits), *rest)

    def _read_by_step(self) -> list[tuple[str, object]]:
        outside = ("weights", "numbers", "input", "trace")
        return [(name, value) for name, value in vars(self).items() if name not in outside]

    def _gates(self, gx: Tensor, h: Tensor) -> Tensor:
        gh = self.recurrent.whole(h, self.gate_bits)
        return saturated(gh.add_(gx), self.gate_bits)


class LstmCell(Cell):
    """Input, forget and output gate, cell state."""

    kind = "lstm"

    def __init__(self, weights: Weights, numbers: Numbers, trace: Trace | None) -> None:
        super().__init__(weights, numbers, trace)
        self._curves = curves_for(numbers.platform, numbers.tables, weights.ih.device)
        self._gate_base = self._curves.base(("sigmoid", "sigmoid", "tanh", "sigmoid"), self.size)
        self._cell_base = self._curves.base(("tanh",), self.size)
        self._projection: Product | None = None
        if weights.hr is not None:
            self._projection = Product(
                weights.hr,
                None,
                CELL_STEP,
                weights.scale_hr,
                UNIT + 1,
                weights.bits,
                self.hidden.scale,
                self.hidden.rounding,
            )

    def step(self, t: int, gx: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the hidden and the cell state."""
        h, c = states
        gates = self._curves(self._gates(gx, h), self._gate_base)
        i, f, g, o = gates.chunk(4, 1)
        kept, new = c * f, i * g
        if self.formats.product_bits is not None:
            kept = saturated(kept, self.formats.product_bits)  # the other one is below 1
        total = kept.add_(new)
        fraction = self.formats.gate_fraction
        if fraction > UNIT:
            operand = shifted(total, 2 * UNIT - fraction)
            after = shifted(operand, fraction - UNIT)
        else:
            operand = saturated(shifted(total, 2 * UNIT - fraction), self.gate_bits)
            after = saturated(shifted(total, UNIT), self.formats.cell_bits)
        bent = self._curves(operand, self._cell_base)
        product = o * bent
        if self._projection is None:
            result = self.hidden.codes(product, 2 * UNIT).to(h.dtype)
            raw = product
        else:
            product = shifted(product, UNIT)
            raw = self._projection.real(product)
            result = self.hidden.nearest(raw).to(h.dtype)
        if self.trace is not None:
            self.trace.keep(t, gates=gates, cell=c, bent=bent, raw=raw, before=h)
            if self._projection is not None:
                self.trace.keep(t, product=product)
        return result, after

    def finish_trace(self) -> None:
        """Turn what was traced into real values."""
        assert self.trace is not None
        scale_raw = CELL_STEP**2 if self._projection is None else self.hidden.scale
        factors = {"gates": CELL_STEP, "cell": CELL_STEP, "bent": CELL_STEP, "raw": scale_raw}
        if self._projection is not None:
            factors["product"] = CELL_STEP
        self.trace.scale({**factors, "before": self.hidden.scale})


class GruCell(Cell):
    """Reset and update gate; the reset acts on the recurrent product, as in PyTorch."""

    kind = "gru"

    def __init__(self, weights: Weights, numbers: Numbers, trace: Trace | None) -> None:
        super().__init__(weights, numbers, trace)
        self._curves = curves_for(numbers.platform, numbers.tables, weights.ih.device)
        self._gate_base = self._curves.base(("sigmoid", "sigmoid"), self.size)
        self._new_base = self._curves.base(("tanh",), self.size)
        # Of the hidden state where it meets the new one.
        self._fraction = max(UNIT, self.hidden.fraction or UNIT)

    def step(self, t: int, gx: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the hidden state."""
        (h,) = states
        gh = self.recurrent.whole(h, self.gate_bits)
        both = 2 * self.size
        summed = saturated(gh[:, :both] + gx[:, :both], self.gate_bits)
        gates = self._curves(summed, self._gate_base)
        r, z = gates.chunk(2, 1)
        gh_n = gh[:, both:]
        operand = shifted(r * gh_n, UNIT).add_(gx[:, both:])
        n = self._curves(saturated(operand, self.gate_bits), self._new_base)
        wide_n = n << (self._fraction - UNIT)
        wide_h = self.hidden.aligned(h, self._fraction)
        total = (wide_h.sub_(wide_n).mul_(z)).add_(wide_n << UNIT)
        result = self.hidden.codes(total, self._fraction + UNIT).to(h.dtype)
        if self.trace is not None:
            self.trace.keep(t, gates=gates, new=n, product=gh_n, raw=total, before=h)
        return (result,)

    def finish_trace(self) -> None:
        """Turn what was traced into real values."""
        assert self.trace is not None
        self.trace.scale(
            {
                "gates": CELL_STEP,
                "new": CELL_STEP,
                "product": self.unit,
                "raw": 2.0 ** -(self._fraction + UNIT),
                "before": self.hidden.scale,
            }
        )


class TanhCell(Cell):
    """A plain recurrent cell."""

    kind = "rnn_tanh"

    def __init__(self, weights: Weights, numbers: Numbers, trace: Trace | None) -> None:
        super().__init__(weights, numbers, trace)
        self._curves = curves_for(numbers.platform, numbers.tables, weights.ih.device)
        self._base = self._curves.base(("tanh",), self.size)

    def step(self, t: int, gx: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the hidden state."""
        (h,) = states
        bent = self._curves(self._gates(gx, h), self._base)
        result = self.hidden.codes(bent, UNIT).to(h.dtype)
        if self.trace is not None:
            self.trace.keep(t, raw=bent, before=h)
        return (result,)

    def finish_trace(self) -> None:
        """Turn what was traced into real values."""
        assert self.trace is not None
        self.trace.scale({"raw": CELL_STEP, "before": self.hidden.scale})


class ReluCell(Cell):
    """A plain recurrent cell that needs no curve: its sum is rounded once."""

    kind = "rnn_relu"

    @property
    def unit(self) -> float:
        """Step of the hidden state."""
        return self.hidden.scale

    def project(self, rows: Tensor) -> Tensor:
        """Return the product in units of the hidden state's step, float64."""
        return self.input.real(rows)

    def step(self, t: int, gx: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the hidden state."""
        (h,) = states
        total = (gx + self.recurrent.real(h)).clamp_(min=0.0)
        if self.trace is not None:
            self.trace.keep(t, raw=total, before=h)
        return (self.hidden.nearest(total).to(h.dtype),)

    def finish_trace(self) -> None:
        """Turn what was traced into real values."""
        assert self.trace is not None
        self.trace.scale({"raw": self.hidden.scale, "before": self.hidden.scale})


CELLS: dict[str, type[Cell]] = {cell.kind: cell for cell in (LstmCell, GruCell, TanhCell, ReluCell)}


def trace_of(kind: str, weights: Weights, batch_sizes: Sequence[int], like: Tensor) -> Trace:
    """Return an empty trace of a layer."""
    size, outputs = len(weights.ih) // GATES[kind], weights.hh.shape[1]
    widths = {"raw": outputs, "before": outputs}
    if kind == "lstm":
        widths |= {"gates": 4 * size, "cell": size, "bent": size}
        if weights.hr is not None:
            widths["product"] = size
    elif kind == "gru":
        widths |= {"gates": 2 * size, "new": size, "product": size}
    return Trace(widths, batch_sizes, like)
