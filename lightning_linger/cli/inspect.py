"""``lightning-linger inspect``: the integer chain of an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_linger.export.inspection import inspect_model


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "inspect",
        help="print what an ONNX file computes in integers, and where it leaves them",
        description="Print the integer chain of an ONNX file of the linger or qdq dialect, its "
        "scales, where it leaves integers, and what contradicts itself.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="ONNX file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the inspection of a file.

    Raises:
        ConfigError: If MODEL cannot be read.
        UnsupportedError: If an attribute is wrong; names the node.
    """
    print(inspect_model(arguments.model))
