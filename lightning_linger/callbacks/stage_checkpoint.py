"""A best checkpoint per stage."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_linger.callbacks._compat import NAMESPACES
from lightning_linger.core.instrumentation import instrumentation_of, is_prepared
from lightning_linger.stages.freeze import is_frozen

_ModelCheckpoint: Any = type(
    "_ModelCheckpoint",
    tuple(namespace.callbacks.ModelCheckpoint for namespace in NAMESPACES),
    {"__doc__": "The ModelCheckpoint of every installed namespace."},
)

# What ModelCheckpoint knows about the best checkpoints so far, as it starts out.
_FRESH: dict[str, Any] = {
    "best_k_models": {},
    "kth_best_model_path": "",
    "best_model_path": "",
    "best_model_score": None,
    "current_score": None,
}


class StageModelCheckpoint(_ModelCheckpoint):
    """Keeps the best checkpoints of each stage.

    A float model is often a little better than its quantized self, so that the best checkpoint of a
    whole run is one from before quantization. Here the comparison starts anew with each stage;
    ``best_model_path``, and ``ckpt_path="best"``, are those of the latest one.

    Args:
        **kwargs: As of Lightning's ``ModelCheckpoint``. The stage is put before ``filename``.

    Attributes:
        best_by_stage: Path of the best checkpoint by stage: ``float``, ``fuse_bn``, ``normalize``,
            ``quantize`` or ``freeze``, the latest that was on.
    """

    filename: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._plain_filename: str = self.filename or "{epoch}-{step}"
        self._others: dict[str, str] = {}
        self._stage = ""
        self._enter("float")

    @property
    def state_key(self) -> str:
        """Lightning's, under a name of its own."""
        key: str = super().state_key
        return "Stage" + key

    @property
    def best_by_stage(self) -> dict[str, str]:
        """Path of the best checkpoint of each stage so far."""
        own = {self._stage: self.best_model_path} if self.best_model_path else {}
        return {**self._others, **own}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start in the stage the module is in."""
        super().on_train_start(trainer, pl_module)
        self._follow(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Save, if that is due, among the checkpoints of the present stage."""
        self._follow(pl_module)
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save, if that is due, among the checkpoints of the present stage."""
        self._follow(pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Save, if that is due, among the checkpoints of the present stage."""
        self._follow(pl_module)
        super().on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return Lightning's state, and the bests of the other stages."""
        return {**super().state_dict(), "stage": self._stage, "best_of_others": self._others}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the stage of the checkpoint."""
        self._enter(state_dict["stage"])
        self._others = dict(state_dict["best_of_others"])
        super().load_state_dict(state_dict)

    def _follow(self, module: Any) -> None:
        stage = stage_of(module)
        if stage != self._stage:
            self._others = self.best_by_stage
            for name, value in _FRESH.items():
                setattr(self, name, value.copy() if isinstance(value, dict) else value)
            self.kth_value = torch.tensor(math.inf if self.mode == "min" else -math.inf)
            self._enter(stage)

    def _enter(self, stage: str) -> None:
        self._stage = stage
        self.filename = f"{stage}-{self._plain_filename}"


def stage_of(module: Any) -> str:
    """Return the name of the latest stage that is on: the model is float before the first."""
    if not is_prepared(module):
        return "float"
    switches = instrumentation_of(module).switches
    if switches.quantize:
        return "freeze" if is_frozen(module) else "quantize"
    if switches.normalize:
        return "normalize"
    return "fuse_bn" if switches.fuse else "float"
