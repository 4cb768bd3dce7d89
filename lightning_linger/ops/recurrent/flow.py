"""A recurrent call through its layers and directions: what all number systems share.

The quantizers of a call: one per layer for its hidden state, shared by both directions; that of the
last layer is the site's output. The last hidden states of several layers have one step, the
coarsest, so that they are one tensor.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_linger.core.capture import capturing
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.integer import requantize
from lightning_linger.core.payload import integer_codes, real_values
from lightning_linger.core.quantizer import Quantizer
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import WIDEST_OPERAND, Tag, tag_of, with_tag
from lightning_linger.ops.folding import full
from lightning_linger.ops.projection import Projection
from lightning_linger.ops.recurrent.arithmetic import (
    CELL_STEP,
    UNIT,
    HiddenGrid,
    curve_tables,
    curves_of,
)
from lightning_linger.ops.recurrent.call import Direction, RecurrentCall, directions_of
from lightning_linger.ops.recurrent.fusion import compiling_steps, is_compiled, is_fused
from lightning_linger.ops.recurrent.gradients import Parameters
from lightning_linger.ops.recurrent.packing import refuse_in_capture

CURVE_TABLES = "curve tables"
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


class Flow(ABC):
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

    @abstractmethod
    def layer(
        self, layer: int, directions: Sequence[Direction], x: Tensor
    ) -> tuple[Grid, list[Passed]]:
        """Run the directions of one layer."""

    @abstractmethod
    def joined(self, grid: Grid, outputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs of the directions side by side, tagged."""

    def between(self, x: Tensor) -> Tensor:
        """Apply what stands between two layers."""
        return x

    @abstractmethod
    def stacked(self, states: Sequence[tuple[Grid, Tensor]]) -> Tensor:
        """Return the last hidden states as one tensor, tagged."""

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
            found: Tensor | None = site.prepared.get(CURVE_TABLES)
            return found
        tables = curve_tables(site.rounding, device)
        if not site.training:
            site.prepared[CURVE_TABLES] = tables
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


def limited_parameters(site: Site, direction: Direction) -> Parameters:
    """Return the float weights of a direction within their range limits."""
    ih, hh, hr = (None if p is None else p.parameters(site) for p in projections(direction))
    assert ih is not None
    assert hh is not None
    return Parameters(ih.weight, hh.weight, ih.bias, hh.bias, None if hr is None else hr.weight)
