"""Where integers, fake-quant and float differ, site by site."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_linger.core.calls import Event, Tap
from lightning_linger.core.fake_quantize import Bound
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.payload import real_values
from lightning_linger.core.quantizer import Window
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of
from lightning_linger.simulate.integer import number_system
from lightning_linger.simulate.metrics import (
    Divergence,
    DivergenceRow,
    OutputError,
    QuantError,
    QuantErrorRow,
)
from lightning_linger.simulate.samples import ValueSamples

Forward = Callable[[], Any]


def divergence(model: nn.Module, batch: Any) -> list[DivergenceRow]:
    """Compare the integer model with the fake-quant and the float one on a batch, per site.

    Args:
        model: A quantized model in evaluation mode.
        batch: A tensor, a tuple or list whose first entry is the input, or a mapping of keyword
            inputs.

    Returns:
        One row per site, in execution order.
    """
    meter = Divergence(measured_sites(model)).to(_device(model))
    measure_divergence(model, forward_of(model, batch), meter)
    return meter.rows()


def quant_error(model: nn.Module, batch: Any) -> list[QuantErrorRow]:
    """Compare the fake-quant model with the float one on a batch, per site."""
    meter = QuantError(measured_sites(model)).to(_device(model))
    measure_quant_error(model, forward_of(model, batch), meter)
    return meter.rows()


def main_result(result: Any) -> Tensor | None:
    """Return the first activation among the results of an op, which is what is compared."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and (leaf.dtype.is_floating_point or tag_of(leaf) is not None):
            return leaf
    return None


def measured_sites(model: nn.Module) -> list[str]:
    """Return the keys of the sites that are compared."""
    return [site.key for site in instrumentation_of(model).sites if site.quantized]


def forward_of(model: nn.Module, batch: Any) -> Forward:
    """Return a callable that runs the model on a batch."""
    if isinstance(batch, Mapping):
        return lambda: model(**batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return lambda: model(batch[0])
    return lambda: model(batch)


@torch.no_grad()
def measure_divergence(
    model: nn.Module, forward: Forward, meter: Divergence, outputs: OutputError | None = None
) -> None:
    """Run ``forward`` in all three number systems and add what differs to ``meter``.

    Args:
        model: A quantized model in evaluation mode.
        forward: Runs the model and returns its output.
        meter: Takes the differences per site.
        outputs: Takes the integer output against the fake-quant one.
    """
    instrumentation = instrumentation_of(model)
    references, _ = _results(model, forward, "float")
    integers, returned = _results(model, forward, "integer")

    def compare(event: Event) -> None:
        key, fake = event.site.key, main_result(event.result)
        if fake is None or not event.site.quantized or _passes_through(event):
            return
        if key not in integers or key not in references:
            return
        isolated = _isolated(instrumentation, event)
        reference = main_result(event.run_float())
        if isolated is None or reference is None:
            return
        tag = tag_of(fake)
        window = _window(event.site)
        meter.update(
            key,
            tag.step if tag is not None else 1.0,
            fake,
            integers[key],
            isolated,
            _inside(references[key], window),
            _inside(reference, window),
        )

    with number_system(model, "fake"), _tapped(instrumentation, compare):
        _compare_outputs(outputs, returned, forward())


@torch.no_grad()
def measure_quant_error(
    model: nn.Module,
    forward: Forward,
    meter: QuantError,
    outputs: OutputError | None = None,
    samples: ValueSamples | None = None,
) -> None:
    """Run ``forward`` in float and in fake-quant and add the errors to ``meter``.

    Args:
        model: A quantized model in evaluation mode.
        forward: Runs the model and returns its output.
        meter: Takes the errors per site.
        outputs: Takes the fake-quant output against the float one.
        samples: Takes values of each site.
    """
    instrumentation = instrumentation_of(model)
    references, returned = _results(model, forward, "float")

    def compare(event: Event) -> None:
        key, result = event.site.key, main_result(event.result)
        tag = tag_of(result)
        if result is None or tag is None or _passes_through(event) or key not in references:
            return
        alone = main_result(event.run_float())
        if alone is None:
            return
        step = tag.step
        low: Bound = -(2 ** (tag.bits - 1))
        high: Bound = 2 ** (tag.bits - 1) - 1
        if event.site.output is not None:
            low, high = event.site.output.code_bounds(step)
        window = _window(event.site)
        reference = _inside(references[key], window)
        meter.update(key, result, reference, _inside(alone, window), low * step, high * step, step)
        if samples is not None:
            samples.add(key, reference, result, low * step, high * step)

    with number_system(model, "fake"), _tapped(instrumentation, compare):
        _compare_outputs(outputs, forward(), returned)


def _results(model: nn.Module, forward: Forward, system: str) -> tuple[dict[str, Tensor], Any]:
    """Return the result of every site, and what the model returned."""
    found: dict[str, Tensor] = {}

    def keep(event: Event) -> None:
        result = main_result(event.result)
        if result is not None:
            # A clone: a later in-place op of the model must not change what is compared.
            found[event.site.key] = real_values(result).detach().clone()

    with number_system(model, system), _tapped(instrumentation_of(model), keep):
        returned = forward()
    return found, returned


def _compare_outputs(meter: OutputError | None, result: Any, reference: Any) -> None:
    if meter is None:
        return
    ours, right = main_result(result), main_result(reference)
    if ours is not None and right is not None:
        meter.update(real_values(ours), real_values(right))


def _isolated(instrumentation: Instrumentation, event: Event) -> Tensor | None:
    """Run the integer op on the operands of a fake-quant event."""
    switches = instrumentation.switches
    switches.system = "integer"
    try:
        result = event.site.op.run_integer(event.site, event.call)
    finally:
        switches.system = "fake"
    result = main_result(result)
    return None if result is None else real_values(result)


def _passes_through(event: Event) -> bool:
    return event.result is event.call[0]


def _window(site: Site) -> Window:
    return site.output.window if site.output is not None else Window()


def _inside(x: Tensor, window: Window) -> Tensor:
    """Clamp a float reference as the activation does that was merged into the quantizer."""
    return x.clamp(window.low, window.high)


@contextlib.contextmanager
def _tapped(instrumentation: Instrumentation, tap: Tap) -> Iterator[None]:
    before = instrumentation.tap
    instrumentation.tap = tap
    try:
        yield
    finally:
        instrumentation.tap = before


def _device(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))
