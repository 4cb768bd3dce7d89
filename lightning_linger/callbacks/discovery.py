"""Running the model once before training, without a trace, to find its sites."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics import Metric

from lightning_linger.callbacks._compat import misconfiguration
from lightning_linger.core.instrumentation import is_prepared
from lightning_linger.stages.prepare import check_example, no_trace, prepare_by

_HINT = (
    "HINT: set `self.example_input_array` (a tensor, a tuple of positional or a dict of keyword "
    "inputs of `forward`) in the LightningModule."
)


def prepare_module(trainer: Any, module: Any, stage: str) -> None:
    """Find the sites of a LightningModule from ``example_input_array`` or the first batch."""
    if is_prepared(module):
        return
    example = getattr(module, "example_input_array", None)
    if example is not None:
        check_example(example)
        with silent(module):
            prepare_by(module, lambda: _forward(module, example))
        return
    if not module.automatic_optimization:
        msg = (
            "With manual optimization the sites cannot be found by running `training_step`. "
            + _HINT
        )
        raise misconfiguration(msg)
    with no_trace(module):
        batch = _first_batch(trainer, module, stage)
    check_example(batch)
    step = step_of(module, stage)
    with silent(module):
        prepare_by(module, lambda: run_step(step, batch), stop_after_whole=True)


def _forward(module: nn.Module, example: Any) -> Any:
    if isinstance(example, dict):
        return module(**example)
    if isinstance(example, tuple):
        return module(*example)
    return module(example)


def step_of(module: Any, stage: str) -> Callable[..., Any]:
    """Return the step that a LightningModule runs in a stage of the Trainer."""
    names = {"fit": "training_step", "validate": "validation_step", "test": "test_step"}
    step: Callable[..., Any] = getattr(module, names.get(stage, "predict_step"))
    return step


def run_step(step: Callable[..., Any], batch: Any) -> Any:
    """Call a step as Lightning calls it for the first batch."""
    takes_index = len(inspect.signature(step).parameters) > 1
    return step(batch, 0) if takes_index else step(batch)


def _first_batch(trainer: Any, module: Any, stage: str) -> Any:
    batch = tree_map(_peek, _loaders(trainer, stage))
    return module._apply_batch_transfer_handler(batch, device=module.device, dataloader_idx=0)


def _peek(loader: Any) -> Any:
    """Read the first batch of a loader that will be read again from its start."""
    with undisturbed(loader):
        return _first(loader)


def _first(loader: Any) -> Any:
    iterator = iter(loader)
    if iterator is loader:
        msg = (
            "The data loader is a one-shot stream: reading an example batch from it would lose the "
            "batch. " + _HINT
        )
        raise misconfiguration(msg)
    try:
        return next(iterator)
    except StopIteration:
        msg = "The data loader gave no batch to find the sites with. " + _HINT
        raise misconfiguration(msg) from None


@contextlib.contextmanager
def undisturbed(loader: Any) -> Iterator[None]:
    """Put a loader that can resume, and generators of its own, back to where they were."""
    resumable = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    before = copy.deepcopy(loader.state_dict()) if resumable else None
    states = [(generator, generator.get_state()) for generator in generators_of(loader)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        if resumable:
            loader.load_state_dict(before)


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the random generators that a loader and its samplers have for themselves."""
    sampler = getattr(loader, "sampler", None)
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    found = {id(part): getattr(part, "generator", None) for part in (loader, sampler, inner)}
    return [generator for generator in found.values() if isinstance(generator, torch.Generator)]


def _loaders(trainer: Any, stage: str) -> Any:
    """Return the loader, or for training a collection of loaders that are read side by side."""
    loops = {
        "fit": lambda: trainer.fit_loop,
        "validate": lambda: trainer.validate_loop,
        "test": lambda: trainer.test_loop,
        "predict": lambda: trainer.predict_loop,
    }
    source = loops[stage]()._data_source
    if not source.is_defined():
        msg = f"No data loader to take an example batch from in stage {stage!r}. " + _HINT
        raise misconfiguration(msg)
    loader = source.dataloader()
    # What a `CombinedLoader` combines.
    loader = getattr(loader, "iterables", loader)
    if stage != "fit":
        return next(iter(tree_leaves(loader)), loader)
    return loader


@contextlib.contextmanager
def silent(module: Any) -> Iterator[None]:
    """Swallow logging; put torchmetrics, and lists that a step appends to, back as they were."""
    containers = {
        name: (value, copy.copy(value))
        for name, value in module.__dict__.items()
        if type(value) in (list, dict, set) and not name.startswith("_")
    }
    metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
    states = [_metric_state(metric) for metric in metrics]
    names = ("log", "log_dict")
    # It may be silent already.
    own = {name: module.__dict__[name] for name in names if name in module.__dict__}
    for name in names:
        module.__dict__[name] = _ignore
    try:
        yield
    finally:
        for name in names:
            module.__dict__.pop(name, None)
        module.__dict__.update(own)
        for metric, state in zip(metrics, states, strict=True):
            metric.__dict__.update(state)
        for value, before in containers.values():
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(before)


def _ignore(*_: Any, **__: Any) -> None:
    """Log nothing."""


def _metric_state(metric: Metric) -> dict[str, Any]:
    names = (*metric._defaults, "_update_count", "_computed", "_forward_cache")
    return {name: _copied(metric.__dict__[name]) for name in names if name in metric.__dict__}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
