"""Command line: ``python -m benchmarks.accuracy [--task NAME ...] [--seeds N]``.

Results go to a file as they come, so an interrupted run goes on where it was. At last the tables of
docs/accuracy.md and the figure are made from that file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.accuracy.figure import FIGURE, draw
from benchmarks.accuracy.networks import Networks
from benchmarks.accuracy.page import PAGE, page
from benchmarks.accuracy.peers import PEER_RUNS, why_missing
from benchmarks.accuracy.quantized import calibrate, train_quantized
from benchmarks.accuracy.recipes import PEERS, PLAN, Recipe
from benchmarks.accuracy.results import SEEDS, STORED, Results
from benchmarks.accuracy.tasks import TASKS, Task
from benchmarks.accuracy.training import Score, quiet, score

NETWORKS = Path("runs/accuracy")


def run(recipe: Recipe, task: Task, seed: int, networks: Networks) -> Score:
    """Carry out a recipe and measure what came of it."""
    data = task.data(seed)
    match recipe.flow:
        case "float":
            return score(networks.tuned(task, seed), data[1])
        case "PTQ":
            return calibrate(recipe, task, networks.tuned(task, seed), data)
        case "QAT":
            return train_quantized(recipe, task, networks.trained(task, seed), data, seed)
        case "peer":
            peer = PEER_RUNS[recipe.scheme]
            return peer(recipe, task, networks.trained(task, seed), data, seed)


def planned(tasks: Sequence[str], seeds: int) -> Iterator[tuple[Recipe, Task, int]]:
    """Return every run of the plan in its order."""
    for step in PLAN:
        for name in step.tasks:
            if name in tasks:
                for seed in range(seeds):
                    for recipe in step.recipes:
                        yield recipe, TASKS[name], seed


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--only", nargs="+", default=[""], help="recipes with this in their name, e.g. 'QAT lsq 4'"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--results", type=Path, default=STORED, help="file of the results")
    parser.add_argument("--networks", type=Path, default=NETWORKS, help="folder of float networks")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file with the tables")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="picture to draw")
    parser.add_argument("--render", action="store_true", help="run nothing, only write the page")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what has no result yet, then write the page."""
    options = parse_arguments(arguments)
    text = options.page.read_text()
    torch.set_num_threads(1)
    quiet()
    results, networks = Results(options.results), Networks(options.networks)
    missing = {name: why_missing(name) for name in PEERS}
    for name, why in missing.items():
        if why is not None and not options.render:
            print(f"{name} is left out: {why}", flush=True)
    for recipe, task, seed in [] if options.render else planned(options.task, options.seeds):
        chosen = any(part in recipe.name for part in options.only)
        if not chosen or missing.get(recipe.scheme) or results.get(task, seed, recipe):
            continue
        begin = time.process_time()
        found = run(recipe, task, seed, networks)
        seconds = time.process_time() - begin
        results.put(task, seed, recipe, found)
        accuracy = f"{100 * found.correct / found.count:.2f} %"
        print(f"{task.name}, seed {seed}: {recipe.name}: {accuracy}, {seconds:.0f} s", flush=True)
    options.page.write_text(page(text, results))
    draw(results, options.figure)


if __name__ == "__main__":
    main()
