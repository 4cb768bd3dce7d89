"""``lightning-linger diff-dumps``: where two dumps differ first."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_linger.analysis.dumps import DumpDifferences, compare_references, diff_dumps
from lightning_linger.cli.output import print_table
from lightning_linger.core.errors import ConfigError

DIFFERENT = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "diff-dumps",
        help="name the first difference between two dumps of linger.Dumper",
        description="Compare two dumps of linger.Dumper op by op and name the first difference. "
        "With one dump, compare its results with the references it holds (compare=True), worst "
        "first. Exit code 0: nothing differs, 1: something does, 2: an error.",
    )
    parser.add_argument("first", metavar="DUMP", type=Path, help="folder of a dump")
    parser.add_argument(
        "second", metavar="OTHER", type=Path, nargs="?", help="folder of a dump to compare with"
    )
    parser.add_argument(
        "--rows", metavar="N", type=int, default=10, help="how many differences to show (10)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare.

    Raises:
        ConfigError: If a folder is no dump, or the dumps have different levels.
    """
    if arguments.rows < 1:
        msg = f"--rows is a positive number. Found: {arguments.rows}."
        raise ConfigError(msg)
    if arguments.second is None:
        found = compare_references(arguments.first).ranked()
    else:
        found = diff_dumps(arguments.first, arguments.second)
    if found.first is None:
        print("nothing differs")
        return 0
    if arguments.second is not None:
        row = found.first
        where = f" of {row.module}" if row.module else ""
        print(f"first difference: {row.op}{where}: {row.value or 'the op'}: {row.found}")
    print_table(DumpDifferences(found[: arguments.rows]))
    if len(found) > arguments.rows:
        print(f"... {len(found) - arguments.rows} more")
    return DIFFERENT
