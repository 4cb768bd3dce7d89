"""The user's own validation, without a word to the loggers."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lightning_linger.callbacks.discovery import silent
from lightning_linger.core.distributed import gather_objects
from lightning_linger.stages.prepare import no_trace


class _Logged:
    """Stands for ``LightningModule.log``: means over samples of what steps log, by name."""

    def __init__(self, module: Any) -> None:
        self.batch_size = 1
        self._module = module
        self._sums: dict[str, tuple[float, float]] = {}
        self._metrics: dict[str, str] = {}

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        if isinstance(value, Metric):
            paths = (path for path, part in self._module.named_modules() if part is value)
            self._metrics[name] = next(paths, "")
            return
        weight = float(self.batch_size if batch_size is None else batch_size)
        total, weights = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + float(value) * weight, weights + weight)

    def log_dict(self, values: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            self.log(name, value, *args, **kwargs)

    def values(self) -> dict[str, float]:
        """Return the value of each name, over all ranks, of which some may have had no data."""
        sums: dict[str, tuple[float, float]] = {}
        metrics: dict[str, str] = {}
        for theirs, paths in gather_objects((self._sums, self._metrics)):
            metrics.update(paths)
            for name, (total, weight) in theirs.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + total, before[1] + weight)
        computed = {
            name: self._module.get_submodule(path).compute() for name, path in metrics.items()
        }
        return {
            **{name: total / weight for name, (total, weight) in sums.items() if weight},
            **{name: float(x) for name, x in computed.items() if _is_scalar(x)},
        }


@contextlib.contextmanager
def evaluation(module: Any) -> Iterator[None]:
    """Run a module in evaluation mode, without gradients; on leaving it is as it was."""
    with no_trace(module):
        module.eval()
        yield


def has_one_loader(trainer: Any) -> bool:
    """Whether there is validation data, from one loader."""
    loader = trainer.val_dataloaders
    alone = loader is not None and not isinstance(loader, list | tuple | dict)
    return alone and any(trainer.num_val_batches)


def validation_batches(trainer: Any, module: Any, most: float = math.inf) -> Iterator[Any]:
    """Return batches of the validation, on the module's device."""
    most = min(most, trainer.num_val_batches[0])
    for index, batch in enumerate(trainer.val_dataloaders):
        if index >= most:
            return
        yield module._apply_batch_transfer_handler(batch, device=module.device, dataloader_idx=0)


def validation_step(trainer: Any, module: Any, batch: Any, index: int) -> None:
    """Run the user's step on a batch."""
    arguments = (batch, index)[: len(inspect.signature(module.validation_step).parameters)]
    with trainer.precision_plugin.val_step_context():
        module.validation_step(*arguments)


def silent_validation(trainer: Any, module: Any) -> dict[str, float]:
    """Run the user's validation on all its data, in evaluation mode as it is on now.

    Nothing is logged, and metrics and lists of the module are as they were afterwards.

    Returns:
        What the user's steps, or the hooks around their epoch, log, by name.
    """
    with silent(module):
        logged = _Logged(module)
        module.__dict__.update(log=logged.log, log_dict=logged.log_dict)
        for metric in [part for part in module.modules() if isinstance(part, Metric)]:
            metric.reset()
        module.on_validation_epoch_start()
        for index, batch in enumerate(validation_batches(trainer, module)):
            logged.batch_size = _samples(batch)
            validation_step(trainer, module, batch, index)
        module.on_validation_epoch_end()
        return logged.values()


def _samples(batch: Any) -> int:
    sizes = [len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim]
    return sizes[0] if sizes else 1


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1
