"""Quantization-aware training, on a schedule."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_linger.callbacks._compat import misconfiguration
from lightning_linger.callbacks.company import follow_in_average
from lightning_linger.callbacks.optimizers import check_learned_ranges
from lightning_linger.callbacks.order import epoch_length, first_step
from lightning_linger.callbacks.schedule import Condition, Schedule
from lightning_linger.callbacks.stage import StageCallback
from lightning_linger.core.config import Granularity, QuantConfig, RNNFusion
from lightning_linger.core.errors import ConfigError, QuantizationWarning
from lightning_linger.core.grid import ScaleKind, Symmetry
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.rounding import TrainingRounding
from lightning_linger.ops.weighted import WeightedOp
from lightning_linger.platforms import platform_of
from lightning_linger.presets import read_preset
from lightning_linger.stages.freeze import freeze_ranges, is_frozen
from lightning_linger.stages.quantize import plan_quantize, switch_quantize, switch_watch
from lightning_linger.stages.selection import QUANT_MARK, Selection
from lightning_linger.stages.summary import float_sites


class QuantizeCallback(StageCallback):
    """Trains the model as the chip will run it.

    Args:
        at_epoch: First epoch with quantization on; 0 by default.
        at_step: First step, instead.
        when: A condition, instead.
        end_epoch: First epoch with quantization off again.
        freeze_at_epoch: First epoch from which every range stays; None lets ranges move to the end.
        freeze_at_step: First step, instead.
        observe_at_epoch: First epoch, before `at_epoch`, in which batches move the ranges while the
            model still runs in float: quantization starts with ranges that are known (delayed
            quantization). None lets ranges begin with quantization.
        observe_at_step: First step, instead.
        platform: Name of the target.
        weight_bits: Width of weights.
        activation_bits: Width of inputs.
        output_bits: Width of outputs; None for float results.
        bias_bits: Width of biases.
        scale: ``power_of_two`` or ``free``; None takes the platform's.
        granularity: Scales of weights: ``tensor``, ``channel``, ``input_channel`` or a group size;
            None takes the platform's.
        symmetry: ``symmetric`` or ``affine`` activations; None takes the platform's.
        rounding: None takes the platform's; ``stochastic`` is for training alone.
        range: Range estimator of activations, or a fixed range.
        weight_range: Range estimator of weights, or a fixed range.
        gradient_bits: Width of gradients; None leaves them in float.
        gradient_range: Range estimator of gradients, or a fixed range.
        ahead_conv_relu: Let a convolution before a ReLU use its codes for the positive side.
        ahead_bn_relu: The same behind a batch norm.
        ahead_linear_relu: The same for a linear layer.
        strict_platform: Make what the engine cannot run an error at set-up.
        fused_rnn: Multiply whole input sequences of recurrent layers at once; ``"compiled"``
            compiles their steps too.
        narrow_weights: Leave out the most negative weight code; None takes the platform's.
        strict_maximum: Keep the end of a range within the codes.
        seed: Of stochastic rounding.
        statistics_bits: Width of the running statistics of batch norms in evaluation; None leaves
            them in float.
        statistics_range: Their range estimator, or a fixed range.
        data_scale: What the ranges that activations ask for are multiplied with.
        preset: Name of a scheme (see :func:`lightning_linger.preset`), or a mapping of its ``name``
            and its fields, in the place of all the fields above.
        types: Allow-list of module types or op kinds.
        modules: Globs on dotted paths.
        overrides: Fields per glob or ``type:Name``; None leaves a layer in float.
        allow_changes: Whether to go on from a checkpoint, or a model, of a run with other
            arguments; those given here win.
    """

    stage = "quantize"
    order = 2

    def __init__(
        self,
        at_epoch: int | None = None,
        at_step: int | None = None,
        when: Condition | None = None,
        end_epoch: int | None = None,
        freeze_at_epoch: int | None = None,
        freeze_at_step: int | None = None,
        observe_at_epoch: int | None = None,
        observe_at_step: int | None = None,
        platform: str = "venusa",
        weight_bits: int = 8,
        activation_bits: int = 8,
        output_bits: int | None = 8,
        bias_bits: int = 32,
        scale: ScaleKind | None = None,
        granularity: Granularity | int | None = None,
        symmetry: Symmetry | None = None,
        rounding: TrainingRounding | None = None,
        range: str | float = "ema_absmax",
        weight_range: str | float = "absmax",
        gradient_bits: int | None = None,
        gradient_range: str | float = "last_absmax",
        ahead_conv_relu: bool = True,
        ahead_bn_relu: bool = True,
        ahead_linear_relu: bool = True,
        strict_platform: bool = False,
        fused_rnn: RNNFusion = True,
        narrow_weights: bool | None = None,
        strict_maximum: bool = False,
        seed: int = 0,
        statistics_bits: int | None = None,
        statistics_range: str | float = "absmax",
        data_scale: float = 1.0,
        preset: str | dict[str, Any] | None = None,
        types: Sequence[type[nn.Module] | str] | None = None,
        modules: Sequence[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
        allow_changes: bool = False,
    ) -> None:
        super().__init__(at_epoch, at_step, when, end_epoch, allow_changes)
        self.freeze_at_epoch, self.freeze_at_step = freeze_at_epoch, freeze_at_step
        self.freeze: Schedule | None = None
        if freeze_at_epoch is not None or freeze_at_step is not None:
            self.freeze = Schedule(freeze_at_epoch, freeze_at_step)
            self._require_ranges()
        self.observe_at_epoch, self.observe_at_step = observe_at_epoch, observe_at_step
        self.observe: Schedule | None = None
        if observe_at_epoch is not None or observe_at_step is not None:
            self.observe = Schedule(observe_at_epoch, observe_at_step)
            self._require_delay()
        self.config = QuantConfig(
            platform=platform_of(platform).name,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            output_bits=output_bits,
            bias_bits=bias_bits,
            scale=scale,
            granularity=granularity,
            symmetry=symmetry,
            rounding=rounding,
            range=range,
            weight_range=weight_range,
            gradient_bits=gradient_bits,
            gradient_range=gradient_range,
            ahead_conv_relu=ahead_conv_relu,
            ahead_bn_relu=ahead_bn_relu,
            ahead_linear_relu=ahead_linear_relu,
            strict_platform=strict_platform,
            fused_rnn=fused_rnn,
            narrow_weights=narrow_weights,
            strict_maximum=strict_maximum,
            seed=seed,
            statistics_bits=statistics_bits,
            statistics_range=statistics_range,
            data_scale=data_scale,
        )
        if preset is not None:
            self.config = _read_alone(preset, self.config)
        self.preset = preset
        self.types = types
        self.modules = modules
        self.overrides = overrides

    def _require_ranges(self) -> None:
        for name in ("at_epoch", "at_step"):
            freeze, start = getattr(self, f"freeze_{name}"), getattr(self.schedule, name) or 0
            if freeze is not None and freeze <= start:
                msg = (
                    f"`freeze_{name}` ({freeze}) must come after `{name}` ({start}): no range "
                    "would be seen before it stands still."
                )
                raise ConfigError(msg)

    def _require_delay(self) -> None:
        for name in ("at_epoch", "at_step"):
            first, then = getattr(self, f"observe_{name}"), getattr(self.schedule, name)
            if first is not None and then is not None and first >= then:
                msg = (
                    f"`observe_{name}` ({first}) must come before `{name}` ({then}): quantization "
                    "moves the ranges itself."
                )
                raise ConfigError(msg)

    def plan(self, module: Any) -> None:
        """Create the quantizers, and say once what stays float."""
        plan_quantize(module, self.config, self.types, self.modules, self.overrides)
        left = float_sites(module)
        if platform_of(self.config.platform).layers_only:
            left = [site for site in left if isinstance(site.op, WeightedOp)]
        if left:
            shown = ", ".join(f"`{site.key}` ({site.why_float})" for site in left[:5])
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            warnings.warn(
                f"{len(left)} sites stay float: {shown}{more}. `print(linger.summary(model))` "
                "lists them all.",
                QuantizationWarning,
                stacklevel=2,
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the optimizers, which exist now, train learned ranges."""
        check_learned_ranges(trainer, pl_module, late=self.schedule.at_epoch != 0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check epochs against steps, now that the steps of an epoch are known."""
        super().on_train_start(trainer, pl_module)
        length = epoch_length(trainer)
        if trainer.fast_dev_run or math.isinf(length):
            return
        start = first_step(self.schedule, length)
        freeze = None if self.freeze is None else first_step(self.freeze, length)
        if start is not None and freeze is not None and freeze <= start:
            msg = (
                f"QuantizeCallback freezes ranges at step {freeze:.0f} and starts at step "
                f"{start:.0f} (an epoch has {length:.0f} steps): no range would be seen before it "
                "stands still. HINT: freeze later."
            )
            raise misconfiguration(msg)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Switch by epoch or condition, and freeze by epoch."""
        super().on_train_epoch_start(trainer, pl_module)
        self._follow_freeze(trainer, pl_module)
        self._follow_observe(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Switch by step, and freeze by step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.freeze is not None and self.freeze.at_step is not None:
            self._follow_freeze(trainer, pl_module)
        if self.observe is not None:
            self._follow_observe(trainer, pl_module)

    def _follow_observe(self, trainer: Any, module: Any) -> None:
        if self.observe is None:
            return
        watches = instrumentation_of(module).switches.watch
        wanted = not self.is_on(module) and self.observe.is_on(trainer, module, watches)
        if watches != wanted:
            switch_watch(module, wanted)
            follow_in_average(trainer, module)

    def _follow_freeze(self, trainer: Any, module: Any) -> None:
        if self.freeze is None or trainer.fast_dev_run:
            return
        frozen = is_frozen(module)
        if not frozen and self.freeze.is_on(trainer, module, frozen):
            freeze_ranges(module)
            follow_in_average(trainer, module)

    def is_on(self, module: Any) -> bool:
        """Return whether quantization is on."""
        return instrumentation_of(module).switches.quantize

    def switch(self, module: Any, on: bool) -> None:
        """Switch quantization."""
        switch_quantize(module, on)

    def describe(self) -> dict[str, Any]:
        """Return what the plan depends on."""
        selection = Selection(self.types, self.modules, self.overrides, QUANT_MARK)
        return {**dataclasses.asdict(self.config), **selection.describe()}


def _read_alone(preset: str | dict[str, Any], given: QuantConfig) -> QuantConfig:
    default = QuantConfig()
    names = [field.name for field in dataclasses.fields(QuantConfig)]
    beside = [name for name in names if getattr(given, name) != getattr(default, name)]
    if beside:
        msg = (
            f"`preset` stands in the place of {beside}: give them to the preset, e.g. "
            f"preset={{'name': ..., {beside[0]!r}: {getattr(given, beside[0])!r}}}."
        )
        raise ConfigError(msg)
    return read_preset(preset)
