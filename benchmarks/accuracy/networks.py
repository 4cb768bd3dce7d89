"""The float networks that recipes start from, kept in a folder."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn

from benchmarks.accuracy.tasks import Task
from benchmarks.accuracy.training import fit, fit_float
from lightning_linger.export.files import write_atomically


class Networks:
    """The float networks of each task and seed, trained once.

    Args:
        folder: Where their weights are kept; need not exist. Delete it to train them anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def trained(self, task: Task, seed: int) -> nn.Module:
        """Return the network that quantization-aware training starts from."""
        kept = self._kept(task, seed, f"trained-{task.epochs}-{task.learning_rate}")
        return self._read(task, kept) or self._keep(fit_float(task, seed), kept)

    def tuned(self, task: Task, seed: int) -> nn.Module:
        """Return the same network after as many epochs more in float."""
        kept = self._kept(
            task,
            seed,
            f"tuned-{task.epochs}-{task.learning_rate}-{task.tuning_epochs}-{task.tuning_rate}",
        )
        network = self._read(task, kept)
        if network is None:
            network = self.trained(task, seed)
            fit(network, task.data(seed), seed, task.tuning_epochs, task.tuning_rate)
            self._keep(network, kept)
        return network

    def _kept(self, task: Task, seed: int, what: str) -> Path:
        return self.folder / f"{task.name}-{seed}-{what}.pt"

    def _read(self, task: Task, path: Path) -> nn.Module | None:
        if not path.exists():
            return None
        network = task.network()
        network.load_state_dict(torch.load(path, weights_only=True))
        return network

    def _keep(self, network: nn.Module, path: Path) -> nn.Module:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save(network.state_dict(), content)
        write_atomically(path, content.getvalue())
        return network
