"""The recipes of this library, by its callbacks in training and its functions behind it."""

from __future__ import annotations

import copy

from torch import nn

import lightning_linger as linger
from benchmarks.accuracy.recipes import Recipe
from benchmarks.accuracy.tasks import BATCH, Labelled, Task
from benchmarks.accuracy.training import Score, fit, score
from lightning_linger.callbacks import FuseBNCallback, QuantizeCallback

CALIBRATION_BATCHES = 8


def has_batch_norm(network: nn.Module) -> bool:
    """Return whether there is a batch norm to fold."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())


def train_quantized(
    recipe: Recipe, task: Task, network: nn.Module, data: tuple[Labelled, Labelled], seed: int
) -> Score:
    """Fine-tune a copy of a network with quantization on, and measure its integers."""
    network = copy.deepcopy(network)
    folding = FuseBNCallback(at_epoch=0, freeze_at_epoch=recipe.statistics_frozen_from(task))
    fold = [folding] if has_batch_norm(network) else []
    quantize = QuantizeCallback(
        at_epoch=0,
        freeze_at_epoch=recipe.ranges_frozen_from(task),
        overrides=recipe.overrides(task, prefix="network."),
        **recipe.fields,
    )
    learner = fit(
        network, data, seed, task.tuning_epochs, task.tuning_rate, callbacks=[*fold, quantize]
    )
    return score(learner, data[1], integers=True)


def calibrate(
    recipe: Recipe, task: Task, network: nn.Module, data: tuple[Labelled, Labelled]
) -> Score:
    """Quantize a copy of a trained network with ranges from data, and measure its integers."""
    model = copy.deepcopy(network).eval()
    batches = data[0][0].split(BATCH)[:CALIBRATION_BATCHES]
    linger.prepare(model, (batches[0],))
    if has_batch_norm(model):
        linger.fuse_bn(model)
    config = linger.QuantConfig(**recipe.fields)
    linger.quantize(model, config, overrides=recipe.overrides(task, prefix=""))
    linger.calibrate(model, batches)
    return score(model, data[1], integers=True)
