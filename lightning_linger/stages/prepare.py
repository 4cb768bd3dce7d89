"""Finding the sites of a model, and taking everything off again."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_linger.ops  # noqa: F401 - fills the op table
from lightning_linger.core.errors import ConfigError, NonFiniteError, UnsupportedError
from lightning_linger.core.graph import Graph, Run
from lightning_linger.core.instrumentation import STATE_NAME, Instrumentation, is_prepared
from lightning_linger.core.modes import kept_modes
from lightning_linger.core.recorder import Recorder, WholeModelRan


def prepare(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    example_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Find the sites of a model; nothing is switched on, and no result changes.

    The model runs twice, as in evaluation and as in training, without leaving a trace: random
    state, buffers and modes are put back.

    Args:
        model: Any module; it is instrumented in place.
        example_inputs: Positional inputs of one forward, on the model's device.
        example_kwargs: Keyword inputs.

    Returns:
        The model.

    Raises:
        ConfigError: If the inputs are empty, or the model is prepared already.
        NonFiniteError: If an input holds NaN or +inf; -inf is what attention masks hold.
        UnsupportedError: If the model makes no call that can be quantized.
    """
    if not isinstance(example_inputs, tuple):
        msg = (
            "`example_inputs` is a tuple of positional arguments. "
            f"Found: {type(example_inputs).__name__}. Did you mean `(x,)`?"
        )
        raise ConfigError(msg)
    check_example((example_inputs, example_kwargs))
    return prepare_by(model, lambda: model(*example_inputs, **(example_kwargs or {})))


def prepare_by(
    model: nn.Module, forward: Callable[[], Any], stop_after_whole: bool = False
) -> nn.Module:
    """Find the sites by running ``forward``, which calls the model or some of its submodules.

    Args:
        model: Instrumented in place.
        forward: For example a training step.
        stop_after_whole: Leave ``forward`` as soon as the model itself has returned.
    """
    with _installing(model) as instrumentation:
        runs = [
            _record(model, instrumentation, forward, training, stop_after_whole)
            for training in (False, True)
        ]
        instrumentation.create_sites(Graph(runs), model)
        if not instrumentation.sites:
            msg = (
                f"{type(model).__name__} calls no op that can be quantized in its forward. Check "
                "that the example inputs reach its layers, and that the layers are called through "
                "modules of the model."
            )
            raise UnsupportedError(msg)
    return model


def prepare_from(model: nn.Module, graph: Graph) -> nn.Module:
    """Make the sites of a dataflow that was recorded on another instance of the model's class."""
    with _installing(model) as instrumentation:
        instrumentation.create_sites(graph, model)
    return model


@contextlib.contextmanager
def _installing(model: nn.Module) -> Iterator[Instrumentation]:
    """Instrument a model, and take everything off again if the sites cannot be made."""
    if is_prepared(model):
        msg = "the model is prepared already. Call `linger.strip(model)` to start over."
        raise ConfigError(msg)
    instrumentation = Instrumentation(model)
    try:
        yield instrumentation
    except BaseException:
        instrumentation.detach_hooks()
        raise
    model.add_module(STATE_NAME, instrumentation)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    instrumentation.to(device)


def strip(model: nn.Module) -> nn.Module:
    """Take every hook, site and quantizer off; what remains is the float model. Returns it."""
    if is_prepared(model):
        instrumentation: Any = getattr(model, STATE_NAME)
        instrumentation.detach_hooks()
        delattr(model, STATE_NAME)
    return model


def check_example(example: Any) -> None:
    """Refuse empty and non-finite example tensors before they become scales."""
    for leaf in tree_leaves(example):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.numel() == 0:
            msg = (
                f"an example input of shape {tuple(leaf.shape)} is empty. Pass a batch with at "
                "least one sample."
            )
            raise ConfigError(msg)
        # Attention masks hold -inf.
        if leaf.dtype.is_floating_point and not (leaf < math.inf).all():
            msg = (
                f"an example input of shape {tuple(leaf.shape)} holds NaN or infinity. Pass clean "
                "data: ranges are derived from it."
            )
            raise NonFiniteError(msg)


def _record(
    model: nn.Module,
    instrumentation: Instrumentation,
    forward: Callable[[], Any],
    training: bool,
    stop_after_whole: bool,
) -> Run:
    constants = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    recorder = Recorder(constants, stop_after_whole)
    with no_trace(model):
        for module in model.modules():
            # Batch norms stay in evaluation mode: any batch size works and statistics stay put.
            keeps_statistics = isinstance(module, nn.modules.batchnorm._BatchNorm)
            module.training = training and not keeps_statistics
        instrumentation.recorder = recorder
        instrumentation.calls = []
        try:
            # A part that is compiled would hide its calls.
            with contextlib.suppress(WholeModelRan), torch.compiler.set_stance("force_eager"):
                forward()
        finally:
            instrumentation.recorder = None
            calls, instrumentation.calls = instrumentation.calls, None
    if calls and instrumentation.example is None:
        paths = {id(module): path for path, module in model.named_modules()}
        instrumentation.note_example(paths[id(calls[0].module)], calls[0])
    return recorder.run


@contextlib.contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Put back random states, buffers and training modes on leaving."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with kept_modes(model), torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
