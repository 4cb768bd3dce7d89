"""Calibration: ranges from data, without training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.logs import logger
from lightning_linger.core.progress import with_progress
from lightning_linger.stages.journal import log_sites
from lightning_linger.stages.prepare import check_example
from lightning_linger.stages.quantize import quantize


def calibrate(
    model: nn.Module, loader: Iterable[Any], config: QuantConfig | None = None
) -> nn.Module:
    """Move the ranges of a model over some batches; weights and statistics stay as they are.

    Args:
        model: A prepared model. If it is not quantized yet, it is, with ``config``.
        loader: Batches: a tensor, a tuple or list whose first entry is the input, or a mapping of
            keyword inputs.
        config: Used if the model is not quantized yet.

    Returns:
        The model, in the mode it had.

    Raises:
        ConfigError: If the loader is empty.
    """
    instrumentation = instrumentation_of(model)
    if not instrumentation.switches.quantize:
        quantize(model, config)
    batches = 0
    with learning_ranges(model):
        for batch in with_progress(loader, "Calibrating"):
            check_example(batch)
            run_batch(model, batch)
            batches += 1
    if batches == 0:
        msg = "the calibration loader gave no batch."
        raise ConfigError(msg)
    logger.info("calibrated %s on %d batches", type(model).__name__, batches)
    log_sites(model)
    return model


@contextlib.contextmanager
def learning_ranges(model: nn.Module) -> Iterator[None]:
    """Let forwards in evaluation mode, without gradients, move the ranges of a quantized model."""
    instrumentation = instrumentation_of(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for site in instrumentation.sites:
        site.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        instrumentation.thaw()


def run_batch(model: nn.Module, batch: Any) -> None:
    """Call a model with a batch of calibration data.

    Args:
        model: The model.
        batch: A tensor, a tuple or list whose first entry is the input, or a mapping of keyword
            inputs.
    """
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        model(batch[0])
    else:
        model(batch)
