"""A recurrent call in a graph capture in which no step can be read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_linger.core.fake_quantize import fake_quantize
from lightning_linger.core.tags import tag_held_by, with_tag
from lightning_linger.ops.folding import full
from lightning_linger.ops.recurrent.arithmetic import CELL_STEP
from lightning_linger.ops.recurrent.call import Direction
from lightning_linger.ops.recurrent.floating import run_float
from lightning_linger.ops.recurrent.flow import Grid, Passed, projections
from lightning_linger.ops.recurrent.gradients import Parameters
from lightning_linger.ops.recurrent.kernels import from_rows, to_rows
from lightning_linger.ops.recurrent.real_flow import RealFlow


class CapturedFlow(RealFlow):
    """In a graph capture where steps cannot be read: the float cell, its hidden state rounded.

    It is at most some codes away from the integer cell, as other ops are in such a capture.
    """

    def layer(
        self, layer: int, directions: Sequence[Direction], x: Tensor
    ) -> tuple[Grid, list[Passed]]:
        """Run each direction in plain tensor operations, then move the range."""
        site, quantizer = self.site, self.quantizer(layer)
        step_x = tag_held_by(x).step
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
