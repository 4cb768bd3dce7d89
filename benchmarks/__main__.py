"""Command line of the benchmarks: ``python -m benchmarks [--quick] [--only NAME ...]``."""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterable
from functools import partial

import torch

from benchmarks import dashboards, integer_conv, kernels, recurrent, trainer_overhead, training
from benchmarks.measure import Effort, Row, Spread

# Spinning OpenMP threads make a busy machine many times slower, and they inflate CPU time.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
THREADS = 2

SECTIONS: dict[str, Callable[[Effort], list[Row]]] = {
    **{name: partial(training.measure, name) for name in training.WORKLOADS},
    "recurrent": recurrent.measure,
    "kernels": kernels.measure,
    "integer_conv": integer_conv.measure,
    "trainer": trainer_overhead.measure,
    "dashboards": dashboards.measure,
}


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 rounds, less data")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="NAME", help=", ".join(SECTIONS)
    )
    parser.add_argument("--rounds", type=int, help="ratios per contestant (default 15)")
    parser.add_argument("--compile", action="store_true", help="compare compiled DS-CNN as well")
    return parser.parse_args()


def format_spread(spread: Spread) -> str:
    """Return ``low / **median** / high``."""
    return f"{spread.low:.2f} / **{spread.median:.2f}** / {spread.high:.2f}"


def format_seconds(seconds: float) -> str:
    """Return a duration in milliseconds, or microseconds where it is short."""
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def print_table(rows: Iterable[Row]) -> None:
    """Print the rows as a Markdown table."""
    print("| what / baseline | contestant | wall | CPU | median | note |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            row.group,
            row.contestant,
            format_spread(row.wall),
            format_spread(row.cpu),
            format_seconds(row.seconds),
            row.note,
        ]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Measure the chosen sections, report each as it ends and all of them at last."""
    arguments = parse_arguments()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # OpenMP reads its environment when it is loaded, which importing torch has already done.
        os.execve(sys.executable, sys.orig_argv, os.environ | ENVIRONMENT)
    torch.set_num_threads(THREADS)
    rounds = arguments.rounds or (3 if arguments.quick else 15)
    effort = Effort(rounds, arguments.quick)

    sections = [SECTIONS[name] for name in arguments.only or SECTIONS]
    if arguments.compile:
        sections.append(partial(training.measure_compiled, "ds_cnn"))
    rows: list[Row] = []
    for section in sections:
        for row in section(effort):
            print(
                f"{row.group:50} {row.contestant:28} "
                f"wall {row.wall.median:6.2f}  CPU {row.cpu.median:6.2f}  {row.note}",
                flush=True,
            )
            rows.append(row)

    print(
        f"\ntorch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{THREADS} threads; {rounds} rounds; min / **median** / max of the ratio\n"
    )
    print_table(rows)


if __name__ == "__main__":
    main()
