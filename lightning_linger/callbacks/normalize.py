"""Range limits, on a schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_linger.callbacks.schedule import Condition
from lightning_linger.callbacks.stage import StageCallback
from lightning_linger.core.config import LimitGradient, NormalizeConfig
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.stages.normalize import plan_normalize, switch_normalize
from lightning_linger.stages.selection import NORMALIZE_MARK, Selection


class NormalizeCallback(StageCallback):
    """Limits weights, biases and outputs of layers: training constrained to a range.

    The limits stay on when quantization starts; ``end_epoch`` turns them off.

    Args:
        at_epoch: First epoch with limits on; 0 by default.
        at_step: First step, instead.
        when: A condition, instead.
        end_epoch: First epoch with limits off again.
        weight: Limit of weights: a number, ``"7*mean"`` or ``"99.9%"``; None for no limit.
        bias: Limit of (folded) biases, likewise.
        output: Limit of outputs, likewise.
        gradient: Outside a limit: ``zero``, or a constant ``pull`` of +-0.01 back inside.
        types: Allow-list of module types or op kinds.
        modules: Globs on dotted paths.
        overrides: Fields per glob or ``type:Name``; None leaves a layer without limits.
        allow_changes: Whether to go on from a checkpoint, or a model, of a run with other
            arguments; those given here win.
    """

    stage = "normalize"
    order = 1

    def __init__(
        self,
        at_epoch: int | None = None,
        at_step: int | None = None,
        when: Condition | None = None,
        end_epoch: int | None = None,
        weight: float | str | None = 8.0,
        bias: float | str | None = None,
        output: float | str | None = 8.0,
        gradient: LimitGradient = "zero",
        types: Sequence[type[nn.Module] | str] | None = None,
        modules: Sequence[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
        allow_changes: bool = False,
    ) -> None:
        super().__init__(at_epoch, at_step, when, end_epoch, allow_changes)
        self.config = NormalizeConfig(weight, bias, output, gradient)
        self.types = types
        self.modules = modules
        self.overrides = overrides

    def plan(self, module: Any) -> None:
        """Attach the limits."""
        plan_normalize(module, self.config, self.types, self.modules, self.overrides)

    def is_on(self, module: Any) -> bool:
        """Return whether limits are on."""
        return instrumentation_of(module).switches.normalize

    def switch(self, module: Any, on: bool) -> None:
        """Switch the limits."""
        switch_normalize(module, on)

    def describe(self) -> dict[str, Any]:
        """Return what the plan depends on."""
        selection = Selection(self.types, self.modules, self.overrides, NORMALIZE_MARK)
        return {**dataclasses.asdict(self.config), **selection.describe()}
