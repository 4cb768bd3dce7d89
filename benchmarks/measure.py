"""Interleaved timing: every ratio is taken inside one round, between two neighbouring runs."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

WARMUP_CALLS = 4
# Shorter calls are repeated up to this many seconds, so that reading the clocks does not show.
SHORTEST_MEASUREMENT = 0.02


class Cost(NamedTuple):
    """Seconds of wall time and of CPU time (all threads of the process)."""

    wall: float
    cpu: float


Call = Callable[[], object]
Meter = Callable[[], Cost]


class Spread(NamedTuple):
    """What the rounds gave: smallest, median and largest."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarize the values of all rounds."""
        return cls(min(values), statistics.median(values), max(values))


@dataclass(frozen=True)
class Row:
    """One line of the report: a contestant in multiples of its group's baseline.

    Args:
        group: What is compared.
        contestant: Whose cost this is.
        wall: Ratio of the wall times.
        cpu: Ratio of the CPU times.
        seconds: Median wall time of the contestant itself.
        note: Anything else worth reporting.
    """

    group: str
    contestant: str
    wall: Spread
    cpu: Spread
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Effort:
    """How much to measure."""

    rounds: int
    quick: bool = False


def clock(call: Call, calls: int = 1) -> Cost:
    """Run ``call`` the given number of times and return the cost of one."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Cost(wall / calls, cpu / calls)


def meter(call: Call) -> Meter:
    """Warm ``call`` up and return a meter of it that repeats short calls."""
    fastest = min(clock(call).wall for _ in range(WARMUP_CALLS))
    calls = math.ceil(SHORTEST_MEASUREMENT / fastest)
    return lambda: clock(call, calls)


def compare(
    group: str,
    baseline: Meter,
    contestants: Mapping[str, Meter],
    rounds: int,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """Measure each contestant next to the baseline, in every round.

    Who goes first alternates, so that a drift of the machine's speed cancels out of the median.

    Args:
        group: What is compared.
        baseline: Meter of what counts as 1.
        contestants: Meters by name; a second copy of the baseline among them is the noise floor.
        rounds: Number of ratios per contestant.
        notes: Remarks by contestant name.
    """
    pairs: dict[str, list[tuple[Cost, Cost]]] = {name: [] for name in contestants}
    for index in range(rounds):
        for name, contestant in contestants.items():
            if index % 2:
                cost, unit = contestant(), baseline()
            else:
                unit, cost = baseline(), contestant()
            pairs[name].append((cost, unit))
    return [
        Row(
            group,
            name,
            wall=Spread.of([cost.wall / unit.wall for cost, unit in costs]),
            cpu=Spread.of([cost.cpu / unit.cpu for cost, unit in costs]),
            seconds=statistics.median(cost.wall for cost, _ in costs),
            note=(notes or {}).get(name, ""),
        )
        for name, costs in pairs.items()
    ]
