"""Dumps of chosen batches of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_linger.analysis.dumps import Dumper
from lightning_linger.analysis.dumps.values import Level
from lightning_linger.callbacks._compat import Callback
from lightning_linger.core.errors import ConfigError

_LOOPS = ("train", "validation", "test", "predict")


class DumpCallback(Callback):
    """Puts a :class:`~lightning_linger.Dumper` around chosen batches: all that runs in them.

    The dump of a batch is in ``path/train_epoch0_batch3/``.

    Args:
        path: Folder of the dumps; by default ``dumps`` in the run's own folder.
        batches: Numbers of the batches, from 0.
        epochs: Numbers of the epochs, from 0.
        loops: Which of the trainer's loops: ``train``, ``validation``, ``test``, ``predict``.
        level: See :class:`~lightning_linger.Dumper`.
        compare: Likewise.
        pattern: Likewise.
    """

    needs_whole_parameters = True

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        batches: Iterable[int] = (0,),
        epochs: Iterable[int] = (0,),
        loops: Iterable[str] = ("train",),
        level: Level = 0,
        compare: bool = False,
        pattern: str = "*",
    ) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        self.batches = _numbers("batches", batches)
        self.epochs = _numbers("epochs", epochs)
        self.loops = frozenset([loops] if isinstance(loops, str) else loops)
        unknown = self.loops - set(_LOOPS)
        if unknown:
            msg = f"`loops` holds names of {', '.join(_LOOPS)}. Found: {sorted(unknown)}."
            raise ConfigError(msg)
        self._arguments: dict[str, Any] = {"level": level, "compare": compare, "pattern": pattern}
        Dumper("dump", **self._arguments)  # wrong arguments are an error now
        self._dumper: Dumper | None = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start."""
        self._start("train", trainer, batch_idx)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End."""
        self._end()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start."""
        self._start("validation", trainer, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End."""
        self._end()

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start."""
        self._start("test", trainer, batch_idx, dataloader_idx)

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start."""
        self._start("predict", trainer, batch_idx, dataloader_idx)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the dump of the batch that failed."""
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """End a dump that nothing else has ended."""
        self._end()

    def _start(self, loop: str, trainer: Any, batch: int, dataloader: int = 0) -> None:
        epoch = trainer.current_epoch
        wanted = loop in self.loops and batch in self.batches and epoch in self.epochs
        if not wanted or trainer.sanity_checking:
            return
        self._end()
        folder = self.path or Path(trainer.default_root_dir) / "dumps"
        source = f"_loader{dataloader}" if dataloader else ""
        name = f"{loop}_epoch{epoch}{source}_batch{batch}"
        dumper = Dumper(folder / name, **self._arguments)
        dumper.__enter__()
        self._dumper = dumper

    def _end(self) -> None:
        dumper, self._dumper = self._dumper, None
        if dumper is not None:
            dumper.__exit__(None, None, None)


def _numbers(name: str, values: Iterable[int]) -> frozenset[int]:
    found = list(values)
    if not found or not all(type(value) is int and value >= 0 for value in found):
        msg = f"`{name}` must hold whole numbers from 0. Found: {found!r}."
        raise ConfigError(msg)
    return frozenset(found)
