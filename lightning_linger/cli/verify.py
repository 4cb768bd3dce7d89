"""``lightning-linger verify``: whether a file computes what the model of a checkpoint computes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lightning_linger.cli.arrays import read_arrays
from lightning_linger.cli.models import add_model_arguments, build_prepared_model
from lightning_linger.core.errors import ConfigError
from lightning_linger.export.reading import input_names, read_model
from lightning_linger.export.verification import (
    batches,
    compare_raw,
    dialect_in,
    engine_input,
    engine_output,
    verify,
    write_raw,
)

_DESCRIPTION = """\
Run an ONNX file and the integer model of the checkpoint that it was made of on data, and compare
every element. The exit code is 0 if all are equal, 1 if not, 2 if the command is wrong.

With --input-bin the codes of the first batch are written as the engine reads them; with
--output-bin what the engine, or a board, made of them is compared too. Several inputs or outputs
take as many paths, in the order of the graph.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="compare an ONNX file with the model of a checkpoint",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="the ONNX file")
    add_model_arguments(parser)
    add(
        "--data",
        metavar="PATH",
        type=Path,
        nargs="+",
        required=True,
        help="samples: an .npz with an array per input, or an .npy per input; other arrays of an "
        ".npz (labels) are left alone",
    )
    add("--input-bin", metavar="PATH", type=Path, nargs="+", default=[], help="files to write")
    add("--output-bin", metavar="PATH", type=Path, nargs="+", default=[], help="files to compare")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify, and print the verdict.

    Returns:
        0 if everything is equal, else 1.

    Raises:
        LingerError: If a file cannot be read or run, or does not fit.
    """
    graph = read_model(arguments.model).graph
    data = read_arrays(arguments.data, input_names(graph))
    model, args, kwargs = build_prepared_model(arguments)
    verdict = verify(model, arguments.model, data, args, kwargs)
    print(verdict)
    same = verdict.equal
    if arguments.input_bin or arguments.output_bin:
        same &= _exchange(arguments, next(batches(graph, data)))
    return 0 if same else 1


def _exchange(arguments: argparse.Namespace, batch: Mapping[str, NDArray[Any]]) -> bool:
    """Write the engine's input and compare its output."""
    path = arguments.model
    if dialect_in(read_model(path)) != "linger":
        msg = f"{str(path)!r} is no file of the linger dialect, which the engine reads."
        raise ConfigError(msg)
    codes = engine_input(path, batch)
    _require_as_many("--input-bin", arguments.input_bin, list(codes))
    for target, (name, array) in zip(arguments.input_bin, codes.items(), strict=False):
        written = write_raw(array, target)
        print(f"{written}: input {name!r}, {array.dtype} {list(array.shape)}")
    expected = engine_output(path, batch)
    _require_as_many("--output-bin", arguments.output_bin, list(expected))
    same = True
    for source, (name, (array, step)) in zip(arguments.output_bin, expected.items(), strict=False):
        difference = compare_raw(source, name, array, step)
        same &= difference is None
        print(f"{source}: {'equal' if difference is None else f'DIFFERENT: {difference}'}")
    return same


def _require_as_many(option: str, paths: list[Path], names: list[str]) -> None:
    if paths and len(paths) != len(names):
        msg = f"{option} takes a path for each of {names}. Found: {len(paths)}."
        raise ConfigError(msg)
