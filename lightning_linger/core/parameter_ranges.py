"""Ranges of parameters of one site: where their steps come from, and steps that stand still."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.capture import capturing
from lightning_linger.core.errors import ConfigError
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.float32_state import Float32State
from lightning_linger.core.grid import Grid
from lightning_linger.core.ranges import LearnedScale, RangeRule

# Buffers that hold the steps while ranges are frozen.
_HELD = "held_"
DEFAULT_BITS = 8


class ParameterRanges(Float32State):
    """What the weights of a site are rounded to, or the running statistics of its batch norm.

    Args:
        key: Of the site, for messages.

    Attributes:
        grid: Grid of the parameters; None while the site has none to round.
        rule: Their range estimator.
        learned: Learned range of the weight, None for one that is only measured.
        learned_parts: Those of further weights, where the op has several.
        frozen: Whether the steps stay what they are.
        latest_steps: Steps in the latest forward, by the name of the parameter.
    """

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.frozen = False
        self.latest_steps: dict[str, Scalar] = {}
        self.grid: Grid | None = None
        self.rule: RangeRule | None = None
        self.learned: LearnedScale | None = None
        self.learned_parts = nn.ModuleDict()

    @property
    def bits(self) -> int:
        """Width of the parameters."""
        return self.grid.bits if self.grid else DEFAULT_BITS

    @property
    def clips(self) -> bool:
        """Whether values may lie beyond their range, which leaves some out or stands still."""
        return self.frozen or (self.rule is not None and self.rule.clips)

    def reach(self, rows: Tensor, grid: Grid | None = None) -> Tensor:
        """Return the half-range of a parameter by the estimator.

        Args:
            rows: Detached, ``[R, N]``: a row for each scale.
            grid: What it is measured for; by default that of the parameters.

        Returns:
            float32 ``[R]``.
        """
        rule, grid = self.rule, grid or self.grid
        assert rule is not None  # the planner gives both to every op that has parameters
        assert grid is not None
        if rule.statistic is None:
            _, half = rule.fixed or (0.0, 0.0)
            return rows.new_full((rows.shape[0],), half, dtype=torch.float32)
        return rule.statistic.measure(rows, None, grid)

    def learned_scale(self, name: str) -> LearnedScale | None:
        """Return the learned range of a weight, None for one that is only measured.

        Args:
            name: Tells the weights of the site apart.
        """
        if name == "weight":
            return self.learned
        parts: dict[str, Any] = dict(self.learned_parts.items())
        return parts.get(name)

    def learned_scales(self) -> list[LearnedScale]:
        """Return the learned ranges."""
        found: Any = [self.learned, *self.learned_parts.values()]
        return [learned for learned in found if learned is not None]

    def freeze(self, frozen: bool) -> None:
        """Let the steps stay what they are, or follow the parameters again."""
        self.frozen = frozen
        for learned in self.learned_scales():
            learned.requires_grad_(not frozen)
        if not frozen:
            self.release_steps()

    def held(self, name: str, step: Scalar) -> Scalar:
        """Return the step of a parameter, which stays what it is while ranges are frozen.

        Args:
            name: Tells the parameters of the site apart.
            step: What the parameter asks for now.

        Raises:
            ConfigError: If as many steps were never to be held.
        """
        if self.frozen:
            kept: Any = self._buffers.get(_held(name))
            if kept is None and not capturing():
                kept = self.hold(name, step)
            if kept is not None:
                count = 1 if isinstance(step, float) else step.numel()
                if kept.numel() != count:
                    msg = (
                        f"`{self.key}`: its weight has {count} scales, and is to have "
                        f"{kept.numel()} fixed ones. Load those of a model that is quantized alike."
                    )
                    raise ConfigError(msg)
                step = float(kept) if isinstance(step, float) else kept.to(step.device)
        if not capturing():
            self.latest_steps[name] = step
        return step

    def hold(self, name: str, step: Scalar) -> Tensor:
        """Set the step that a parameter has while ranges are frozen, and return it.

        Args:
            name: Tells the parameters of the site apart.
            step: 0-dim, or one per channel.
        """
        kept = torch.as_tensor(step, dtype=torch.float32).clone()
        self.register_buffer(_held(name), kept)
        return kept

    def step_in_use(self, name: str) -> Tensor | None:
        """Return the step that a parameter is held at, or had in the latest forward; None before.

        Args:
            name: Tells the parameters of the site apart.
        """
        kept: Any = self._buffers.get(_held(name))
        step = self.latest_steps.get(name) if kept is None else kept
        return None if step is None else torch.as_tensor(step, dtype=torch.float32).detach().clone()

    def release_steps(self) -> None:
        """Forget the steps that were held while ranges were frozen."""
        for name in [name for name in self._buffers if name.startswith(_HELD)]:
            del self._buffers[name]

    def change_width(self, bits: int) -> None:
        """Go on with weights of another width; steps of the width before are forgotten."""
        assert self.grid is not None  # the caller changes weights that are rounded
        self.grid = dataclasses.replace(self.grid, bits=bits)
        self.release_steps()
        self.latest_steps = {}
        for learned in self.learned_scales():
            learned.change_grid(self.grid)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.release_steps()
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name.startswith(_HELD):
                self.register_buffer(name, torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _held(name: str) -> str:
    return _HELD + name.replace(".", ":")
