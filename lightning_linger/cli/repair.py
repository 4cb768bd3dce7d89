"""``lightning-linger repair``: where a ``linger`` file enters and leaves integers, derived anew."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_linger.core.errors import ConfigError
from lightning_linger.export.repair import repair_file

_DESCRIPTION = """\
Derive anew where a file of the linger dialect enters and leaves integers: Quant and Dequant nodes
are put where an op needs them, at the scale that the ops say, and taken out everywhere else.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "repair",
        help="put the Quant and Dequant nodes of a linger file where they belong",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    add("source", metavar="MODEL", type=Path, help="ONNX file, in either generation of names")
    add(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="file to write; by default MODEL with '_repaired' behind its name",
    )
    add("--force", action="store_true", help="overwrite FILE if it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Repair a file and print what was changed.

    Raises:
        ConfigError: If MODEL cannot be read, or FILE cannot be written or exists.
        UnsupportedError: If MODEL is no file of the dialect; names the node.
    """
    source: Path = arguments.source
    target: Path = arguments.output or source.with_name(f"{source.stem}_repaired{source.suffix}")
    if target.exists() and not arguments.force:
        msg = f"{str(target)!r} is there already. Pass another FILE, or --force to overwrite it."
        raise ConfigError(msg)
    changes = repair_file(source, target).changes
    for change in changes:
        print(change)
    print(f"{target}: {len(changes) or 'no'} change{'' if len(changes) == 1 else 's'}")
