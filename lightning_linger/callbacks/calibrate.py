"""Post-training quantization at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_linger.callbacks._compat import misconfiguration
from lightning_linger.callbacks.batches import training_batches
from lightning_linger.callbacks.discovery import run_step, silent, step_of
from lightning_linger.callbacks.quantize import QuantizeCallback
from lightning_linger.callbacks.schedule import NEVER
from lightning_linger.core.config import Granularity, QuantConfig
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.grid import ScaleKind, Symmetry
from lightning_linger.core.images import FirstConv
from lightning_linger.core.rounding import Rounding
from lightning_linger.stages.calibrate import learning_ranges, settle
from lightning_linger.stages.firstconv import require_quantized_images, take_raw_images
from lightning_linger.stages.prepare import check_example


class CalibrateCallback(QuantizeCallback):
    """Quantizes the model when its training in float has ended: only ranges come from data.

    At the end of ``fit`` some training batches run through the model as in evaluation; weights and
    statistics stay as they are. Quantization stays on, for ``validate``, ``test`` and export. The
    opposite of `QuantizeCallback`, which trains the quantized model.

    Args:
        batches: How many training batches move the ranges.
        platform: Name of the target.
        weight_bits: Width of weights.
        activation_bits: Width of inputs.
        output_bits: Width of outputs; None for float results.
        bias_bits: Width of biases.
        scale: ``power_of_two`` or ``free``; None takes the platform's.
        granularity: ``tensor`` or ``channel`` scales of weights; None takes the platform's.
        symmetry: ``symmetric`` or ``affine`` activations; None takes the platform's.
        rounding: None takes the platform's.
        range: Range estimator of activations, or a fixed range; None takes the preset's, or
            ``absmax``.
        weight_range: Range estimator of weights, or a fixed range.
        data_scale: What the ranges that activations ask for are multiplied with.
        preset: Name of a scheme, e.g. ``cambricon``, or a mapping of its ``name`` and its fields,
            in the place of the fields above.
        firstconv: Let the model take raw uint8 images from the end of ``fit`` on (see
            :func:`lightning_linger.take_raw_images`); it is trained on normalized ones.
        types: Allow-list of module types or op kinds.
        modules: Globs on dotted paths.
        overrides: Fields per glob or ``type:Name``; None leaves a layer in float.
        strict_platform: Make what the engine cannot run an error at set-up.
        allow_changes: Whether to go on from a checkpoint, or a model, of a run with other
            arguments; those given here win.
    """

    def __init__(
        self,
        batches: int = 32,
        platform: str = "venusa",
        weight_bits: int = 8,
        activation_bits: int = 8,
        output_bits: int | None = 8,
        bias_bits: int = 32,
        scale: ScaleKind | None = None,
        granularity: Granularity | None = None,
        symmetry: Symmetry | None = None,
        rounding: Rounding | None = None,
        range: str | float | None = None,
        weight_range: str | float = "absmax",
        data_scale: float = 1.0,
        preset: str | dict[str, Any] | None = None,
        firstconv: FirstConv | None = None,
        types: Sequence[type[nn.Module] | str] | None = None,
        modules: Sequence[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
        strict_platform: bool = False,
        allow_changes: bool = False,
    ) -> None:
        if range is None:
            range = "absmax" if preset is None else QuantConfig().range
        super().__init__(
            platform=platform,
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
            data_scale=data_scale,
            preset=preset,
            types=types,
            modules=modules,
            overrides=overrides,
            strict_platform=strict_platform,
            allow_changes=allow_changes,
        )
        if not isinstance(batches, int) or batches < 1:
            msg = f"`batches` must be a positive integer. Found: {batches!r}."
            raise ConfigError(msg)
        self.batches = batches
        self.firstconv = None if firstconv is None else FirstConv.parse(firstconv)
        self.schedule.at_epoch = NEVER

    def plan(self, module: Any) -> None:
        """Create the quantizers, and let the first convolution take raw images."""
        super().plan(module)
        if self.firstconv is not None:
            take_raw_images(module, self.firstconv)
            require_quantized_images(module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse early what could not be calibrated late."""
        if not pl_module.automatic_optimization:
            msg = (
                "CalibrateCallback runs `training_step` on batches, which with manual optimization "
                "would train the model. HINT: call `linger.calibrate(model, batches)` after `fit`."
            )
            raise misconfiguration(msg)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Move the ranges over some batches, with quantization on from now on."""
        self.switch(pl_module, on=True)
        step = step_of(pl_module, "fit")
        with silent(pl_module), learning_ranges(pl_module):
            for batch in training_batches(trainer, self.batches):
                moved = pl_module._apply_batch_transfer_handler(
                    batch, device=pl_module.device, dataloader_idx=0
                )
                check_example(moved)
                run_step(step, moved)
        settle(pl_module)
