"""A recurrent call on codes, through the integer ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.integer import dequantize
from lightning_linger.core.payload import integer_codes, real_values
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_held_by, tag_of, with_tag
from lightning_linger.ops.activation import integer_clamp
from lightning_linger.ops.cat import integer_cat
from lightning_linger.ops.folding import full
from lightning_linger.ops.recurrent.arithmetic import CELL_STEP, UNIT, curves_of
from lightning_linger.ops.recurrent.call import Direction, directions_of
from lightning_linger.ops.recurrent.cells import Weights
from lightning_linger.ops.recurrent.flow import (
    CURVE_TABLES,
    Flow,
    Grid,
    Passed,
    Results,
    projections,
)
from lightning_linger.ops.recurrent.kernels import integer_gru, integer_lstm, integer_rnn
from lightning_linger.ops.results import integer_result


class CodeFlow(Flow):
    """On codes, through the integer ops."""

    def layer(
        self, layer: int, directions: Sequence[Direction], x: Tensor
    ) -> tuple[Grid, list[Passed]]:
        """Call the integer op of each direction."""
        site, quantizer = self.site, self.quantizer(layer)
        tag = tag_held_by(x)
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
                bits=site.weights.bits,
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
            or CURVE_TABLES in self.site.prepared
        )
        return has_curves and isinstance(tag_held_by(x).step, float)


def finish_codes(site: Site, results: Results, tag: Tag, dtype: torch.dtype) -> Results:
    """Apply a moving output limit to codes, or leave the grid where the site has no output."""
    if site.output is None:
        y, h = (dequantize(x, float(tag_held_by(x).step), "").to(dtype) for x in results[:2])
        return Results(site.limit_output(y), h, results.c)
    mine = tag_held_by(results.y)
    asked = integer_result(site, float(mine.step), tag)
    low, high = (int(code) for code in site.output.code_bounds(float(mine.step)))
    if (asked.low, asked.high) == (low, high):
        return results
    y = integer_clamp(results.y, asked.low, asked.high, mine.bits, site.platform_name)
    return results._replace(y=with_tag(y, mine))
