"""Resuming to the same bits: what Lightning leaves out of a checkpoint."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch

from lightning_linger.callbacks._compat import Callback
from lightning_linger.callbacks.plateau import pending_plateau_steps, replay_plateau_steps
from lightning_linger.core.distributed import gather_objects, rank


class RNGStateCallback(Callback):
    """Makes a resumed run equal to the uninterrupted one, bit for bit.

    A checkpoint then also holds the random states of every rank (torch, CUDA, numpy, Python), so
    that shuffling and dropout go on where they were, and the metric values of a
    ``ReduceLROnPlateau`` step that Lightning would lose.

    A checkpoint of the end of an epoch resumes exactly with any data loader. One from the middle
    of an epoch needs a loader that can resume there (one with ``state_dict`` and
    ``load_state_dict``).
    """

    state_key = "LingerRNGState"

    def __init__(self) -> None:
        super().__init__()
        self._loaded: dict[str, Any] | None = None
        self._inside_epoch = False
        self._before_plateau_step = False
        self._trainer: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Keep the trainer, which `state_dict` and `load_state_dict` are not given."""
        self._trainer = trainer

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the trainer."""
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """Return the random states of all ranks, as plain data."""
        pending = self._before_plateau_step and self._trainer is not None
        return {
            "ranks": gather_objects(random_state()),
            "inside_epoch": self._inside_epoch,
            "plateau": pending_plateau_steps(self._trainer) if pending else {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore at once: what is drawn next is the order of the data of the first epoch.

        Its iterator may be made as early as in ``configure_optimizers``, where
        ``trainer.estimated_stepping_batches`` asks for it.
        """
        if self._trainer is None or self._trainer.state.fn != "fit":
            return
        self._loaded = state_dict
        _restore(state_dict["ranks"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take a lost plateau step; undo what making an iterator has drawn too early."""
        self._inside_epoch = self._before_plateau_step = False
        state, self._loaded = self._loaded, None
        if state is None:
            return
        replay_plateau_steps(trainer, state["plateau"])
        # Releases of Lightning without `is_resuming` make the iterator of the first epoch again.
        keeps_iterator = getattr(trainer.fit_loop, "is_resuming", False)
        if state["inside_epoch"] or not keeps_iterator:
            _restore(state["ranks"])

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note where in the epoch a checkpoint would be."""
        self._inside_epoch = True
        self._before_plateau_step = False

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note where in the epoch a checkpoint would be."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            progress = trainer.fit_loop.epoch_loop.batch_progress
            self._before_plateau_step = progress.is_last_batch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note where in the epoch a checkpoint would be."""
        self._inside_epoch = False
        self._before_plateau_step = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Note where in the epoch a checkpoint would be."""
        self._before_plateau_step = False


def _restore(states: list[dict[str, Any]]) -> None:
    if rank() < len(states):
        set_random_state(states[rank()])
        return
    warnings.warn(
        f"the checkpoint was written by {len(states)} processes; rank {rank()} keeps its random "
        "state, so the run is not the uninterrupted one.",
        stacklevel=2,
    )


def random_state() -> dict[str, Any]:
    """Return the random states of this process as data that ``weights_only=True`` loads."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "python": [version, list(words), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
    name, keys, position, has_gauss, cached = state["numpy"]
    words = keys.cpu().numpy().astype(np.uint32)
    np.random.set_state((name, words, position, has_gauss, cached))
    version, python_words, gauss = state["python"]
    random.setstate((version, tuple(python_words), gauss))
