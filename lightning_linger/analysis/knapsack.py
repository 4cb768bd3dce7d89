"""The multiple-choice knapsack problem, solved exactly in whole numbers.

Of every class one option is taken, so that the costs stay within a budget and the sum of losses is
least. Partial choices are extended class by class; one is dropped if another one costs and loses no
more (dominance), or if even the linear relaxation of the remaining classes, whose solution is
greedy (Sinha and Zoltners, 1979), cannot make it better than a whole choice that is known.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Option:
    """One option of a class.

    Args:
        cost: What it takes of the budget, not negative.
        loss: What is to be small; may be negative.
    """

    cost: int
    loss: int


# A partial choice: its cost, its loss, and the indices chosen so far, latest first.
_Chain = tuple[int, "_Chain"] | None
_State = tuple[int, int, _Chain]


def least_loss(classes: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """Choose an option of every class, with the least sum of losses within the budget.

    Args:
        classes: At least one option each.
        budget: What the sum of costs may be.

    Returns:
        The index of the option of each class; None if even the cheapest exceed the budget.
    """
    rests = _relaxations(classes)
    if rests[0].least_cost > budget:
        return None
    loss, best = rests[0].completed(budget)
    states: list[_State] = [(0, 0, None)]
    for position, options in enumerate(classes):
        rest = rests[position + 1]
        found: list[tuple[int, _State]] = []
        for cost, lost, chain in states:
            for index, option in enumerate(options):
                spent, total = cost + option.cost, lost + option.loss
                if spent + rest.least_cost > budget:
                    continue
                bound = total + rest.bound(budget - spent)
                if bound < loss:
                    found.append((bound, (spent, total, (index, chain))))
        if not found:
            return best
        _, promising = min(found, key=lambda item: item[0])
        more, completion = rest.completed(budget - promising[0])
        if promising[1] + more < loss:
            loss, best = promising[1] + more, _indices(promising[2]) + completion
        states = _undominated([state for bound, state in found if bound < loss])
        if not states:
            return best
    return best


def _undominated(states: list[_State]) -> list[_State]:
    kept: list[_State] = []
    for state in sorted(states, key=lambda item: item[:2]):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept


def _indices(chain: _Chain) -> list[int]:
    indices = []
    while chain is not None:
        index, chain = chain
        indices.append(index)
    return indices[::-1]


@dataclass(frozen=True)
class _Gain:
    """A step along the convex hull of a class: more cost, less loss."""

    position: int
    index: int
    cost: int
    loss: int


def _relaxations(classes: Sequence[Sequence[Option]]) -> list[_Relaxation]:
    """Return the relaxation of all classes, of all but the first, and so on."""
    hulls = [_hull(options) for options in classes]
    gains = [
        _Gain(
            position,
            after,
            options[after].cost - options[before].cost,
            options[after].loss - options[before].loss,
        )
        for position, (options, hull) in enumerate(zip(classes, hulls, strict=True))
        for before, after in pairwise(hull)
    ]
    steepest = sorted(gains, key=lambda gain: Fraction(gain.loss, gain.cost))
    start = [hull[0] for hull in hulls]
    return [
        _Relaxation(classes, start, [gain for gain in steepest if gain.position >= first], first)
        for first in range(len(classes) + 1)
    ]


class _Relaxation:
    """The last classes, of which fractions of options may be taken.

    Args:
        classes: All classes.
        start: Index of the cheapest option of each.
        gains: What more cost brings, steepest first.
        first: Position of the first of the classes.
    """

    def __init__(
        self,
        classes: Sequence[Sequence[Option]],
        start: list[int],
        gains: list[_Gain],
        first: int,
    ) -> None:
        cheapest = [options[i] for options, i in zip(classes[first:], start[first:], strict=True)]
        self.least_cost = sum(option.cost for option in cheapest)
        self._loss = sum(option.loss for option in cheapest)
        self._start, self._first, self._gains = start[first:], first, gains
        self._costs = [0, *accumulate(gain.cost for gain in gains)]
        self._losses = [0, *accumulate(gain.loss for gain in gains)]

    def bound(self, budget: int) -> int:
        """Return a whole number that no choice within the budget is below.

        Args:
            budget: At least ``least_cost``.
        """
        room = budget - self.least_cost
        whole = bisect.bisect_right(self._costs, room) - 1
        loss = self._loss + self._losses[whole]
        if whole < len(self._gains):
            gain = self._gains[whole]
            loss += gain.loss * (room - self._costs[whole]) // gain.cost
        return loss

    def completed(self, budget: int) -> tuple[int, list[int]]:
        """Return the loss and the indices of a choice that takes gains greedily.

        Args:
            budget: At least ``least_cost``.
        """
        room, loss, chosen = budget - self.least_cost, self._loss, list(self._start)
        closed: set[int] = set()
        for gain in self._gains:
            # A step builds on the one before it.
            if gain.position not in closed and gain.cost <= room:
                room, loss = room - gain.cost, loss + gain.loss
                chosen[gain.position - self._first] = gain.index
            else:
                closed.add(gain.position)
        return loss, chosen


def _hull(options: Sequence[Option]) -> list[int]:
    """Return the options on the lower convex hull, from the cheapest to the one of least loss."""
    order = sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].loss))
    hull: list[int] = []
    for index in order:
        option = options[index]
        if hull and option.loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _is_above(options[hull[-2]], options[hull[-1]], option):
            hull.pop()
        hull.append(index)
    return hull


def _is_above(left: Option, middle: Option, right: Option) -> bool:
    """Whether the middle option is on or above the line between the other two."""
    return (middle.loss - left.loss) * (right.cost - left.cost) >= (right.loss - left.loss) * (
        middle.cost - left.cost
    )
