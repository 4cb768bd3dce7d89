"""The command ``lightning-linger``, one file per subcommand.

A subcommand is a module with ``add_parser(subparsers)``, which sets the default ``run``: a function
of the parsed arguments that raises a `LingerError` for what a user did wrong. It may return an exit
code of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lightning_linger.__about__ import __version__
from lightning_linger.cli import (
    analyse,
    check,
    convert_checkpoint,
    diff_dumps,
    export,
    inspect,
    repair,
    report,
    sensitivity,
    verify,
)
from lightning_linger.core.errors import LingerError

_SUBCOMMANDS = (
    analyse,
    check,
    convert_checkpoint,
    diff_dumps,
    export,
    inspect,
    repair,
    report,
    sensitivity,
    verify,
)

# What a shell reports of a process that a closed pipe ended.
_PIPE_CLOSED = 128 + 13


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        The exit code: that of the subcommand, 0 by default, 2 after an error, which is one line on
        the standard error, or 141 if nobody reads the output any more.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int | None = arguments.run(arguments)
        sys.stdout.flush()
    except LingerError as error:
        message = " ".join(str(error).split())
        print(f"lightning-linger: error: {message}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever reads has seen enough, as `head` has. The interpreter flushes again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-linger",
        description="Tools around quantization-aware training with lightning-linger.",
    )
    parser.add_argument("--version", action="version", version=f"lightning-linger {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)
    for subcommand in _SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    return parser
