"""``lightning-linger analyse``: magnitudes of weights and activations."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_linger.analysis.statistics import (
    THRESHOLD,
    Statistics,
    analyse_weights,
    measure_activations,
)
from lightning_linger.cli.models import add_model_arguments, build_model
from lightning_linger.cli.output import print_table
from lightning_linger.core.errors import ConfigError, LingerError
from lightning_linger.export.files import check_target
from lightning_linger.stages.checkpoints import recorded_example

_DESCRIPTION = """\
Measure the tensors of a model: mean and largest magnitude, the magnitude below which 99 % of the
values lie, and how far the largest reaches beyond it. Above --threshold a tensor is flagged: most
of its values would share few codes.

  lightning-linger analyse model.ckpt                               weights
  lightning-linger analyse --module my.net:Net --input 1x3x32x32    weights, and activations
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "analyse",
        help="show which weights and activations have outliers",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", type=Path, help="a checkpoint or a state dict")
    add_model_arguments(parser, required=False)
    add("--pattern", metavar="GLOB", default="*", help="only tensors of such names")
    add(
        "--threshold",
        metavar="X",
        type=float,
        default=THRESHOLD,
        help=f"flag from this ratio of the largest to the 99 %% magnitude on ({THRESHOLD:g})",
    )
    add(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="write the table, too: .csv, .json, or text",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Analyse, and print what was found.

    Raises:
        ConfigError: If nothing or too much is named, a model cannot be made or does not run, or no
            tensor matches.
    """
    if (arguments.source is None) == (arguments.module is None):
        msg = "pass either SOURCE, a checkpoint, or --module with the model's class."
        raise ConfigError(msg)
    if arguments.output is not None:
        check_target(arguments.output)
    if arguments.source is not None:
        found = analyse_weights(arguments.source, arguments.pattern, arguments.threshold)
    else:
        found = _analyse_model(arguments)
    print_table(found)
    if found.flagged:
        print(f"{len(found.flagged)} of {len(found)} tensors are flagged")
    if arguments.output is not None:
        print(f"written to {found.save(arguments.output)}")


def _analyse_model(arguments: argparse.Namespace) -> Statistics:
    model, args, kwargs = build_model(arguments)
    runner = model
    if args is None:
        runner, args, kwargs = recorded_example(model)
    weights = analyse_weights(model, threshold=arguments.threshold)
    try:
        activations = measure_activations(
            model,
            lambda: runner(*(args or ()), **(kwargs or {})),
            threshold=arguments.threshold,
        )
    except LingerError:
        raise
    except Exception as error:  # whatever the user's forward raises
        said = " ".join(str(error).split())
        msg = f"{type(model).__name__} does not run on the inputs: {said} Pass others with --input."
        raise ConfigError(msg) from error
    return Statistics([*weights, *activations]).matching(arguments.pattern)
