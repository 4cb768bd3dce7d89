"""What each layer of a model takes: multiplications, parameters, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_linger.analysis.memory import Plan, constant_bytes, plan_memory
from lightning_linger.analysis.planning import planned, walked
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.table import Table
from lightning_linger.platforms.limits import LIMITS, limits_of


@dataclass(frozen=True)
class ResourceRow:
    """What one layer takes; sizes are in bytes.

    Args:
        site: Site key. An op that becomes several layers has several rows.
        layer: What runs.
        macs: Multiplications with accumulation.
        parameters: Weights and biases.
        weights: Weights, as the image holds them.
        biases: Biases, as the image holds them.
        activations: Activations that live while it runs, and its workspace; an estimate.
    """

    site: str
    layer: str
    macs: int
    parameters: int
    weights: int
    biases: int
    activations: int


class Resources(Table[ResourceRow]):
    """Rows per layer, and totals; both print as a table.

    Args:
        rows: The rows.
        plan: Where the bytes go.
        platform: Name of the platform.
        share_memory_limit: What its engine has.
        psram_limit: What its engine has.

    Attributes:
        macs: Multiplications with accumulation of one forward.
        parameters: Weights and biases.
        flash: Bytes of weights and biases in the image.
        psram: The same, and activations that are too large for share memory; an estimate.
        share_memory: Activations that live at the same time, workspace and prefetched weights; an
            estimate from below of what the packer asks for.
    """

    row_type = ResourceRow

    def __init__(
        self,
        rows: Sequence[ResourceRow],
        plan: Plan,
        platform: str,
        share_memory_limit: int,
        psram_limit: int,
    ) -> None:
        super().__init__(rows)
        self.platform = platform
        self.macs = sum(row.macs for row in self)
        self.parameters = sum(row.parameters for row in self)
        self.flash = plan.constants
        self.psram = plan.psram
        self.share_memory = plan.share_memory
        self.share_memory_limit = share_memory_limit
        self.psram_limit = psram_limit
        self.plan = plan

    @property
    def fits(self) -> bool:
        """Whether the estimates stay within the engine's memories."""
        return self.share_memory <= self.share_memory_limit and self.psram <= self.psram_limit

    def cells(self) -> list[list[str]]:
        """Return the rows, and a last one with the totals."""
        found = [
            [row.site, row.layer, *(f"{number:,}" for number in _numbers(row))] for row in self
        ]
        weights, biases = sum(row.weights for row in self), sum(row.biases for row in self)
        most = max(self.plan.live, default=0)
        totals = (self.macs, self.parameters, weights, biases, most)
        return [*found, ["total", "", *(f"{number:,}" for number in totals)]]

    def __str__(self) -> str:
        """Return the table and what the memories have to hold."""
        lines = [
            super().__str__(),
            f"flash          {self.flash:>12,} bytes of weights and biases",
            f"psram          {self.psram:>12,} of {self.psram_limit:,} bytes (estimate)",
            f"share memory   {self.share_memory:>12,} of {self.share_memory_limit:,} bytes "
            f"(estimate, {sum(self.plan.buffers):,} of them prefetched weights)",
        ]
        return "\n".join(lines)


def resources(
    model: nn.Module,
    platform: str | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
) -> Resources:
    """Return what a model takes of an engine, per layer and in total.

    Args:
        model: A prepared model, quantized or not, or a plain one together with example inputs.
        platform: Name of the target; None takes the one that the model is quantized for, else
            ``venusa``.
        example_inputs: Positional inputs of one forward, for a plain model.
        example_kwargs: Keyword inputs.

    Raises:
        ConfigError: If the platform is unknown or has no engine with memories of its own, or a
            plain model comes without example inputs.
        UnsupportedError: If nothing in the model can be quantized.
    """
    with planned(model, platform, example_inputs, example_kwargs) as (instrumentation, target):
        engine = limits_of(target.name).engine
        if engine is None:
            known = sorted(name for name, limits in LIMITS.items() if limits.engine is not None)
            msg = (
                f"platform {target.name!r} has no memories to plan. Platforms with an engine of "
                f"their own: {known}."
            )
            raise ConfigError(msg)
        walk = walked(instrumentation, target)
        plan = plan_memory(walk, engine)
        rows = [
            ResourceRow(
                site=layer.site,
                layer=layer.kind,
                macs=layer.macs,
                parameters=layer.parameters,
                weights=constant_bytes(layer, engine)[0],
                biases=constant_bytes(layer, engine)[1],
                activations=live,
            )
            for layer, live in zip(walk.layers, plan.live, strict=True)
        ]
        return Resources(rows, plan, target.name, engine.share_memory, engine.psram)


def _numbers(row: ResourceRow) -> tuple[int, ...]:
    return (row.macs, row.parameters, row.weights, row.biases, row.activations)
