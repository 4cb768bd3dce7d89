"""Exporting to ONNX at the end of fit or at set epochs."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_linger.callbacks._compat import Callback, misconfiguration
from lightning_linger.callbacks.quantize import QuantizeCallback
from lightning_linger.callbacks.schedule import require_reached
from lightning_linger.core.errors import ConfigError, QuantizationWarning
from lightning_linger.core.instrumentation import instrumentation_of, is_prepared
from lightning_linger.export.dialects import dialect_of
from lightning_linger.export.engines import can_run, engine_of
from lightning_linger.export.exporter import export_onnx, require_dialect
from lightning_linger.export.part import as_root
from lightning_linger.simulate.integer import integer

# What `export_onnx` takes by name only.
OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(export_onnx).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)


class ONNXExportCallback(Callback):
    """Writes the model in training to an ONNX file, and leaves it as it was.

    The file is written by rank 0, atomically. A ``qdq`` file of a quantized model is then run in
    onnxruntime, if that is installed, and a ``linger`` file in the integer runner; any element that
    differs from the integer forward is reported in a warning and in ``mismatches``.

    Args:
        path: Of the file; ``{epoch}`` in it is replaced by the epoch.
        dialect: ``linger`` (thinker engine), ``linger1`` (the same in older names) or ``qdq``
            (onnxruntime and whatever reads QDQ).
        at_epoch: Export at the end of this epoch, or of each of these; None exports at the end of
            fit.
        verify: Whether to run the exported file; one that takes or gives codes is not run.
        options: Further options of :func:`lightning_linger.export_onnx`, by name, e.g.
            ``{"dynamic_axes": {"x": {0: "batch"}}}``.

    Attributes:
        exported: The files written so far.
        mismatches: Elements of the last verified file that differ from the integer forward; None
            if it was not verified.
    """

    needs_whole_parameters = True

    def __init__(
        self,
        path: str | Path,
        dialect: str = "linger",
        at_epoch: int | list[int] | None = None,
        verify: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        dialect = dialect_of(dialect).name
        unknown = [name for name in options or {} if name not in OPTIONS]
        if unknown:
            msg = f"`options` holds {unknown}. Allowed: {OPTIONS}."
            raise ConfigError(msg)
        epochs = [at_epoch] if isinstance(at_epoch, int) else at_epoch
        if epochs is not None and any(not isinstance(e, int) or e < 0 for e in epochs):
            msg = f"`at_epoch` holds non-negative integers. Found: {at_epoch!r}."
            raise ConfigError(msg)
        if epochs is not None and len(epochs) > 1 and "{epoch}" not in str(path):
            msg = f"exports of several epochs need '{{epoch}}' in `path`. Found: {str(path)!r}."
            raise ConfigError(msg)
        self.path = str(path)
        self.dialect = dialect
        self.epochs = epochs
        self.verify = verify
        self.options = dict(options or {})
        self.exported: list[Path] = []
        self.mismatches: int | None = None
        self._example: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check early that the file can be written."""
        if stage != "fit":
            return
        folder = Path(self.path.format(epoch=0)).resolve().parent
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        if not existing.is_dir() or not _writable(existing):
            msg = f"ONNXExportCallback cannot write to {folder}. HINT: choose another `path`."
            raise misconfiguration(msg)
        last = max(self.epochs or (), default=None)
        require_reached(trainer, last, f"ONNXExportCallback(at_epoch={last})")
        self._refuse_export_before_quantize(trainer)

    def _refuse_export_before_quantize(self, trainer: Any) -> None:
        """Refuse a run that quantizes the model and exports it only before that."""
        starts = [
            callback.schedule.at_epoch
            for callback in trainer.callbacks
            if isinstance(callback, QuantizeCallback) and callback.schedule.at_epoch is not None
        ]
        if self.epochs and starts and max(self.epochs) < starts[0]:
            msg = (
                f"ONNXExportCallback(at_epoch={self.epochs}) exports before "
                f"QuantizeCallback(at_epoch={starts[0]}) starts: no file would hold the quantized "
                f"model. HINT: add an epoch from {starts[0]} on, or leave `at_epoch` away, which "
                "exports at the end of fit."
            )
            raise misconfiguration(msg)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse early what is planned for a target that does not read the file."""
        if is_prepared(pl_module):
            sites = [site for site in instrumentation_of(pl_module).sites if site.quantized]
            require_dialect(sites, dialect_of(self.dialect))

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the inputs of the first forward."""
        if self._example is None and is_prepared(pl_module):
            instrumentation_of(pl_module).calls = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the noted inputs as the example."""
        if self._example is None and is_prepared(pl_module):
            calls = instrumentation_of(pl_module).calls
            if calls:
                call = calls[0]
                args, kwargs = tree_map_only(Tensor, torch.clone, (call.args, call.kwargs))
                self._example = (call.module, args, kwargs)
                instrumentation_of(pl_module).calls = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Export at the set epochs."""
        if self.epochs is not None and trainer.current_epoch in self.epochs:
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Export at the end."""
        if self.epochs is None:
            self._export(trainer, pl_module)

    def _export(self, trainer: Any, module: Any) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            target, args, kwargs = self._inputs(module)
            path = Path(self.path.format(epoch=trainer.current_epoch))
            path.parent.mkdir(parents=True, exist_ok=True)
            written = export_onnx(target, args, path, self.dialect, kwargs, **self.options)
            self.exported.append(written)
            self.mismatches = None
            codes = self.options.get("integer_inputs") or self.options.get("integer_outputs")
            quantized = is_prepared(module) and module._linger.switches.quantize
            if self.verify and quantized and not codes:
                self.mismatches = self._verify(target, args, kwargs, written)
        trainer.strategy.barrier("linger_onnx_export")

    def _inputs(self, module: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        example = getattr(module, "example_input_array", None)
        target: nn.Module = module
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if example is not None:
            if isinstance(example, dict):
                kwargs = example
            else:
                args = example if isinstance(example, tuple) else (example,)
        elif self._example is not None:
            target, args, kwargs = self._example
            target = as_root(module, target)
        else:
            msg = (
                "ONNXExportCallback has seen no forward to take example inputs from. HINT: set "
                "`self.example_input_array` in the LightningModule."
            )
            raise misconfiguration(msg)
        device = module.device
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
        return target, args, kwargs

    def _verify(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path
    ) -> int | None:
        if not can_run(self.dialect):
            return None
        training = target.training
        target.eval()
        try:
            with torch.no_grad(), integer(target):
                expected = [
                    x for x in tree_leaves(target(*args, **kwargs)) if isinstance(x, Tensor)
                ]
        finally:
            target.train(training)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        found = engine_of(path, self.dialect)([x.cpu().numpy() for x in inputs])
        mismatches = sum(
            int((x.cpu() != torch.from_numpy(y)).sum())
            for x, y in zip(expected, found, strict=True)
        )
        if mismatches:
            warnings.warn(
                f"{path}: {mismatches} output elements differ from the integer forward. "
                "`linger.divergence` and the platform of QuantizeCallback tell where: a "
                "qdq file is exact for platform='onnxruntime'.",
                QuantizationWarning,
                stacklevel=2,
            )
        return mismatches


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK)
