"""A recurrent call on real values of codes, with gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.fake_quantize import straight_through_within
from lightning_linger.core.integer import code_limits
from lightning_linger.core.payload import integer_codes, real_values
from lightning_linger.core.quantizer import Quantizer
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by, with_tag
from lightning_linger.ops.cat import integer_cat
from lightning_linger.ops.folding import full
from lightning_linger.ops.parameters import Parameters as Quantized
from lightning_linger.ops.recurrent.arithmetic import CELL_STEP, HiddenGrid, curves_of, formats_of
from lightning_linger.ops.recurrent.call import Direction
from lightning_linger.ops.recurrent.cells import Numbers, Weights
from lightning_linger.ops.recurrent.floating import run_float
from lightning_linger.ops.recurrent.flow import (
    Flow,
    Grid,
    Passed,
    Results,
    limited_parameters,
    projections,
)
from lightning_linger.ops.recurrent.gradients import Layer, Parameters, run_layer
from lightning_linger.ops.recurrent.kernels import cell_codes, from_rows, to_rows


class RealFlow(Flow):
    """On real values of codes, with gradients; moves the ranges of hidden states in training."""

    def layer(
        self, layer: int, directions: Sequence[Direction], x: Tensor
    ) -> tuple[Grid, list[Passed]]:
        """Run each direction with gradients, then move the range."""
        site, quantizer = self.site, self.quantizer(layer)
        tag = tag_held_by(x)
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
        value, real = value.to(rows.dtype), full(h).to(rows.dtype)
        states = [straight_through_within(value, real, *bounds)]
        if self.kind == "lstm":
            c = full(self.state(1, direction)).to(rows.dtype)
            with torch.no_grad():
                codes = cell_codes(c, hidden.rounding, self.site.platform_name)
            limit = formats_of(curves_of(self.site.platform_name)).cell_limit
            value = codes.to(rows.dtype) * CELL_STEP
            states.append(straight_through_within(value, c, -limit, limit))
        return tuple(states)

    def joined(self, grid: Grid, outputs: Sequence[Tensor]) -> Tensor:
        """Concatenate real values, behind which their gradient is rounded."""
        y = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), -1)
        y = grid.quantizer.with_rounded_gradient(y.to(self.dtype))
        return with_tag(y, grid.quantizer.tag(grid.step, self.dtype))

    def between(self, x: Tensor) -> Tensor:
        """Drop out in training; what is left keeps its tag, as behind a dropout layer."""
        call = self.call
        if not (call.train and call.dropout > 0):
            return x
        return with_tag(F.dropout(x, call.dropout, True), tag_held_by(x))

    def stacked(self, states: Sequence[tuple[Grid, Tensor]]) -> Tensor:
        """Bring real values to one step."""
        grid, h = states[-1]
        tag = grid.quantizer.tag(grid.step, self.dtype)
        if self.is_cell:
            # What a cell returns is joined, too.
            return with_tag(h.to(self.dtype), tag)
        real = torch.stack([h for _, h in states])
        step, bits = self.common_grid([g for g, _ in states])
        if any(float(g.step) != step for g, _ in states):
            with torch.no_grad():
                codes = self._common_codes(states, step, bits)
            low, high = (code * step for code in code_limits(bits))
            real = straight_through_within(codes.to(real.dtype) * step, real, low, high)
            tag = dataclasses.replace(tag, reach=None)
        real = grid.quantizer.with_rounded_gradient(real.to(self.dtype))
        return with_tag(real, dataclasses.replace(tag, step=step, bits=bits))

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
        bits=site.weights.bits,
    )


def _codes(parameters: Quantized, step_x: float) -> tuple[Tensor, Tensor | None, list[float]]:
    steps = torch.as_tensor(parameters.step)
    column = steps.view(-1, 1) if steps.dim() else steps
    weight = torch.round(parameters.weight / column)
    bias = None
    if parameters.bias is not None:
        bias = torch.round(parameters.bias.double() / (steps.double() * step_x))
    return weight, bias, [float(step) for step in steps.flatten().tolist()]


def finish_reals(site: Site, results: Results, dtype: torch.dtype) -> Results:
    """Apply the output limit to real values; one that is static has cut the range already."""
    if site.output is None:
        # Memory of their own: without a tag nothing may be taken for codes.
        y, h = (x.view_as(x) for x in results[:2])
        return Results(site.limit_output(y).to(dtype), h, results.c)
    limits = site.active_limits
    if limits is None or limits.output is None or limits.output.kind == "static":
        return results
    step = tag_held_by(results.y).step
    y = site.output.round(site.limit_output(full(results.y)), step, dtype)
    return results._replace(y=y)
