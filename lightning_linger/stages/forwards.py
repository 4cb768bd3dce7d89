"""Repeating forwards on calibration data, and looking at what single layers get in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.calls import Event, Tap
from lightning_linger.core.capture import without_autocast
from lightning_linger.core.distributed import sum_over_ranks
from lightning_linger.core.errors import ConfigError, NotReadyError
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.modes import kept_modes
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_of
from lightning_linger.ops.folding import full
from lightning_linger.ops.parameters import Parameters
from lightning_linger.ops.weighted import WeightedOp, with_image
from lightning_linger.stages.calibrate import run_batch
from lightning_linger.stages.prepare import check_example

# Runs the model, or a part of it, on one batch.
Forward = Callable[[], Any]


def forwards_of(model: nn.Module, loader: Iterable[Any]) -> list[Forward]:
    """Return a forward for each batch of a loader, which is read once.

    Args:
        model: The model.
        loader: Batches as :func:`lightning_linger.calibrate` takes them. All are kept.

    Raises:
        ConfigError: If there is none.
        NonFiniteError: If one holds NaN or infinity.
    """
    batches = list(loader)
    if not batches:
        msg = "the calibration loader gave no batch."
        raise ConfigError(msg)
    check_example(batches)
    return [partial(run_batch, model, batch) for batch in batches]


def require_quantized(model: nn.Module) -> Instrumentation:
    """Return the instrumentation of a model that is quantized and knows ranges.

    Raises:
        NotReadyError: If it does not.
    """
    instrumentation = instrumentation_of(model)
    ready = any(site.quantized and _knows_ranges(site) for site in instrumentation.sites)
    if not instrumentation.switches.quantize or not ready:
        msg = (
            "the model is not quantized yet, or has seen no range. Call `linger.calibrate(model, "
            "batches)` first, or train past the start of QuantizeCallback."
        )
        raise NotReadyError(msg)
    return instrumentation


# They move parameters so that the quantized model comes near the float one.
_MOVE_AWAY = ("adaround", "correct_bias")


def require_float_reference(instrumentation: Instrumentation, name: str) -> None:
    """Check that the parameters are still those of the float model that is to be approached.

    Args:
        instrumentation: Of the model.
        name: What is about to take them as a reference.

    Raises:
        ConfigError: If an algorithm has moved them away from it.
    """
    for earlier in _MOVE_AWAY:
        if earlier in instrumentation.applied:
            msg = (
                f"`{name}` brings the quantized model near the float one, and `{earlier}` has "
                "changed what would be taken for it. Use one of `adaround` and `correct_bias`, "
                "once; to start over, load the float weights into a new model."
            )
            raise ConfigError(msg)


def _knows_ranges(site: Site) -> bool:
    return all(quantizer.known for quantizer in site.quantizers())


def why_not_quantized(site: Site) -> str | None:
    """Say why a layer with weights has no rounding of its own to look at, if so."""
    if not site.quantized:
        return f"stays float: {site.why_float}"
    if not isinstance(site.op, WeightedOp):
        return f"{site.op.kind} is no convolution or linear layer"
    return None if _knows_ranges(site) else "has seen no range yet"


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the model as in evaluation, without gradients and uncompiled; put modes back."""
    try:
        with kept_modes(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.eval()
            yield
    finally:
        instrumentation_of(model).thaw()


@contextlib.contextmanager
def _tapped(instrumentation: Instrumentation, tap: Tap, system: str) -> Iterator[None]:
    before = instrumentation.tap, instrumentation.switches.system
    instrumentation.tap, instrumentation.switches.system = tap, system
    try:
        yield
    finally:
        instrumentation.tap, instrumentation.switches.system = before


class _ReachedError(Exception):
    """The site of interest has run, and nothing behind it matters."""


def observe_floats(
    instrumentation: Instrumentation, forward: Forward, see: Callable[[Site, Any], None]
) -> None:
    """Run a forward in float, and show every call of a site.

    Args:
        instrumentation: Of the model.
        forward: The forward.
        see: Called with each site and its bound call.
    """
    with _tapped(instrumentation, lambda event: see(event.site, event.call), "float"):
        forward()


def call_of(
    instrumentation: Instrumentation, site: Site, forward: Forward, system: str
) -> Any | None:
    """Run a forward up to a site; return the bound call of it, None if it is not reached.

    Args:
        instrumentation: Of the model.
        site: The site.
        forward: The forward.
        system: ``float`` or ``fake``.
    """
    found: list[Any] = []

    def tap(event: Event) -> None:
        if event.site is site:
            found.append(event.call)
            raise _ReachedError

    with _tapped(instrumentation, tap, system), contextlib.suppress(_ReachedError):
        forward()
    return found[0] if found else None


# --- one layer ----------------------------------------------------------------------------------


def layer_op(site: Site) -> WeightedOp:
    """Return the op of a site that is a convolution or a linear layer."""
    assert isinstance(site.op, WeightedOp)  # `why_not_quantized` has refused all others
    return site.op


def result_of(site: Site, call: Any, x: Tensor, parameters: Parameters) -> Tensor:
    """Return what a layer gives before anything limits, clamps or rounds it.

    Args:
        site: The layer.
        call: A bound call of it.
        x: Its input.
        parameters: Its weight and bias.
    """
    with without_autocast(x.device.type):
        return layer_op(site).apply(call, x, parameters.weight, parameters.bias)


def float_result(site: Site, call: Any) -> Tensor:
    """Return what a layer gives, folded and limited, before anything is rounded."""
    call = with_image(site, call)
    parameters = layer_op(site).parameters_in_use(site, call, None)
    return result_of(site, call, full(call.input), parameters)


def quantized_input(site: Site, call: Any) -> tuple[Tensor, Scalar] | None:
    """Return the input of a layer on its grid, and its step; None if it is not quantized."""
    x = site.operand(0, with_image(site, call).input)
    tag = None if x is None else tag_of(x)
    return None if x is None or tag is None else (full(x), tag.step)


class ChannelMean:
    """The mean of a layer's results by channel, over all forwards and all processes.

    Args:
        site: The layer.
    """

    def __init__(self, site: Site) -> None:
        self._dim = layer_op(site).channel_dim
        channels = layer_op(site).weight_channels(site.recorded_call)
        self._total = torch.zeros(channels, dtype=torch.float64)
        self._count = 0

    def add(self, y: Tensor) -> None:
        """Count a result in."""
        rows = y.double().movedim(self._dim, -1).reshape(-1, y.shape[self._dim])
        self._total = self._total.to(rows.device) + rows.sum(0)
        self._count += rows.shape[0]

    def value(self) -> Tensor | None:
        """Return float64 ``[C]``, None if there was no result; every process has to ask."""
        count = sum_over_ranks(self._total.new_tensor(float(self._count)))
        total = sum_over_ranks(self._total)
        return total / count if count > 0 else None
