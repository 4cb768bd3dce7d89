"""`nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells: one call, one site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_linger.core.capture import capturing, without_autocast
from lightning_linger.core.config import QuantConfig
from lightning_linger.core.fake_quantize import straight_through
from lightning_linger.core.payload import real_values
from lightning_linger.core.platform import Platform
from lightning_linger.core.registry import Op, Part
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import WIDEST_OPERAND, Tag, tag_held_by, tag_of, with_tag
from lightning_linger.ops.recurrent.call import RecurrentCall, bind_cell, bind_layer, directions_of
from lightning_linger.ops.recurrent.captured_flow import CapturedFlow
from lightning_linger.ops.recurrent.code_flow import CodeFlow, finish_codes
from lightning_linger.ops.recurrent.floating import run_float
from lightning_linger.ops.recurrent.flow import Results, limited_parameters, part_name, projections
from lightning_linger.ops.recurrent.fusion import is_fused
from lightning_linger.ops.recurrent.kernels import from_rows, to_rows
from lightning_linger.ops.recurrent.real_flow import RealFlow, finish_reals


class RecurrentOp(Op):
    """A recurrent layer, or one step of it.

    Input, hidden state, weights and biases are quantized, gates and cell states are fixed-point
    numbers (:mod:`lightning_linger.ops.recurrent.arithmetic`). The hidden state feeds back, so its
    quantizer covers all time steps, and what follows the layer must not narrow it.

    In training the hidden state is rounded with the range of the steps before, then the range moves
    by what it was before rounding; the very first batch looks at a float pass.
    """

    needs_quantized_operand = False
    has_parameters = True
    takes_window = False
    learns_ranges = False
    exact_with_free_scales = True

    def learned_weights(self, call: RecurrentCall) -> Mapping[str, int | None]:
        """Every weight of every direction."""
        maps = [projections(d) for directions in directions_of(call) for d in directions]
        return {p.name: p.weight.shape[0] for three in maps for p in three if p is not None}

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.is_cell = kind.endswith("_cell")
        self.cell = kind.removesuffix("_cell")

    def bind(self, *args: Any, **kwargs: Any) -> RecurrentCall:
        """Bind the arguments of the torch function, padded or packed."""
        if self.is_cell:
            return bind_cell(*args, **kwargs)
        return bind_layer(self.kind, *args, **kwargs)

    def operands(self, call: RecurrentCall) -> list[Any]:
        """The input; initial states are brought to the grids of the states."""
        return [call.input]

    def parameters(self, call: RecurrentCall) -> list[Any]:
        """All weights and biases."""
        return [weight for weight in call.weights if weight is not None]

    def parts(
        self, call: RecurrentCall, config: QuantConfig, platform: Platform
    ) -> Mapping[str, Part]:
        """A quantizer per layer's hidden state, but for the site's own output."""
        bits = config.output_bits
        has_output = bits is not None and bits <= WIDEST_OPERAND
        return {part_name(layer): Part() for layer in range(call.num_layers - has_output)}

    def quantized_results(self, results: Sequence[Any]) -> Sequence[Any]:
        """Hidden states; a cell state is too wide for an operand."""
        return results[:-1] if self.cell == "lstm" else results

    # --- float ------------------------------------------------------------------------------

    def run_float(self, site: Site, call: RecurrentCall) -> Any:
        """Run with limited weights and output."""
        if site.active_limits is None:
            return NotImplemented
        if is_fused(site) or self.is_cell:
            return self._limited(site, self._torch_call(site, call))
        return self._limited(site, self._float_steps(site, call))

    def _torch_call(self, site: Site, call: RecurrentCall) -> Any:
        """Call torch's own function with limited weights."""
        weights: list[Tensor] = []
        for directions in directions_of(call):
            for direction in directions:
                p = limited_parameters(site, direction)
                every = (p.ih, p.hh, p.bias_ih, p.bias_hh, p.hr)
                weights += [weight for weight in every if weight is not None]
        function = getattr(torch, self.kind)
        states = call.states if self.cell == "lstm" else call.states[0]
        if self.is_cell:
            return function(call.input, states, *weights)
        flags = (call.has_biases, call.num_layers, call.dropout, call.train, call.bidirectional)
        if call.batch_sizes is not None:
            return function(call.input, call.batch_sizes, states, weights, *flags)
        return function(call.input, states, weights, *flags, call.batch_first)

    def _float_steps(self, site: Site, call: RecurrentCall) -> Any:
        """Run step by step in plain tensor operations."""
        flow = RealFlow(site, self.cell, call, self.is_cell)
        x, finals = call.input, []
        for layer, directions in enumerate(directions_of(call)):
            rows, sizes = to_rows(x, call.batch_first, flow.sizes)
            outputs = []
            for direction in directions:
                states = tuple(flow.state(which, direction) for which in range(len(call.states)))
                y, after = run_float(
                    self.cell,
                    rows,
                    states,
                    limited_parameters(site, direction),
                    sizes,
                    direction.reverse,
                    fused=False,
                )
                outputs.append(from_rows(y, call.batch_first, flow.sizes, len(sizes)))
                finals.append(after)
            x = torch.cat(outputs, -1)
            if call.train and call.dropout > 0 and layer + 1 < call.num_layers:
                x = torch.dropout(x, call.dropout, True)
        return (x, *(torch.stack(list(states)) for states in zip(*finals, strict=True)))

    def _limited(self, site: Site, result: Any) -> Any:
        if isinstance(result, Tensor):
            return site.limit_output(result)
        return (site.limit_output(result[0]), *result[1:])

    # --- quantized --------------------------------------------------------------------------

    def run_fake(self, site: Site, call: RecurrentCall) -> Any:
        """Take the integer cells' values, with the gradient of the float cells."""
        with without_autocast(call.input.device.type):
            x = site.operand(0, call.input)
            if x is None:
                return NotImplemented
            tag = tag_held_by(x)
            return self._in_order(self._fake(site, call, x, tag))

    def run_integer(self, site: Site, call: RecurrentCall) -> Any:
        """Run on the integers."""
        x = site.operand(0, call.input)
        if x is None:
            return NotImplemented
        tag = tag_held_by(x)
        return self._in_order(self._codes(site, call, x, tag))

    def _codes(self, site: Site, call: RecurrentCall, x: Tensor, tag: Tag) -> Results:
        results = CodeFlow(site, self.cell, call, self.is_cell).run(x)
        return finish_codes(site, results, tag, tag.dtype)

    def _fake(self, site: Site, call: RecurrentCall, x: Tensor, tag: Tag) -> Results:
        wanted = (call.input, *call.states, *call.weights)
        differentiable = torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in wanted
        )
        if capturing():
            return self._captured(site, call, x, tag, differentiable)
        if not site.training and not differentiable:
            with torch.no_grad():
                return _as_reals(self._codes(site, call, x, tag))
        results = RealFlow(site, self.cell, call, self.is_cell).run(x)
        return finish_reals(site, results, tag.dtype)

    def _captured(
        self, site: Site, call: RecurrentCall, x: Tensor, tag: Tag, differentiable: bool
    ) -> Results:
        flow = CodeFlow(site, self.cell, call, self.is_cell)
        exact = None
        if not site.training and flow.ready(x):
            with torch.no_grad():
                exact = _as_reals(self._codes(site, call, x, tag))
            if not differentiable:
                return exact
        results = CapturedFlow(site, self.cell, call, self.is_cell).run(x)
        results = finish_reals(site, results, tag.dtype)
        if exact is None:
            return results
        c = exact.c
        if c is not None and results.c is not None:
            c = _carried(c, results.c)
        return Results(_carried(exact.y, results.y), _carried(exact.h, results.h), c)

    def _in_order(self, results: Results) -> Any:
        """Return results as the torch function does."""
        if self.is_cell:
            return results.y if results.c is None else (results.y, results.c)
        return (results.y, results.h) if results.c is None else tuple(results)


def _as_reals(results: Results) -> Results:
    """Return real values, tagged as the codes are."""

    def real(x: Tensor) -> Tensor:
        tag, value = tag_of(x), real_values(x)
        return value if tag is None else with_tag(value, tag)

    return Results(real(results.y), real(results.h), None if results.c is None else real(results.c))


def _carried(value: Tensor, carrier: Tensor) -> Tensor:
    """Return a value with its tag and the gradient of another tensor."""
    tag, y = tag_of(value), straight_through(value, carrier)
    return y if tag is None else with_tag(y, tag)
