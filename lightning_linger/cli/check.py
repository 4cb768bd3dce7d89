"""``lightning-linger check``: whether a model can be deployed, before it is trained."""

from __future__ import annotations

import argparse

from lightning_linger.analysis.check import check
from lightning_linger.analysis.planning import DEFAULT_PLATFORM
from lightning_linger.analysis.resources import resources
from lightning_linger.cli.models import add_model_arguments, build_model, shapes_of
from lightning_linger.core.errors import ConfigError, LingerError
from lightning_linger.platforms import PLATFORMS

_DESCRIPTION = """\
Check a model against what is known about a target: kernels, strides, sizes, widths, memory, ops.

The exit code is 0 if the model can be deployed, 1 if there is an error among the findings, 2 if the
command is wrong. Training is not needed; the weights may be random.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "check",
        help="check whether a model can be deployed",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--platform",
        metavar="NAME",
        help=f"the target, one of {', '.join(PLATFORMS)}; by default that of the checkpoint, or "
        f"{DEFAULT_PLATFORM}",
    )
    parser.add_argument(
        "--resources",
        action="store_true",
        help="print multiplications, parameters and memory of each layer, too",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, and print what was found.

    Returns:
        0 if the model can be deployed, else 1.

    Raises:
        ConfigError: If the model cannot be made, or does not run on the inputs.
        UnsupportedError: If nothing in it can be quantized.
    """
    platform = arguments.platform
    model, args, kwargs = build_model(arguments)
    try:
        findings = check(model, platform, args, kwargs)
        report = resources(model, platform, args, kwargs) if arguments.resources else None
    except LingerError:
        raise
    except Exception as error:  # whatever the user's forward raises
        said, inputs = " ".join(str(error).split()), shapes_of(args or (), kwargs or {})
        msg = (
            f"{type(model).__name__} does not run on the inputs {inputs}: {said} Pass other shapes "
            "with --input."
        )
        raise ConfigError(msg) from error
    print(findings)
    if report is not None:
        print(f"\n{report}")
    return 0 if findings.deployable else 1
