"""float -> fold -> normalize -> quantize -> freeze: whether the schedules of a run keep to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning_linger.callbacks._compat import misconfiguration
from lightning_linger.callbacks.schedule import NEVER


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


def epoch_length(trainer: Any) -> float:
    """Return how many optimizer steps an epoch of a running ``fit`` has; infinite if not known."""
    steps: float = trainer.num_training_batches / trainer.accumulate_grad_batches
    return steps if math.isinf(steps) else math.ceil(steps)


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
        first, second = (first_step(stage.schedule, steps_per_epoch) for stage in (early, late))
        if first is not None and second is not None and first > second:
            where = f"step {second:.0f} (an epoch has {steps_per_epoch:.0f} steps)"
            raise misconfiguration(_out_of_order(early, late, where))


def check_algorithms(
    callbacks: Sequence[Any],
    stages: Sequence[Any],
    algorithms: Sequence[Any],
    steps_per_epoch: float = math.inf,
) -> None:
    """Refuse algorithms that cannot act when they are to, or not with each other.

    Args:
        callbacks: All callbacks of the trainer, in its order.
        stages: Those that are stages.
        algorithms: Those that change parameters once.
        steps_per_epoch: Optimizer steps; infinite while it is not known.

    Raises:
        MisconfigurationException: Naming both callbacks.
    """
    _check_company(callbacks, stages, algorithms)
    by_name = {stage.stage: stage for stage in stages}
    quantize = by_name.get("quantize")
    places = {callback: index for index, callback in enumerate(callbacks)}

    def early_enough(first: Any, second: Any) -> bool:
        """Whether one acts before the other, as far as that is known by now."""
        order = _compared(first.schedule, second.schedule, steps_per_epoch)
        return order is None or order < 0 or (order == 0 and places[first] < places[second])

    for algorithm in algorithms:
        for stage in filter(None, (by_name.get("normalize"), quantize)):
            if not algorithm.needs_ranges and not early_enough(algorithm, stage):
                # In the very epoch in which quantization starts no range has been seen yet.
                order = _compared(algorithm.schedule, stage.schedule, steps_per_epoch)
                if order == 0 and stage is quantize and not _at_end(stage):
                    continue
                raise misconfiguration(_must_precede(algorithm, stage))
        if algorithm.needs_ranges and quantize is not None:
            order = _compared(quantize.schedule, algorithm.schedule, steps_per_epoch)
            together = order == 0 and not _at_end(algorithm)
            if together or not early_enough(quantize, algorithm):
                raise misconfiguration(_must_follow(algorithm, quantize))
    in_order = sorted(algorithms, key=lambda algorithm: algorithm.order)
    for early, late in pairwise(in_order):
        if not early_enough(early, late):
            raise misconfiguration(_must_precede(early, late))


def _check_company(
    callbacks: Sequence[Any], stages: Sequence[Any], algorithms: Sequence[Any]
) -> None:
    found: dict[int, Any] = {}
    for algorithm in algorithms:
        name = type(algorithm).__name__
        other = found.setdefault(algorithm.order, algorithm)
        if other is not algorithm:
            msg = f"The trainer has two {name}s. HINT: keep one."
            if type(other) is not type(algorithm):
                msg = (
                    f"{type(other).__name__} and {name} both bring the quantized model near the "
                    "float one, and after the first there is none to compare with. HINT: keep "
                    "AdaRoundCallback, which leaves little to correct, or BiasCorrectionCallback, "
                    "which is quicker."
                )
            raise misconfiguration(msg)
        if not any(stage.stage == "quantize" for stage in stages):
            msg = (
                f"{name} prepares a model for quantization, or improves a quantized one. HINT: add "
                "a CalibrateCallback or a QuantizeCallback."
            )
            raise misconfiguration(msg)
        for callback in callbacks:
            if any(base.__name__ in _AVERAGING for base in type(callback).__mro__):
                msg = (
                    f"{type(callback).__name__} would average parameters from before and after "
                    f"{name}. HINT: call `linger.{algorithm.name}` after `fit` instead."
                )
                raise misconfiguration(msg)


_AVERAGING = {"WeightAveraging", "StochasticWeightAveraging"}


def _at_end(callback: Any) -> bool:
    return bool(callback.schedule.at_epoch == NEVER)


def _compared(first: Any, second: Any, steps_per_epoch: float) -> float | None:
    """Return less than, equal to or more than zero as one start is before the other.

    None while that is not known: a condition, or steps and epochs without the length of one.
    """
    for name in ("at_epoch", "at_step"):
        one, other = getattr(first, name), getattr(second, name)
        if one is not None and other is not None:
            return float(one - other)
    if NEVER in (first.at_epoch, second.at_epoch):
        return -1.0 if second.at_epoch == NEVER else 1.0
    if math.isinf(steps_per_epoch):
        return None
    one, other = (first_step(schedule, steps_per_epoch) for schedule in (first, second))
    return None if one is None or other is None else one - other


def _must_precede(algorithm: Any, other: Any) -> str:
    return (
        f"{_acting(algorithm)} has to act before {_acting(other)}. HINT: let it act earlier, or "
        "list it before where both act at once."
    )


def _must_follow(algorithm: Any, quantize: Any) -> str:
    return (
        f"{_acting(algorithm)} needs a quantized model that has seen ranges, from "
        f"{_acting(quantize)}. HINT: let it act in a later epoch, or list it behind where both "
        "act at the end of fit."
    )


def _acting(callback: Any) -> str:
    return f"{type(callback).__name__}(at the end)" if _at_end(callback) else _named(callback)


def first_step(schedule: Any, steps_per_epoch: float) -> float | None:
    """Return the optimizer step at which a schedule starts; None if a condition decides."""
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
