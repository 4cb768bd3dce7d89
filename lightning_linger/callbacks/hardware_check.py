"""Checking that the model can be deployed, before it is trained."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from lightning_linger.analysis.check import Findings, check
from lightning_linger.callbacks._compat import Callback, misconfiguration
from lightning_linger.callbacks.discovery import prepare_module
from lightning_linger.callbacks.stage import make_layers, plan_stages, stages_of
from lightning_linger.core.errors import ConfigError, QuantizationWarning
from lightning_linger.core.instrumentation import is_prepared
from lightning_linger.platforms import platform_of
from lightning_linger.stages.prepare import strip

_ACTIONS = ("raise", "warn")


class HardwareCheckCallback(Callback):
    """Refuses to train a model that the target cannot run.

    Runs `linger.check` when ``fit`` is set up, on the model as the other callbacks plan it. An
    error stops the run with the whole table; warnings alone become one warning.

    Args:
        platform: Name of the target; None takes that of `QuantizeCallback`, or ``venusa`` without
            one.
        on_error: ``raise``, or ``warn`` to train nevertheless.

    Attributes:
        findings: The findings, None before the first ``fit``.
    """

    def __init__(
        self, platform: str | None = None, on_error: Literal["raise", "warn"] = "raise"
    ) -> None:
        super().__init__()
        if platform is not None:
            platform_of(platform)
        if on_error not in _ACTIONS:
            msg = f"`on_error` must be one of {_ACTIONS}. Found: {on_error!r}."
            raise ConfigError(msg)
        self.platform = platform
        self.on_error = on_error
        self.findings: Findings | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check, once the stages are planned.

        Raises:
            MisconfigurationException: If there is an error and ``on_error`` is ``raise``.
        """
        if stage != "fit":
            return
        self.findings = self._check(trainer, pl_module, stage)
        if not self.findings.deployable and self.on_error == "raise":
            msg = (
                f"The model cannot be deployed.\n{self.findings}\nHINT: change the layers as the "
                "last column says, choose another platform, or pass on_error='warn'."
            )
            raise misconfiguration(msg)
        serious = [*self.findings.of("error"), *self.findings.of("warning")]
        if serious and trainer.is_global_zero:
            table = Findings(serious, self.findings.platform)
            warnings.warn(f"HardwareCheckCallback: {table}", QuantizationWarning, stacklevel=2)

    def _check(self, trainer: Any, module: Any, stage: str) -> Findings:
        if stages_of(trainer):
            # Wherever this callback stands among them: planning comes first.
            plan_stages(trainer, module, stage)
        if is_prepared(module):
            return check(module, self.platform)
        make_layers(module)
        try:
            prepare_module(trainer, module, stage)
            return check(module, self.platform)
        finally:
            strip(module)
