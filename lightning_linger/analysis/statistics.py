"""What the values of weights and activations tell about how they will quantize."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.analysis.saving import save_table
from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.core.instrumentation import STATE_NAME, instrumentation_of, is_prepared
from lightning_linger.core.payload import real_values
from lightning_linger.core.table import Table
from lightning_linger.simulate.divergence import Forward, forward_of, main_result
from lightning_linger.stages.checkpoints import read_checkpoint

QUANTILE = 0.99
THRESHOLD = 10.0

OUTLIERS = "outliers"
NOT_FINITE = "not finite"


@dataclass(frozen=True)
class TensorStatistics:
    """Magnitudes of one tensor.

    Args:
        tensor: Its name.
        shape: Its shape, e.g. ``16x3x3x3``.
        mean: Mean magnitude.
        max: Largest magnitude.
        max_over_mean: Their ratio.
        dynamic: The magnitude below which 99 % of the values lie: the ``int(0.99 n)``-th smallest
            of ``n``.
        max_over_dynamic: How much further the largest reaches: by this factor the step of a grid
            that covers all values is coarser than that of one which covers 99 %.
        flag: ``outliers`` where that factor is above the threshold, ``not finite`` where the tensor
            holds NaN or infinity (of which the other columns take no notice), else empty.
    """

    tensor: str
    shape: str
    mean: float
    max: float
    max_over_mean: float
    dynamic: float
    max_over_dynamic: float
    flag: str


class Statistics(Table[TensorStatistics]):
    """One row per tensor, in the order of the model."""

    row_type = TensorStatistics
    digits = 4

    @property
    def flagged(self) -> list[TensorStatistics]:
        """The rows with a flag."""
        return [row for row in self if row.flag]

    def matching(self, pattern: str) -> Statistics:
        """Return the rows whose name a glob matches.

        Raises:
            ConfigError: If there is none.
        """
        chosen = set(_matching([row.tensor for row in self], pattern))
        return Statistics([row for row in self if row.tensor in chosen])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table: as CSV or JSON if the name ends so, else as text.

        Returns:
            The path.

        Raises:
            ConfigError: If it cannot be written.
        """
        return save_table(self, path)


def analyse_weights(
    source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module,
    pattern: str = "*",
    threshold: float = THRESHOLD,
) -> Statistics:
    """Measure the weights of a model: every floating tensor but running statistics.

    Args:
        source: A model, a state dict, a checkpoint as a dictionary, or the path of a checkpoint.
        pattern: A glob on the names.
        threshold: From which ``max_over_dynamic`` on a tensor is flagged.

    Raises:
        ConfigError: If the source holds no tensor of such a name, or cannot be read.
    """
    if isinstance(source, nn.Module):
        state: Mapping[str, Any] = source.state_dict()
    elif isinstance(source, Mapping):
        state = source
    else:
        state = read_checkpoint(Path(source))
    inner = state.get("state_dict")
    state = inner if isinstance(inner, Mapping) else state
    weights = {str(name): x for name, x in state.items() if _is_weight(str(name), x)}
    if not weights:
        msg = "there are no weights: pass a model, its state dict, or a Lightning checkpoint."
        raise ConfigError(msg)
    return _measure(weights, pattern, threshold)


def analyse_activations(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    pattern: str = "*",
    threshold: float = THRESHOLD,
) -> Statistics:
    """Measure what flows in a model on a batch, in evaluation mode; nothing of the model changes.

    Of a model with a stage switched on, the result of every site (``layer1.conv1/conv2d/0``), as it
    is computed now, on the grid once it is quantized. Of any other, the result of every layer that
    has no layers inside, by its path; ``path@1`` is its second call.

    Args:
        model: The model.
        args: The batch: a tensor, a tuple of arguments, or a mapping of keyword inputs.
        kwargs: Keyword inputs beside a tuple.
        pattern: A glob on the names.
        threshold: From which ``max_over_dynamic`` on a tensor is flagged.

    Raises:
        ConfigError: If there is no tensor of such a name.
    """
    if isinstance(args, tuple):
        return measure_activations(
            model, lambda: model(*args, **(kwargs or {})), pattern, threshold
        )
    return measure_activations(model, forward_of(model, args), pattern, threshold)


def measure_activations(
    model: nn.Module, forward: Forward, pattern: str = "*", threshold: float = THRESHOLD
) -> Statistics:
    """Measure what flows in a model while a function runs it; see :func:`analyse_activations`."""
    rows: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for module, mode in [(module, module.training) for module in model.modules()]:
            stack.callback(setattr, module, "training", mode)
        model.eval()
        if is_prepared(model) and instrumentation_of(model).engaged:
            _collect_sites(model, rows, stack)
        else:
            _collect_layers(model, rows, stack)
        with torch.no_grad():
            forward()
    if is_prepared(model):
        instrumentation_of(model).thaw()
    if not rows:
        msg = f"{type(model).__name__} has called no layer whose result is a floating tensor."
        raise ConfigError(msg)
    return _measure(rows, pattern, threshold)


def _collect_sites(model: nn.Module, rows: dict[str, Tensor], stack: ExitStack) -> None:
    instrumentation = instrumentation_of(model)
    stack.callback(setattr, instrumentation, "tap", instrumentation.tap)

    def keep(event: Any) -> None:
        result = main_result(event.result)
        if result is not None:
            rows[event.site.key] = real_values(result).detach().clone()

    instrumentation.tap = keep


def _collect_layers(model: nn.Module, rows: dict[str, Tensor], stack: ExitStack) -> None:
    calls: Counter[str] = Counter()
    for path, module in model.named_modules():
        if STATE_NAME in path.split(".") or next(module.children(), None) is not None:
            continue

        def keep(_: Any, __: Any, output: Any, path: str = path) -> None:
            result = main_result(output)
            if result is not None:
                rows[f"{path}@{calls[path]}" if calls[path] else path] = result.detach().clone()
                calls[path] += 1

        stack.callback(module.register_forward_hook(keep).remove)


def _is_weight(name: str, x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.numel() > 0
        and STATE_NAME not in name.split(".")
        and not name.rpartition(".")[2].startswith("running_")
    )


def _measure(tensors: Mapping[str, Tensor], pattern: str, threshold: float) -> Statistics:
    if not threshold > 0:
        msg = f"`threshold` must be positive. Found: {threshold!r}."
        raise ConfigError(msg)
    chosen = _matching(list(tensors), pattern)
    return Statistics([measure(name, tensors[name], threshold) for name in chosen])


def _matching(names: list[str], pattern: str) -> list[str]:
    chosen = [name for name in names if fnmatchcase(name, pattern)]
    if not chosen:
        msg = f"{pattern!r} matches no tensor. Near: {near_matches(pattern, names)}."
        raise ConfigError(msg)
    return chosen


def measure(name: str, x: Tensor, threshold: float = THRESHOLD) -> TensorStatistics:
    """Measure one tensor.

    Args:
        name: Its name in the row.
        x: A tensor of any shape.
        threshold: From which ``max_over_dynamic`` on it is flagged.
    """
    magnitudes = x.detach().abs().flatten().double()
    finite = magnitudes[magnitudes.isfinite()]
    mean = largest = dynamic = 0.0
    if finite.numel():
        rank = max(int(finite.numel() * QUANTILE), 1)
        mean, largest = float(finite.mean()), float(finite.max())
        dynamic = float(finite.kthvalue(rank).values)
    reach = _ratio(largest, dynamic)
    flag = OUTLIERS if reach > threshold else ""
    if finite.numel() < magnitudes.numel():
        flag = NOT_FINITE
    shape = "x".join(map(str, x.shape)) or "scalar"
    return TensorStatistics(name, shape, mean, largest, _ratio(largest, mean), dynamic, reach, flag)


def _ratio(value: float, of: float) -> float:
    if of > 0:
        return value / of
    return math.inf if value > 0 else 1.0
