"""Sensitivities of the layers during a run, and the widths that follow from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_linger.analysis.bits import COSTS, Cost, check_budget, choose_bits, require_budget
from lightning_linger.analysis.sensitivity import (
    Mode,
    Part,
    Sensitivities,
    check_trials,
    measure_sensitivity,
    measured_layers,
    output_score,
)
from lightning_linger.callbacks import tensorboard
from lightning_linger.callbacks._compat import Callback, misconfiguration
from lightning_linger.callbacks.calibrate import CalibrateCallback
from lightning_linger.callbacks.company import follow_in_average
from lightning_linger.callbacks.discovery import silent
from lightning_linger.callbacks.progressive_bits import ProgressiveBitsCallback
from lightning_linger.callbacks.quantize import QuantizeCallback
from lightning_linger.callbacks.replay import run_folder
from lightning_linger.callbacks.schedule import Schedule, require_reached
from lightning_linger.callbacks.silent_validation import (
    evaluation,
    has_one_loader,
    silent_validation,
    validation_batches,
    validation_step,
)
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.dashboard.sensitivity import OVERRIDES_NAME, TABLE_NAME
from lightning_linger.export.files import write_atomically
from lightning_linger.simulate.divergence import Forward
from lightning_linger.stages.widths import change_bits


class SensitivityCallback(Callback):
    """Measures what each layer costs at each width, on validation data, and chooses widths.

    The table goes to ``sensitivity.csv`` in the folder of the Trainer's first logger, where
    ``lightning-linger report`` finds it, and as a picture and a text to TensorBoard. With a budget
    the best widths within it go to ``mixed_precision.json``, as ``overrides`` for a
    `QuantizeCallback` of the next run; or, with ``apply``, the run goes on with them: automatic
    mixed precision. Measuring leaves the model as it was, to the last bit.

    List it beside a `QuantizeCallback`, whose platform and ranges are used.

    Args:
        at_epoch: Measure at the start of this epoch; None measures at the end of ``fit``.
        bits: Widths to measure.
        metric: ``noise`` or ``kl`` of the output, see :func:`lightning_linger.sensitivity`, or the
            name of a metric that ``validation_step`` logs, e.g. ``val_accuracy``; then the whole
            validation runs once per layer and width.
        higher_is_better: Whether a metric of that name is.
        mode: ``one_at_a_time`` or ``all_but_one``.
        part: ``weights``, ``activations`` or ``both``.
        modules: Globs on dotted paths; None measures the whole model.
        batches: How many validation batches find ranges, and ``noise`` and ``kl``.
        budget: What the model may take, see :func:`lightning_linger.choose_bits`; None chooses
            nothing.
        cost: ``weight_bytes`` or ``mac_bits``: what the budget counts.
        apply: Whether the run goes on with the chosen widths.

    Attributes:
        rows: The latest sensitivities.
        overrides: The latest choice.
    """

    needs_whole_parameters = True

    def __init__(
        self,
        at_epoch: int | None = None,
        bits: Sequence[int] = (2, 4, 8),
        metric: str = "noise",
        higher_is_better: bool = True,
        mode: Mode = "one_at_a_time",
        part: Part = "weights",
        modules: Sequence[str] | None = None,
        batches: int = 2,
        budget: float | None = None,
        cost: Cost = "weight_bytes",
        apply: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(batches, int) or batches < 1:
            msg = f"`batches` must be a positive integer. Found: {batches!r}."
            raise ConfigError(msg)
        if cost not in COSTS:
            msg = f"`cost` must be one of {COSTS}. Found: {cost!r}."
            raise ConfigError(msg)
        if budget is not None:
            check_budget(budget)
        if at_epoch is not None:
            Schedule(at_epoch)
        if apply and (budget is None or at_epoch is None):
            msg = (
                "`apply` trains on with the widths that a budget chooses at an epoch: pass "
                f"`budget` and `at_epoch`. Found: {budget!r} and {at_epoch!r}."
            )
            raise ConfigError(msg)
        self.at_epoch = at_epoch
        self.bits = check_trials(bits, mode, part)
        self.metric = metric
        self.higher_is_better = higher_is_better
        self.mode = mode
        self.part = part
        self.modules = modules
        self.batches = batches
        self.budget = budget
        self.cost = cost
        self.apply = apply
        self.rows = Sensitivities([])
        self.overrides: dict[str, dict[str, Any]] = {}
        self._measured_at: int | None = None

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one Trainer apart."""
        return f"SensitivityCallback(at_epoch={self.at_epoch}, {self.metric}, {self.part})"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a run in which there would be no plan to measure, or to change."""
        if stage != "fit":
            return
        found = [item for item in trainer.callbacks if isinstance(item, QuantizeCallback)]
        if not found or (self.apply and isinstance(found[0], CalibrateCallback)):
            msg = (
                "SensitivityCallback measures the layers that a QuantizeCallback has planned. "
                "HINT: add a QuantizeCallback."
            )
            raise misconfiguration(msg)
        require_reached(trainer, self.at_epoch, f"SensitivityCallback(at_epoch={self.at_epoch})")
        # Of an earlier run of another Trainer; a checkpoint gives back that of its own.
        self._measured_at = None
        freeze = found[0].freeze_at_epoch
        if self.apply and freeze is not None and freeze <= (self.at_epoch or 0):
            msg = (
                f"QuantizeCallback(freeze_at_epoch={freeze}) holds the ranges before "
                f"SensitivityCallback changes widths in epoch {self.at_epoch}. HINT: freeze later."
            )
            raise misconfiguration(msg)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse early what measuring could only refuse late."""
        layers = measured_layers(pl_module, self.part, self.modules)
        if self.budget is not None and not self._widths_change_before(trainer):
            require_budget(pl_module, layers, self.bits, self.part, self.budget, self.cost)

    def _widths_change_before(self, trainer: Any) -> bool:
        """Whether another callback may have made the model smaller when this one measures."""
        others = (item for item in trainer.callbacks if item is not self)
        return any(isinstance(x, ProgressiveBitsCallback | SensitivityCallback) for x in others)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a run without data to measure on, now that its loaders are there."""
        if not trainer.fast_dev_run:
            _require_one_loader(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure at the set epoch, once."""
        epoch = trainer.current_epoch
        if self.at_epoch == epoch != self._measured_at and not trainer.fast_dev_run:
            self._measure(trainer, pl_module)
            self._measured_at = epoch
            if self.apply:
                change_bits(pl_module, self.overrides)
                follow_in_average(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure at the end."""
        if self.at_epoch is None and not trainer.fast_dev_run:
            self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return whether it has been measured: inside an epoch a resumed run does not again."""
        return {"measured_at": self._measured_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give it back."""
        self._measured_at = state_dict["measured_at"]

    # --- measuring --------------------------------------------------------------------------

    def _measure(self, trainer: Any, module: Any) -> None:
        _require_one_loader(trainer)
        with evaluation(module), silent(module):
            batches = list(validation_batches(trainer, module, self.batches))
            forwards = [_forward(trainer, module, batch) for batch in batches]
            self.rows = measure_sensitivity(
                module,
                forwards,
                self._score(trainer, module, forwards),
                self.bits,
                self.mode,
                self.part,
                self.modules,
            )
        if self.budget is not None:
            self.overrides = choose_bits(module, self.rows, self.budget, self.cost)
        # The folder is broadcast: every rank has to ask for it.
        folder = trainer.log_dir if trainer.loggers else None
        if trainer.is_global_zero:
            if folder is not None:
                self._write(run_folder(trainer.loggers[0], folder))
            tensorboard.show_sensitivities(trainer, list(self.rows), self.overrides)

    def _score(self, trainer: Any, module: Any, forwards: Sequence[Forward]) -> Callable[[], float]:
        if self.metric == "noise":
            return output_score("noise", forwards)
        if self.metric == "kl":
            return output_score("kl", forwards)

        def score() -> float:
            logged = silent_validation(trainer, module)
            if self.metric not in logged:
                msg = (
                    f"SensitivityCallback(metric={self.metric!r}) finds no such metric. The "
                    f"validation logs: {sorted(logged)}. HINT: 'noise' and 'kl' need none."
                )
                raise misconfiguration(msg)
            return logged[self.metric] * (1 if self.higher_is_better else -1)

        return score

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows.save(folder / TABLE_NAME)
        if self.overrides:
            text = json.dumps(self.overrides, indent=1) + "\n"
            write_atomically(folder / OVERRIDES_NAME, text.encode())


def _require_one_loader(trainer: Any) -> None:
    if not has_one_loader(trainer):
        msg = (
            "SensitivityCallback measures on validation data from one loader. HINT: pass a "
            "validation loader, or call `linger.sensitivity(model, batches)`."
        )
        raise misconfiguration(msg)


def _forward(trainer: Any, module: Any, batch: Any) -> Forward:
    """Return a function that runs the user's step and returns what the model has returned last."""
    instrumentation = instrumentation_of(module)

    def forward() -> Any:
        before, instrumentation.exchanges = instrumentation.exchanges, []
        try:
            validation_step(trainer, module, batch, 0)
            return instrumentation.exchanges[-1][1] if instrumentation.exchanges else None
        finally:
            instrumentation.exchanges = before

    return forward
