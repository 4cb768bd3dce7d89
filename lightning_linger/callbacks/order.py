"""float -> fold -> normalize -> quantize -> freeze: whether the schedules of a run keep to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning_linger.callbacks._compat import misconfiguration


def ordered(stages: Sequence[Any]) -> list[Any]:
    """Return stage callbacks in the order in which they build on each other.

    Raises:
        MisconfigurationException: If there are two of a kind.
    """
    by_order: dict[int, Any] = {}
    for callback in stages:
        if callback.order in by_order:
            msg = f"The trainer has two {type(callback).__name__}s. HINT: keep one."
            raise misconfiguration(msg)
        by_order[callback.order] = callback
    return [by_order[order] for order in sorted(by_order)]


def check_order(stages: Sequence[Any]) -> None:
    """Refuse schedules that are out of order whatever the data is.

    Args:
        stages: As :func:`ordered` returns them.

    Raises:
        MisconfigurationException: Naming both callbacks.
    """
    for early, late in pairwise(stages):
        first, second = early.schedule, late.schedule
        for name in ("at_epoch", "at_step"):
            one, other = getattr(first, name), getattr(second, name)
            if one is not None and other is not None and one > other:
                raise misconfiguration(_out_of_order(early, late, f"{name}={other}"))
        if first.when is not None and second.when is None:
            msg = (
                f"{_named(late)} may start before {_named(early)}, on which it builds. HINT: give "
                f"it a `when` too: it is asked once {type(early).__name__} is on."
            )
            raise misconfiguration(msg)
        if early.needed_by_later and _ends_before(first, second):
            msg = (
                f"{type(early).__name__}(end_epoch={first.end_epoch}) ends while {_named(late)} "
                "is on, which builds on it. HINT: leave `end_epoch` away, or end both."
            )
            raise misconfiguration(msg)


def check_order_in_steps(stages: Sequence[Any], steps_per_epoch: float) -> None:
    """Refuse schedules that are out of order once it is known how many steps an epoch has.

    Args:
        stages: As :func:`ordered` returns them.
        steps_per_epoch: Optimizer steps; infinite if it is not known.

    Raises:
        MisconfigurationException: Naming both callbacks.
    """
    if math.isinf(steps_per_epoch):
        return
    for early, late in pairwise(stages):
        first, second = (_first_step(stage.schedule, steps_per_epoch) for stage in (early, late))
        if first is not None and second is not None and first > second:
            where = f"step {second:.0f} (an epoch has {steps_per_epoch:.0f} steps)"
            raise misconfiguration(_out_of_order(early, late, where))


def _first_step(schedule: Any, steps_per_epoch: float) -> float | None:
    if schedule.at_step is not None:
        return float(schedule.at_step)
    return None if schedule.at_epoch is None else schedule.at_epoch * steps_per_epoch


def _ends_before(first: Any, second: Any) -> bool:
    if first.end_epoch is None:
        return False
    return second.end_epoch is None or second.end_epoch > first.end_epoch


def _named(callback: Any) -> str:
    return f"{type(callback).__name__}({callback.schedule})"


def _out_of_order(early: Any, late: Any, where: str) -> str:
    return (
        f"{_named(early)} cannot start after {_named(late)}, which builds on it. HINT: start it at "
        f"{where} or earlier."
    )
