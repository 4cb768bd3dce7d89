"""How the quantize stage would plan a model, without leaving a plan behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_linger.analysis.families import READERS
from lightning_linger.analysis.walk import Walk
from lightning_linger.core.config import FuseConfig, QuantConfig
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of, is_prepared
from lightning_linger.core.platform import Platform
from lightning_linger.platforms import platform_of
from lightning_linger.stages.fuse_bn import plan_fuse_bn
from lightning_linger.stages.prepare import prepare, strip
from lightning_linger.stages.quantize import plan_quantize
from lightning_linger.stages.trial import kept_plan

DEFAULT_PLATFORM = "venusa"


def default_config(platform: Platform) -> QuantConfig:
    """Return how a model is quantized for a target of which nothing else is said."""
    results = {"output_bits": None} if platform.layers_only else {}
    return QuantConfig(platform=platform.name).override(results)


@contextlib.contextmanager
def planned(
    model: nn.Module,
    platform: str | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
) -> Iterator[tuple[Instrumentation, Platform]]:
    """Give a model a plan of the quantize stage, if it has none; on leaving it is as it was.

    Args:
        model: A prepared model, or a plain one together with example inputs.
        platform: The target; None takes that of the plan.
        example_inputs: Positional inputs of one forward.
        example_kwargs: Keyword inputs.

    Yields:
        The instrumentation with a plan, and the target.

    Raises:
        ConfigError: If the platform is unknown, or a plain model comes without example inputs.
        UnsupportedError: If nothing in the model can be quantized.
    """
    if platform is not None:
        platform_of(platform)
    prepared_here = not is_prepared(model)
    if prepared_here:
        if example_inputs is None and example_kwargs is None:
            msg = (
                f"{type(model).__name__} is not prepared. Pass `example_inputs`, a tuple of "
                "positional inputs of one forward, or call `linger.prepare` first."
            )
            raise ConfigError(msg)
        prepare(model, example_inputs or (), example_kwargs)
    try:
        instrumentation = instrumentation_of(model)
        if any(site.quantized for site in instrumentation.sites):
            yield instrumentation, platform_of(platform or _platform_of(instrumentation))
            return
        target = platform_of(platform or DEFAULT_PLATFORM)
        with kept_plan(model):
            # As the callbacks do it: batch norms are folded, and every layer is quantized.
            plan_fuse_bn(model, FuseConfig())
            plan_quantize(model, default_config(target))
            yield instrumentation, target
    finally:
        if prepared_here:
            strip(model)


def walked(instrumentation: Instrumentation, platform: Platform) -> Walk:
    """Read what runs of a planned model in evaluation."""
    sites = {site.key: site for site in instrumentation.sites}
    # The first recorded forward is the one in evaluation mode.
    return Walk(instrumentation.graph.runs[0], sites, platform, READERS)


def _platform_of(instrumentation: Instrumentation) -> str:
    """Return the platform that most sites are quantized for."""
    names = [site.platform_name for site in instrumentation.sites if site.quantized]
    return max(names, key=names.count)
