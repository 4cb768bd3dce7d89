"""What the stages say in the log."""

from __future__ import annotations

import logging

from torch import nn

from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.logs import logger
from lightning_linger.stages.summary import summary


def log_switch(model: nn.Module, stage: str, before: bool, on: bool) -> None:
    """Say that a stage was switched, and at which sites it acts."""
    if before == on or not logger.isEnabledFor(logging.INFO):
        return
    sites = instrumentation_of(model).sites
    if not on:
        logger.info("%s of %s is off", stage, type(model).__name__)
        return
    acting = sum(
        {
            "fuse_bn": site.fold is not None,
            "normalize": site.limits is not None,
            "observe": site.quantized,
            "quantize": site.quantized,
        }[stage]
        for site in sites
    )
    logger.info("%s of %s is on at %d of %d sites", stage, type(model).__name__, acting, len(sites))
    log_sites(model)


def log_sites(model: nn.Module) -> None:
    """Say of each op what is done with it, at level DEBUG."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    for row in summary(model):
        shown = {name: value for name, value in vars(row).items() if value and name != "site"}
        logger.debug(
            "%s: %s", row.site, ", ".join(f"{name} {value}" for name, value in shown.items())
        )
