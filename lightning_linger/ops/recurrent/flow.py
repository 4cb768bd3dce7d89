"""A recurrent call through its layers and directions, in codes or in real values.

The quantizers of a call: one per layer for its hidden state, shared by both directions; that of the
last layer is the site's output. The last hidden states of several layers have one step, the
coarsest, so that they are one tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.capture import capturing
from lightning_linger.core.fake_quantize import Scalar, fake_quantize, straight_through
from lightning_linger.core.integer import code_limits, dequantize, requantize
from lightning_linger.core.quantizer import Quantizer
from lightning_linger.core.sites import Site, integer_codes, real_values
from lightning_linger.core.tags import WIDEST_OPERAND, Tag, tag_of, with_tag
from lightning_linger.ops.activation import integer_clamp
from lightning_linger.ops.cat import integer_cat
from lightning_linger.ops.folding import full
from lightning_linger.ops.projection import Projection
from lightning_linger.ops.recurrent.arithmetic import (
    CELL_STEP,
    UNIT,
    HiddenGrid,
    curve_tables,
    curves_of,
    formats_of,
)
from lightning_linger.ops.recurrent.call import Direction, RecurrentCall, directions_of
from lightning_linger.ops.recurrent.cells import Numbers, Weights
from lightning_linger.ops.recurrent.floating import run_float
from lightning_linger.ops.recurrent.fusion import compiling_steps, is_compiled, is_fused
from lightning_linger.ops.recurrent.gradients import Layer, Parameters, run_layer
from lightning_linger.ops.recurrent.kernels import (
    cell_codes,
    from_rows,
    integer_gru,
    integer_lstm,
    integer_rnn,
    to_rows,
)
from lightning_linger.ops.recurrent.packing import refuse_in_capture
from lightning_linger.ops.weighted import Parameters as Quantized
from lightning_linger.ops.weighted import integer_result

_TABLES = "curve tables"
# Behind a product of two numbers in Q15 an engine shifts right only.
_FINEST = {"lstm": 2.0 ** (-2 * UNIT), "gru": 2.0 ** (-2 * UNIT), "rnn_tanh": CELL_STEP}


@dataclass(frozen=True)
class Grid:
    """The grid of one layer's hidden state.

    Args:
        quantizer: Its quantizer.
        step: The step in use.
    """

    quantizer: Quantizer
    step: Scalar

    @property
    def bits(self) -> int:
        """Width of the codes."""
        return self.quantizer.grid.bits

    def hidden(self) -> HiddenGrid:
        """Return it as the cells take it."""
        step = float(self.step)
        low, high = (int(code) for code in self.quantizer.code_bounds(step))
        return HiddenGrid(step, low, high, self.quantizer.grid.rounding)


class Passed(NamedTuple):
    """What one direction of one layer gives.

    Args:
        y: Hidden states in the layout of the input.
        states: States at the end.
    """

    y: Tensor
    states: tuple[Tensor, ...]


class Results(NamedTuple):
    """What a call gives.

    Args:
        y: Hidden states of the last layer.
        h: Last hidden states, ``[layers * directions, B, P]``, of a cell ``[B, P]``.
        c: Last cell states, None but for an LSTM.
    """

    y: Tensor
    h: Tensor
    c: Tensor | None


class Flow:
    """Runs a call layer by layer; subclasses say how one direction runs.

    Args:
        site: The site.
        kind: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        call: The bound call.
        is_cell: Whether it is a single step.
    """

    def __init__(self, site: Site, kind: str, call: RecurrentCall, is_cell: bool) -> None:
        self.site = site
        self.kind = kind
        self.call = call
        self.is_cell = is_cell
        self.fused = is_fused(site)
        self.compiled = is_compiled(site)
        self.sizes = self._sizes()

    def _sizes(self) -> list[int]:
        """Return the rows of each step, empty for a padded sequence."""
        if self.is_cell:
            return [int(self.call.input.shape[0])]
        if self.call.batch_sizes is None:
            return []
        refuse_in_capture(self.site)
        return [int(size) for size in self.call.batch_sizes.tolist()]

    # --- what all flows share -----------------------------------------------------------------

    def run(self, x: Tensor) -> Results:
        """Run all layers on a tagged input."""
        finals: list[tuple[Grid, tuple[Tensor, ...]]] = []
        for layer, directions in enumerate(directions_of(self.call)):
            # A capture does not follow context variables.
            with compiling_steps() if self.compiled else contextlib.nullcontext():
                grid, passed = self.layer(layer, directions, x)
            finals += [(grid, p.states) for p in passed]
            x = self.joined(grid, [p.y for p in passed])
            if layer + 1 < self.call.num_layers:
                x = self.between(x)
        hidden = self.stacked([(grid, states[0]) for grid, states in finals])
        cells = [states[1] for _, states in finals if len(states) > 1]
        return Results(x, hidden, self.cells(cells) if cells else None)

    def layer(
        self, layer: int, directions: Sequence[Direction], x: Tensor
    ) -> tuple[Grid, list[Passed]]:
        """Run the directions of one layer."""
        raise NotImplementedError

    def joined(self, grid: Grid, outputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs of the directions side by side, tagged."""
        raise NotImplementedError

    def between(self, x: Tensor) -> Tensor:
        """Apply what stands between two layers."""
        return x

    def stacked(self, states: Sequence[tuple[Grid, Tensor]]) -> Tensor:
        """Return the last hidden states as one tensor, tagged."""
        raise NotImplementedError

    def cells(self, states: Sequence[Tensor]) -> Tensor:
        """Return the last cell states as one tensor, tagged."""
        stacked = states[0] if self.is_cell else torch.stack(list(states))
        return with_tag(stacked, Tag(CELL_STEP, 32, self.site.key, self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model sees."""
        x = self.call.input
        tag = tag_of(x)
        return x.dtype if tag is None else tag.dtype

    def quantizer(self, layer: int) -> Quantizer:
        """Return the quantizer of a layer's hidden state."""
        site = self.site
        if layer + 1 == self.call.num_layers and site.output is not None:
            return site.output
        return site.part(part_name(layer))

    def grid(self, quantizer: Quantizer, step_x: Scalar, directions: Sequence[Any]) -> Grid:
        """Return the grid in use.

        Args:
            quantizer: Of the hidden state.
            step_x: Step of the layer's input.
            directions: Pairs of the input weight's steps and the projection's (None without).
        """
        site = self.site
        if site.switches.recomputing and quantizer.latest_step is not None:
            # The range has moved since the forward that is repeated.
            return Grid(quantizer, quantizer.latest_step)
        finest: Scalar | None = None
        if site.platform is not None and site.platform.right_shift_only:
            finest = _finest(self.kind, step_x, directions)
        step = quantizer.step(finest)
        if not capturing():
            step = quantizer.latest_step = float(step)
        return Grid(quantizer, step)

    def state(self, which: int, direction: Direction) -> Tensor:
        """Return the initial hidden (0) or cell (1) state of a direction, tagged as it came."""
        state: Tensor = self.call.states[which]
        if self.is_cell:
            return state
        index = direction.layer * self.call.directions + int(direction.reverse)
        tag = tag_of(state)
        mine = state[index]
        return mine if tag is None else with_tag(mine, tag)

    def tables(self, device: torch.device) -> Tensor | None:
        """Return the curves of a target without kernels of its own, where the cell has curves."""
        site = self.site
        if self.kind == "rnn_relu" or curves_of(site.platform_name) != "table":
            return None
        if capturing():
            found: Tensor | None = site.prepared.get(_TABLES)
            return found
        tables = curve_tables(site.rounding, device)
        if not site.training:
            site.prepared[_TABLES] = tables
        return tables

    def common_grid(self, grids: Sequence[Grid]) -> tuple[float, int]:
        """Return a step and a width that several hidden states fit."""
        bits = grids[-1].bits
        steps = [float(g.step) * 2.0 ** max(0, g.bits - bits) for g in grids]
        return max(steps), bits

    def hidden_codes(self, h: Tensor, grid: Grid) -> Tensor:
        """Return an initial hidden state as codes of its grid, or real values to be rounded."""
        tag = tag_of(h)
        if tag is None or tag.bits > WIDEST_OPERAND:
            return full(real_values(h))
        codes, step = integer_codes(h), float(tag.step)
        if step == grid.step and tag.bits == grid.bits:
            return codes
        site = self.site
        return requantize(
            codes, step, float(grid.step), tag.bits, grid.bits, site.rounding, site.platform_name
        )


def part_name(layer: int) -> str:
    """Return the name of the quantizer of a layer's hidden state."""
    return f"hidden{layer}"


def _finest(kind: str, step_x: Scalar, directions: Sequence[Any]) -> Scalar:
    if kind == "rnn_relu":
        steps = [(step_x * torch.as_tensor(ih)).amax() for ih, _ in directions]
    elif directions[0][1] is not None:
        steps = [(CELL_STEP * torch.as_tensor(hr)).amax() for _, hr in directions]
    else:
        return _FINEST[kind]
    coarsest = torch.stack(steps).amax()
    return coarsest if capturing() else float(coarsest)


def projections(direction: Direction) -> tuple[Projection, Projection, Projection | None]:
    """Return the linear maps of a direction: of the input, of the hidden state, to the output."""
    d = direction
    return (
        Projection(f"{d.name} ih", d.weight_ih, d.bias_ih),
        Projection(f"{d.name} hh", d.weight_hh, d.bias_hh),
        None if d.weight_hr is None else Projection(f"{d.name} hr", d.weight_hr),
    )


class CodeFlow(Flow):
    """On codes, through the integer ops."""

    def layer(
        self, layer: int, directions: Sequence[Direction], x: Tensor
    ) -> tuple[Grid, list[Passed]]:
        """Call the integer op of each direction."""
        site, quantizer = self.site, self.quantizer(layer)
        tag = _tag(x)
        step_x = float(tag.step)
        maps = [projections(direction) for direction in directions]
        inputs = [ih.codes(site, step_x, tag.bits) for ih, _, _ in maps]
        outputs = [None if hr is None else hr.codes(site, CELL_STEP, UNIT + 1) for _, _, hr in maps]
        steps = [
            (ih.steps, None if hr is None else hr.steps)
            for ih, hr in zip(inputs, outputs, strict=True)
        ]
        grid = self.grid(quantizer, step_x, steps)
        codes = integer_codes(x)
        passed = []
        for direction, (_, recurrent, _), ih, hr in zip(
            directions, maps, inputs, outputs, strict=True
        ):
            hh = recurrent.codes(site, float(grid.step), grid.bits)
            weights = Weights(
                ih=ih.weight,
                hh=hh.weight,
                bias_ih=ih.bias,
                bias_hh=hh.bias,
                hr=None if hr is None else hr.weight,
                scale_ih=ih.steps,
                scale_hh=hh.steps,
                scale_hr=() if hr is None else hr.steps,
                bits=site.weight_bits,
            )
            passed.append(self._pass(direction, codes, tag, weights, grid))
        return grid, passed

    def _pass(
        self, direction: Direction, codes: Tensor, tag: Tag, weights: Weights, grid: Grid
    ) -> Passed:
        site, w, hidden = self.site, weights, grid.hidden()
        tables = self.tables(codes.device)
        h = self.hidden_codes(self.state(0, direction), grid)
        numbers: dict[str, Any] = {
            "batch_sizes": self.sizes,
            "scale_x": float(tag.step),
            "scale_ih": list(w.scale_ih),
            "scale_hh": list(w.scale_hh),
            "scale_o": hidden.scale,
            "bits_x": tag.bits,
            "bits_w": w.bits,
            "bits_o": grid.bits,
            "low": hidden.low,
            "high": hidden.high,
            "batch_first": self.call.batch_first,
            "reverse": direction.reverse,
            "fused": self.fused,
            "rounding": site.rounding,
            "platform": site.platform_name,
        }
        parameters = (w.ih, w.hh, w.bias_ih, w.bias_hh)
        if self.kind == "lstm":
            results: tuple[Tensor, ...] = integer_lstm(
                codes,
                h,
                self._cell_state(direction),
                *parameters,
                w.hr,
                tables,
                scale_hr=list(w.scale_hr),
                **numbers,
            )
        elif self.kind == "gru":
            results = integer_gru(codes, h, *parameters, tables, **numbers)
        else:
            nonlinearity = self.kind.removeprefix("rnn_")
            results = integer_rnn(codes, h, *parameters, tables, nonlinearity, **numbers)
        if torch.compiler.is_dynamo_compiling():
            # Dynamo lets attributes be set on the result of a call, but not on a part of one.
            results = tuple(result.view_as(result) for result in results)
        y, *states = results
        return Passed(y, tuple(states))

    def _cell_state(self, direction: Direction) -> Tensor:
        c = self.state(1, direction)
        tag = tag_of(c)
        if tag is not None and tag.step == CELL_STEP and not c.dtype.is_floating_point:
            return c.to(torch.int32)
        return full(real_values(c))

    def joined(self, grid: Grid, outputs: Sequence[Tensor]) -> Tensor:
        """Concatenate codes; both directions have one step."""
        tag = grid.quantizer.tag(grid.step, self.dtype)
        if len(outputs) == 1:
            return with_tag(outputs[0], tag)
        steps = [float(grid.step)] * len(outputs)
        site = self.site
        y = integer_cat(
            list(outputs), -1, steps, steps[0], grid.bits, site.rounding, site.platform_name
        )
        return with_tag(y, tag)

    def stacked(self, states: Sequence[tuple[Grid, Tensor]]) -> Tensor:
        """Bring codes to one step."""
        grid, h = states[-1]
        tag = grid.quantizer.tag(grid.step, self.dtype)
        if self.is_cell:
            return with_tag(h, tag)
        if len(states) == 1:
            return with_tag(h.unsqueeze(0), tag)
        step, bits = self.common_grid([g for g, _ in states])
        site = self.site
        codes = integer_cat(
            [h.unsqueeze(0) for _, h in states],
            0,
            [float(g.step) for g, _ in states],
            step,
            bits,
            site.rounding,
            site.platform_name,
        )
        return with_tag(codes, dataclasses.replace(tag, step=step, bits=bits, reach=None))

    def ready(self, x: Tensor) -> bool:
        """Whether a graph capture finds everything prepared."""
        for layer, directions in enumerate(directions_of(self.call)):
            if not isinstance(self.quantizer(layer).step(), float):
                return False
            for maps in map(projections, directions):
                if not all(p is None or p.has_codes(self.site) for p in maps):
                    return False
        has_curves = (
            self.kind == "rnn_relu"
            or curves_of(self.site.platform_name) != "table"
            or _TABLES in self.site.prepared
        )
        return has_curves and isinstance(_tag(x).step, float)


class RealFlow(Flow):
    """On real values of codes, with gradients; moves the ranges of hidden states in training."""

    def layer(
        self, layer: int, directions: Sequence[Direction], x: Tensor
    ) -> tuple[Grid, list[Passed]]:
        """Run each direction with gradients, then move the range."""
        site, quantizer = self.site, self.quantizer(layer)
        tag = _tag(x)
        step_x = float(tag.step)
        rows, sizes = to_rows(full(x), self.call.batch_first, self.sizes)
        maps = [projections(direction) for direction in directions]
        inputs = [ih.parameters(site, step_x) for ih, _, _ in maps]
        outputs = [None if hr is None else hr.parameters(site, CELL_STEP) for _, _, hr in maps]
        seen = site.learning and not quantizer.known
        if seen:
            self._see_first_range(quantizer, directions, rows, sizes)
        steps = [
            (ih.step, None if hr is None else hr.step)
            for ih, hr in zip(inputs, outputs, strict=True)
        ]
        grid = self.grid(quantizer, step_x, steps)
        hidden = grid.hidden()
        passed, ranges = [], []
        for direction, (_, recurrent, _), ih, hr in zip(
            directions, maps, inputs, outputs, strict=True
        ):
            hh = recurrent.parameters(site, hidden.scale)
            weights = _weights(site, step_x, hidden.scale, ih, hh, hr)
            numbers = Numbers(
                scale_x=step_x,
                bits_x=tag.bits,
                bits_h=grid.bits,
                hidden=hidden,
                platform=site.platform_name,
                tables=self.tables(x.device),
            )
            run = Layer(self.kind, weights, numbers, sizes, direction.reverse, self.fused)
            states = self._states(direction, grid, hidden, rows)
            parameters = Parameters(
                ih.weight, hh.weight, ih.bias, hh.bias, None if hr is None else hr.weight
            )
            y, after = run_layer(run, rows, states, parameters)
            if run.range is not None:
                ranges += [*run.range, *torch.aminmax(self._initial(direction))]
            y = from_rows(y, self.call.batch_first, self.sizes, len(sizes))
            passed.append(Passed(y, after))
        if site.learning and not seen and ranges:
            quantizer.observe(torch.stack(ranges), self._cap(quantizer))
        return grid, passed

    def _see_first_range(
        self, quantizer: Quantizer, directions: Sequence[Direction], rows: Tensor, sizes: list[int]
    ) -> None:
        """Let a quantizer without a range see the float layer's hidden states."""
        found = []
        with torch.no_grad():
            for direction in directions:
                states = tuple(
                    full(real_values(self.state(which, direction))).to(rows.dtype)
                    for which in range(len(self.call.states))
                )
                y, _ = run_float(
                    self.kind,
                    rows,
                    states,
                    limited_parameters(self.site, direction),
                    sizes,
                    direction.reverse,
                    self.fused,
                )
                if y.numel():
                    found += [*torch.aminmax(y), *torch.aminmax(self._initial(direction))]
        if found:
            quantizer.observe(torch.stack(found), self._cap(quantizer))

    def _initial(self, direction: Direction) -> Tensor:
        """Return the real values of an initial hidden state."""
        dtype = full(self.call.input).dtype
        return full(real_values(self.state(0, direction))).detach().to(dtype)

    def _cap(self, quantizer: Quantizer) -> float:
        limit = self.site.output_limit() if quantizer is self.site.output else None
        return math.inf if limit is None else limit

    def _states(
        self, direction: Direction, grid: Grid, hidden: HiddenGrid, rows: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the initial states on their grids; gradients pass where nothing saturates."""
        h = self.state(0, direction)
        with torch.no_grad():
            value = hidden.quantized(self.hidden_codes(h, grid)) * hidden.scale
        bounds = (hidden.low * hidden.scale, hidden.high * hidden.scale)
        states = [straight_through(value.to(rows.dtype), full(h).to(rows.dtype).clamp(*bounds))]
        if self.kind == "lstm":
            c = full(self.state(1, direction)).to(rows.dtype)
            with torch.no_grad():
                codes = cell_codes(c, hidden.rounding, self.site.platform_name)
            limit = formats_of(curves_of(self.site.platform_name)).cell_limit
            value = codes.to(rows.dtype) * CELL_STEP
            states.append(straight_through(value, c.clamp(-limit, limit)))
        return tuple(states)

    def joined(self, grid: Grid, outputs: Sequence[Tensor]) -> Tensor:
        """Concatenate real values."""
        y = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), -1)
        return with_tag(y.to(self.dtype), grid.quantizer.tag(grid.step, self.dtype))

    def between(self, x: Tensor) -> Tensor:
        """Drop out in training; what is left keeps its tag, as behind a dropout layer."""
        call = self.call
        if not (call.train and call.dropout > 0):
            return x
        return with_tag(F.dropout(x, call.dropout, True), _tag(x))

    def stacked(self, states: Sequence[tuple[Grid, Tensor]]) -> Tensor:
        """Bring real values to one step."""
        grid, h = states[-1]
        tag = grid.quantizer.tag(grid.step, self.dtype)
        if self.is_cell:
            return with_tag(h.to(self.dtype), tag)
        real = torch.stack([h for _, h in states])
        step, bits = self.common_grid([g for g, _ in states])
        if any(float(g.step) != step for g, _ in states):
            with torch.no_grad():
                codes = self._common_codes(states, step, bits)
            low, high = (code * step for code in code_limits(bits))
            real = straight_through(codes.to(real.dtype) * step, real.clamp(low, high))
            tag = dataclasses.replace(tag, reach=None)
        return with_tag(real.to(self.dtype), dataclasses.replace(tag, step=step, bits=bits))

    def _common_codes(
        self, states: Sequence[tuple[Grid, Tensor]], step: float, bits: int
    ) -> Tensor:
        tagged = [(g, with_tag(h, g.quantizer.tag(g.step, self.dtype))) for g, h in states]
        return integer_cat(
            [integer_codes(h).unsqueeze(0) for _, h in tagged],
            0,
            [float(g.step) for g, _ in states],
            step,
            bits,
            self.site.rounding,
            self.site.platform_name,
        )

    def cells(self, states: Sequence[Tensor]) -> Tensor:
        """Stack real values."""
        return super().cells([state.to(self.dtype) for state in states])


class CapturedFlow(RealFlow):
    """In a graph capture where steps cannot be read: the float cell, its hidden state rounded.

    It is at most some codes away from the integer cell, as other ops are in such a capture.
    """

    def layer(
        self, layer: int, directions: Sequence[Direction], x: Tensor
    ) -> tuple[Grid, list[Passed]]:
        """Run each direction in plain tensor operations, then move the range."""
        site, quantizer = self.site, self.quantizer(layer)
        step_x = _tag(x).step
        rows, sizes = to_rows(full(x), self.call.batch_first, self.sizes)
        maps = [projections(direction) for direction in directions]
        inputs = [ih.parameters(site, step_x) for ih, _, _ in maps]
        outputs = [None if hr is None else hr.parameters(site, CELL_STEP) for _, _, hr in maps]
        steps = [
            (ih.step, None if hr is None else hr.step)
            for ih, hr in zip(inputs, outputs, strict=True)
        ]
        grid = self.grid(quantizer, step_x, steps)
        low, high = quantizer.code_bounds(grid.step)
        rounding = quantizer.grid.rounding
        raw: list[Tensor] = []

        def rounded(h: Tensor) -> Tensor:
            raw.append(h.detach())
            return fake_quantize(h, grid.step, low, high, rounding)

        passed = []
        for direction, (_, recurrent, _), ih, hr in zip(
            directions, maps, inputs, outputs, strict=True
        ):
            hh = recurrent.parameters(site, grid.step)
            h = full(self.state(0, direction)).to(rows.dtype)
            states = [fake_quantize(h, grid.step, low, high, rounding)]
            if self.kind == "lstm":
                states.append(full(self.state(1, direction)).to(rows.dtype))
            parameters = Parameters(
                ih.weight, hh.weight, ih.bias, hh.bias, None if hr is None else hr.weight
            )
            y, after = run_float(
                self.kind,
                rows,
                tuple(states),
                parameters,
                sizes,
                direction.reverse,
                self.fused,
                rounded,
            )
            y = from_rows(y, self.call.batch_first, self.sizes, len(sizes))
            passed.append(Passed(y, after))
        if site.learning:
            quantizer.observe(torch.cat(raw), self._cap(quantizer))
        return grid, passed

    def stacked(self, states: Sequence[tuple[Grid, Tensor]]) -> Tensor:
        """Stack real values; several layers' steps are not compared in a capture."""
        grid, h = states[-1]
        tag = grid.quantizer.tag(grid.step, self.dtype)
        real = h if self.is_cell else torch.stack([h for _, h in states])
        return with_tag(real.to(self.dtype), tag)


def limited_parameters(site: Site, direction: Direction) -> Parameters:
    """Return the float weights of a direction within their range limits."""
    ih, hh, hr = (None if p is None else p.parameters(site) for p in projections(direction))
    assert ih is not None
    assert hh is not None
    return Parameters(ih.weight, hh.weight, ih.bias, hh.bias, None if hr is None else hr.weight)


def _weights(
    site: Site, step_x: float, step_h: float, ih: Quantized, hh: Quantized, hr: Quantized | None
) -> Weights:
    """Return the codes of weights that are real values on their grids."""
    with torch.no_grad():
        (ih_codes, bias_ih, scale_ih), (hh_codes, bias_hh, scale_hh) = (
            _codes(ih, step_x),
            _codes(hh, step_h),
        )
        hr_codes, _, scale_hr = (None, None, []) if hr is None else _codes(hr, CELL_STEP)
    return Weights(
        ih=ih_codes,
        hh=hh_codes,
        bias_ih=bias_ih,
        bias_hh=bias_hh,
        hr=hr_codes,
        scale_ih=scale_ih,
        scale_hh=scale_hh,
        scale_hr=scale_hr,
        bits=site.weight_bits,
    )


def _codes(parameters: Quantized, step_x: float) -> tuple[Tensor, Tensor | None, list[float]]:
    steps = torch.as_tensor(parameters.step)
    column = steps.view(-1, 1) if steps.dim() else steps
    weight = torch.round(parameters.weight / column)
    bias = None
    if parameters.bias is not None:
        bias = torch.round(parameters.bias.double() / (steps.double() * step_x))
    return weight, bias, [float(step) for step in steps.flatten().tolist()]


def _tag(x: Tensor) -> Tag:
    tag = tag_of(x)
    assert tag is not None  # operands and hidden states are tagged
    return tag


def finish_codes(site: Site, results: Results, tag: Tag, dtype: torch.dtype) -> Results:
    """Apply a moving output limit to codes, or leave the grid where the site has no output."""
    if site.output is None:
        y, h = (dequantize(x, float(_tag(x).step), "").to(dtype) for x in results[:2])
        return Results(site.limit_output(y), h, results.c)
    mine = _tag(results.y)
    asked = integer_result(site, float(mine.step), tag)
    low, high = (int(code) for code in site.output.code_bounds(float(mine.step)))
    if (asked.low, asked.high) == (low, high):
        return results
    y = integer_clamp(results.y, asked.low, asked.high, mine.bits, site.platform_name)
    return results._replace(y=with_tag(y, mine))


def finish_reals(site: Site, results: Results, dtype: torch.dtype) -> Results:
    """Apply the output limit to real values; one that is static has cut the range already."""
    if site.output is None:
        # Memory of their own: without a tag nothing may be taken for codes.
        y, h = (x.view_as(x) for x in results[:2])
        return Results(site.limit_output(y).to(dtype), h, results.c)
    limits = site.active_limits
    if limits is None or limits.output is None or limits.output.kind == "static":
        return results
    step = _tag(results.y).step
    y = site.output.round(site.limit_output(full(results.y)), step, dtype)
    return results._replace(y=y)
