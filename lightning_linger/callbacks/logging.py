"""Writing many per-site values in one go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_linger.callbacks._compat import is_tensorboard


def log_values(trainer: Any, values: Mapping[str, float]) -> None:
    """Write values to every logger in one call each; loggers do nothing on other ranks.

    ``LightningModule.log`` costs the better part of a millisecond per key, this costs that once.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)


def show_layout(trainer: Any, layouts: Mapping[str, Mapping[str, list[str]]]) -> None:
    """Put charts on TensorBoard's custom-scalars page.

    Args:
        trainer: Its TensorBoard loggers are used.
        layouts: Per page section, the charts: title to regular expressions of tags.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if is_tensorboard(logger):
            layout = {
                section: {title: ["Multiline", tags] for title, tags in charts.items()}
                for section, charts in layouts.items()
            }
            logger.experiment.add_custom_scalars(layout)


DASHBOARD = {
    "Overview": {
        "codes that differ between integer and fake-quant": [r"integer/mismatches"],
        "worst layer: SQNR [dB]": [r"quant_error/worst_sqnr", r"integer/worst_sqnr"],
        "worst layer: saturated share": [r"quant_error/worst_saturation"],
    },
    "Quantization error (fake-quant against float)": {
        "SQNR per layer [dB]": [r"sqnr/.*"],
        "saturated share per layer": [r"saturation/.*"],
        "step exponent per layer": [r"exponent/.*"],
    },
    "Integer model": {
        "mismatch rate per layer (against fake-quant)": [r"mismatch/.*"],
        "SQNR per layer, accumulated [dB] (against float)": [r"integer_sqnr/.*"],
        "SQNR per layer, isolated [dB] (against float)": [r"integer_sqnr_isolated/.*"],
    },
}
