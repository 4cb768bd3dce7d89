"""A recurrent layer on real values of its integers, with the gradient of PyTorch's cells.

Forward runs the integer cells; backward is back-propagation through time with the derivatives of
the float cell, taken at the values that the integers stand for. What saturates - the hidden state,
and the cell state of an LSTM - passes no gradient. One autograd node holds a whole sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_linger.ops.recurrent.arithmetic import CELL_STEP, Formats, curves_of, formats_of
from lightning_linger.ops.recurrent.cells import (
    CELLS,
    GATES,
    Numbers,
    Weights,
    trace_of,
)
from lightning_linger.ops.recurrent.kernels import cell_codes
from lightning_linger.ops.recurrent.loop import run_cell


@dataclass
class Layer:
    """One direction of one layer, as it runs now.

    Args:
        kind: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        weights: Codes.
        numbers: Grids.
        batch_sizes: Rows of each time step.
        reverse: Whether it runs back in time.
        fused: Whether all inputs are projected at once.
        range: Filled by the forward: smallest and largest hidden state before it was rounded.
    """

    kind: str
    weights: Weights
    numbers: Numbers
    batch_sizes: list[int]
    reverse: bool
    fused: bool
    range: tuple[Tensor, Tensor] | None = None

    @property
    def formats(self) -> Formats:
        """The platform's formats."""
        return formats_of(curves_of(self.numbers.platform))


@dataclass(frozen=True)
class Parameters:
    """Real values on their grids; gradients flow to them.

    Args:
        ih: ``[gates * H, I]``.
        hh: ``[gates * H, P]``.
        bias_ih: ``[gates * H]`` or None.
        bias_hh: ``[gates * H]`` or None.
        hr: ``[P, H]`` or None.
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None


def run_layer(
    layer: Layer, rows: Tensor, states: tuple[Tensor, ...], parameters: Parameters
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a layer with gradients.

    Args:
        layer: What to run.
        rows: Real values ``[N, I]`` in order of time.
        states: Hidden state on its grid, and the cell state of an LSTM in Q15, real values.
        parameters: Real values of the layer's weights.

    Returns:
        The hidden states ``[N, P]`` and the states at the end, real values.
    """
    results: Sequence[Tensor] = _Recurrence.apply(
        layer,
        rows,
        parameters.ih,
        parameters.hh,
        parameters.bias_ih,
        parameters.bias_hh,
        parameters.hr,
        *states,
    )
    return results[0], tuple(results[1:])


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        rows: Tensor,
        ih: Tensor,
        hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        hr: Tensor | None,
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        numbers = layer.numbers
        trace = trace_of(layer.kind, layer.weights, layer.batch_sizes, rows)
        cell = CELLS[layer.kind](layer.weights, numbers, trace)
        hidden = (states[0] / numbers.hidden.scale).round_()
        others = [cell_codes(c, numbers.hidden.rounding, numbers.platform) for c in states[1:]]
        outputs, after = run_cell(
            cell,
            rows / numbers.scale_x,
            (hidden, *others),
            layer.batch_sizes,
            layer.reverse,
            layer.fused,
        )
        # Integers have no NaN: what a diverged model holds must not become a finite loss.
        poison = (rows.sum() + ih.sum() + hh.sum()) * 0.0
        raw = trace.values["raw"]
        if raw.numel():
            low, high = torch.aminmax(raw)
            layer.range = (low + poison, high + poison)
        ctx.layer = layer
        ctx.needs = [bias_ih is not None, bias_hh is not None]
        ctx.names = list(trace.values)
        ctx.save_for_backward(rows, ih, hh, hr, *trace.values.values())
        steps = (numbers.hidden.scale, *[CELL_STEP] * len(others))
        return (
            torch.add(poison, outputs.to(rows.dtype), alpha=numbers.hidden.scale),
            *(x.to(rows.dtype) * step for x, step in zip(after, steps, strict=True)),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, ih, hh, hr, *saved = ctx.saved_tensors
        layer: Layer = ctx.layer
        values = dict(zip(ctx.names, saved, strict=True))
        grid = layer.numbers.hidden
        raw = values["raw"]
        inside = (raw >= grid.low * grid.scale) & (raw <= grid.high * grid.scale)
        back = _BACKWARD[layer.kind](layer, values, hh, hr)
        outside = grads[0] * inside
        d_states = back.through_time(outside, inside.to(raw.dtype), list(grads[1:]))
        gates_x, gates_h = back.gates()
        has_bias_ih, has_bias_hh = ctx.needs
        return (
            None,
            gates_x @ ih,
            gates_x.t() @ rows,
            gates_h.t() @ values["before"],
            gates_x.sum(0) if has_bias_ih else None,
            gates_h.sum(0) if has_bias_hh else None,
            back.projection(),
            *d_states,
        )


class _Backward(ABC):
    """Back-propagation through the steps of one layer.

    Subclasses derive, for all steps at once, the factors that each step needs.
    """

    def __init__(
        self, layer: Layer, values: dict[str, Tensor], hh: Tensor, hr: Tensor | None
    ) -> None:
        self.layer = layer
        self.values = values
        self.hh = hh
        self.hr = hr
        self.size = len(layer.weights.ih) // GATES[layer.kind]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of each time step."""
        return tuple(x.split_with_sizes(self.layer.batch_sizes))

    @abstractmethod
    def step(self, t: int, grads: list[Tensor]) -> list[Tensor]:
        """Return the gradients of the states before a step.

        Args:
            t: Index of the step.
            grads: Of the states after it; that of the hidden state as it was before rounding.
        """

    @abstractmethod
    def gates(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of the two products that make the gates, for all rows."""

    def projection(self) -> Tensor | None:
        """Return the gradient of the projection, which only an LSTM may have."""
        return None

    def through_time(self, outside: Tensor, inside: Tensor, final: list[Tensor]) -> list[Tensor]:
        """Go through the steps from the last to the first.

        Args:
            outside: Gradients of the outputs, masked.
            inside: 1 where the hidden state did not saturate, else 0.
            final: Gradients of the states after the last step.

        Returns:
            Gradients of the states before the first step.
        """
        sizes = self.layer.batch_sizes
        masks, wanted = self.split(inside), self.split(outside)
        times = range(len(sizes))
        reverse = self.layer.reverse
        first = sizes[0] if reverse else sizes[-1]
        now = [g[:first] for g in final]
        started: list[list[Tensor]] = []
        for t in times if reverse else reversed(times):
            have, want = len(now[0]), sizes[t]
            if have < want:
                now = [torch.cat([g, end[have:want]]) for g, end in zip(now, final, strict=True)]
            elif have > want:
                started.append([g[want:] for g in now])
                now = [g[:want] for g in now]
            now[0] = torch.addcmul(wanted[t], now[0], masks[t])
            now = self.step(t, now)
        if started:
            parts = [now, *reversed(started)]
            now = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        return now


class _LstmBackward(_Backward):
    def __init__(
        self, layer: Layer, values: dict[str, Tensor], hh: Tensor, hr: Tensor | None
    ) -> None:
        super().__init__(layer, values, hh, hr)
        i, f, g, o = values["gates"].view(-1, 4, self.size).unbind(1)
        cell, bent = values["cell"], values["bent"]
        formats = layer.formats
        kept = f * cell
        passes = (kept.abs() < formats.product_limit).to(f.dtype)
        f_passing = f * passes
        # By the cell's gradient: gates i, f, g, and the state before.
        factors = torch.empty_like(values["gates"]).view(-1, 4, self.size)
        torch.mul(g, i * (1 - i), out=factors[:, 0])
        torch.mul(cell * passes, f * (1 - f), out=factors[:, 1])
        torch.mul(i, 1 - g * g, out=factors[:, 2])
        # By the output's gradient: gate o.
        torch.mul(bent, o * (1 - o), out=factors[:, 3])
        to_cell = o * (1 - bent * bent)
        if formats.cell_bits < 32:
            within = (kept + i * g).abs() < formats.cell_limit
            factors[:, :3].mul_(within.unsqueeze(1))
            f_passing = f_passing * within
        self._factors = self.split(factors)
        self._to_cell = self.split(to_cell)
        self._kept = self.split(f_passing)
        self._found = torch.empty_like(factors)
        self._found_steps = self.split(self._found)
        self._outputs: list[Tensor] = [to_cell.new_empty(0)] * len(layer.batch_sizes)

    def step(self, t: int, grads: list[Tensor]) -> list[Tensor]:
        d_hidden, d_cell = grads
        if self.hr is not None:
            self._outputs[t] = d_hidden
            d_hidden = d_hidden @ self.hr
        d_cell = torch.addcmul(d_cell, d_hidden, self._to_cell[t])
        found, factors = self._found_steps[t], self._factors[t]
        torch.mul(d_cell.unsqueeze(1), factors[:, :3], out=found[:, :3])
        torch.mul(d_hidden, factors[:, 3], out=found[:, 3])
        return [found.view(-1, 4 * self.size) @ self.hh, d_cell * self._kept[t]]

    def gates(self) -> tuple[Tensor, Tensor]:
        found = self._found.view(-1, 4 * self.size)
        return found, found

    def projection(self) -> Tensor | None:
        return None if self.hr is None else torch.cat(self._outputs).t() @ self.values["product"]


class _GruBackward(_Backward):
    def __init__(
        self, layer: Layer, values: dict[str, Tensor], hh: Tensor, hr: Tensor | None
    ) -> None:
        super().__init__(layer, values, hh, hr)
        r, z = values["gates"].view(-1, 2, self.size).unbind(1)
        n, product = values["new"], values["product"]
        to_new = (1 - z) * (1 - n * n)
        # By the output's gradient: gates r, z, the recurrent half of n, and all of n.
        factors = n.new_empty(len(n), 4, self.size)
        torch.mul(to_new * product, r * (1 - r), out=factors[:, 0])
        torch.mul(values["before"] - n, z * (1 - z), out=factors[:, 1])
        torch.mul(to_new, r, out=factors[:, 2])
        factors[:, 3] = to_new
        self._factors = self.split(factors)
        self._kept = self.split(z.contiguous())
        self._found = torch.empty_like(factors)
        self._found_steps = self.split(self._found)

    def step(self, t: int, grads: list[Tensor]) -> list[Tensor]:
        (d_hidden,) = grads
        found = self._found_steps[t]
        torch.mul(d_hidden.unsqueeze(1), self._factors[t], out=found)
        recurrent = found.view(-1, 4 * self.size)[:, : 3 * self.size]
        return [torch.addmm(d_hidden * self._kept[t], recurrent, self.hh)]

    def gates(self) -> tuple[Tensor, Tensor]:
        found = self._found
        gates_x = torch.cat([found[:, :2], found[:, 3:]], 1).flatten(1)
        return gates_x, found[:, :3].flatten(1)


class _RnnBackward(_Backward):
    def __init__(
        self, layer: Layer, values: dict[str, Tensor], hh: Tensor, hr: Tensor | None
    ) -> None:
        super().__init__(layer, values, hh, hr)
        raw = values["raw"]
        factors = 1 - raw * raw if layer.kind == "rnn_tanh" else (raw > 0).to(raw.dtype)
        self._factors = self.split(factors)
        self._found = torch.empty_like(factors)
        self._found_steps = self.split(self._found)

    def step(self, t: int, grads: list[Tensor]) -> list[Tensor]:
        found = torch.mul(grads[0], self._factors[t], out=self._found_steps[t])
        return [found @ self.hh]

    def gates(self) -> tuple[Tensor, Tensor]:
        return self._found, self._found


_BACKWARD: dict[str, type[_Backward]] = {
    "lstm": _LstmBackward,
    "gru": _GruBackward,
    "rnn_tanh": _RnnBackward,
    "rnn_relu": _RnnBackward,
}
