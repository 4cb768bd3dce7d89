"""Training batches to calibrate with, read beside the training that goes on."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from lightning_linger.callbacks.discovery import (
    generators_of,
    run_step,
    silent,
    step_of,
    undisturbed,
)
from lightning_linger.core.calls import ModuleCall
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.stages.prepare import check_example, no_trace

_SEED = 0


def training_calls(trainer: Any, module: nn.Module, count: int) -> list[ModuleCall]:
    """Return the calls of the model that ``training_step`` makes on some training batches.

    Nothing else comes of the steps: no gradient, no log, no statistic; random states and data
    loaders are put back. Which batches they are, and how they are augmented, does not depend on
    random states either, so that a resumed run calibrates with the same ones.

    Args:
        trainer: In ``fit``.
        module: The LightningModule, which is prepared.
        count: How many batches are read, if there are as many.

    Raises:
        ConfigError: If there is no batch, or a step does not call the model.
        NonFiniteError: If a batch holds NaN or infinity.
    """
    own: Any = module
    step = step_of(own, "fit")
    instrumentation = instrumentation_of(own)
    calls: list[ModuleCall] = []
    instrumentation.calls = calls
    try:
        with no_trace(own), silent(own):
            own.eval()
            _seed_all()
            for batch in training_batches(trainer, count):
                moved = own._apply_batch_transfer_handler(
                    batch, device=own.device, dataloader_idx=0
                )
                check_example(moved)
                run_step(step, moved)
    finally:
        instrumentation.calls = None
        instrumentation.thaw()
    if not calls:
        msg = "`training_step` called no layer of the model on the calibration batches."
        raise ConfigError(msg)
    return calls


def _seed_all() -> None:
    torch.manual_seed(_SEED)
    random.seed(_SEED)
    np.random.seed(_SEED)


def training_batches(trainer: Any, count: int) -> Iterator[Any]:
    """Read batches as the training loop does, with iterators and workers of their own.

    What shuffles by a generator of its own gives the same batches each time.
    """
    combined = trainer.fit_loop._combined_loader
    loaders = tree_leaves(combined.iterables)
    with contextlib.ExitStack() as stack:
        for loader in loaders:
            stack.enter_context(undisturbed(loader))
            for generator in generators_of(loader):
                generator.manual_seed(_SEED)
        twins = type(combined)(tree_map(_twin, combined.iterables), combined._mode)
        for batch, _, _ in itertools.islice(iter(twins), count):
            yield batch


def _twin(loader: Any) -> Any:
    """Return a loader of the same data; persistent workers have one iterator per loader."""
    if not isinstance(loader, DataLoader):
        return loader
    twin = copy.copy(loader)
    twin._iterator = None
    return twin
