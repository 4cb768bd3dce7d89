"""Running thinker's packer, the program that makes the image a chip loads from a `linger` file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.export.files import check_target, write_atomically
from lightning_linger.export.reading import platform_of, read_model

# Ops of which the engine computes the first image of a batch only.
_ONE_IMAGE = re.compile(r"Q?(Conv|AvgPool|MaxPool)")

_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_REFUSAL = re.compile(r"^Error occurred: (.*)$", re.MULTILINE)
_OPERATIONS = re.compile(r"total ops of model:\s*(\d+)")


@dataclass(frozen=True)
class Packed:
    """An image made by the packer.

    Args:
        path: The image.
        platform: The engine it is for, as the nodes spell it.
        operations: Operations of one inference, as the packer counts them.
        log: What the packer printed.
    """

    path: Path
    platform: str
    operations: int
    log: str


def pack(
    model: str | os.PathLike[str],
    image: str | os.PathLike[str],
    packer: str | os.PathLike[str] = "tpacker",
    *,
    timeout: float = 120.0,
    options: Sequence[str] = (),
) -> Packed:
    """Pack a file of the ``linger`` dialect into an image for its chip.

    The packer needs older releases of its libraries than this package does and lives in an
    environment of its own. It runs in a scratch folder, because it writes next to where it is
    started, and for a limited time, because some graphs keep it busy forever. Options that a model
    cannot do without are set: weights in shared memory for transposed convolutions on ``venus``,
    and no prefetching with an LSTM, whose image would break off.

    Args:
        model: The ONNX file, exported with a batch of one.
        image: The file to write; its folder has to exist. It appears whole or not at all.
        packer: The command, e.g. ``.venv-thinker/bin/tpacker``.
        timeout: Seconds after which the packer is stopped.
        options: Further arguments, e.g. ``["--psramsize", "4194304"]``. They win over ours.

    Returns:
        The image and what the packer said about it.

    Raises:
        ConfigError: If the command or a path is wrong, or the file holds no ONNX model, or a
            damaged one.
        UnsupportedError: If the packer refuses the model or does not finish, its nodes name several
            platforms, or it holds a batch, of which the engine computes the first image only.
    """
    source, target, command = _source(model), check_target(image), _command(packer)
    graph = read_model(source, weights=False).graph
    _refuse_batches(graph, source)
    platform = platform_of(graph)  # which the packer has to be told
    with tempfile.TemporaryDirectory(prefix="packer-") as scratch:
        made = Path(scratch) / "model.pkg"
        arguments = ["-g", str(source), "-o", str(made), "-p", platform.lower()]
        # The dump asks for the name of the terminal's user, and fails where there is no terminal.
        arguments += ["-d", "False", *_needed_options(graph, platform), *options]
        log = _run([command, *arguments], scratch, timeout, source)
        if not made.is_file():
            msg = (
                f"the packer refused {str(source)!r} for {platform}: {_reason(log)} Look the op up "
                "in the table of docs/packing.md, or leave it in float."
            )
            raise UnsupportedError(msg)
        write_atomically(target, made.read_bytes())
    operations = _OPERATIONS.search(log)
    return Packed(target, platform, int(operations[1]) if operations else 0, log)


def _source(model: str | os.PathLike[str]) -> Path:
    source = Path(model).absolute()
    if not source.is_file():
        msg = f"cannot pack {str(source)!r}: there is no such file."
        raise ConfigError(msg)
    return source


def _command(packer: str | os.PathLike[str]) -> str:
    found = shutil.which(packer)
    if found is None:
        msg = (
            f"there is no packer at {os.fspath(packer)!r}. Install it into an environment of its "
            "own, `make thinker-env` does so, and pass the path of its command."
        )
        raise ConfigError(msg)
    return str(Path(found).absolute())


# --- what a model needs -----------------------------------------------------------------------


def _needed_options(graph: onnx.GraphProto, platform: str) -> Iterator[str]:
    op_types = {node.op_type for node in graph.node}
    if platform == "venus" and any("ConvTranspose" in op_type for op_type in op_types):
        yield from ("-m", "params:share-mem")
    if any("LSTM" in op_type for op_type in op_types):
        yield from ("--dma_prefetch", "False")


def _refuse_batches(graph: onnx.GraphProto, source: Path) -> None:
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info)
    }
    for node in graph.node:
        shape = shapes.get(node.input[0]) if node.input else None
        if shape and _ONE_IMAGE.match(node.op_type) and shape[0] > 1:
            msg = (
                f"cannot pack {str(source)!r}: `{node.name}` gets {shape[0]} images, "
                "and the engine computes the first one only. Export with inputs for a batch of one."
            )
            raise UnsupportedError(msg)


# --- the process ------------------------------------------------------------------------------


def _run(command: list[str], folder: str, timeout: float, source: Path) -> str:
    """Run the packer and return what it printed, whether it succeeded or not."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        msg = (
            f"the packer did not finish {str(source)!r} in {timeout:g} s. Some sizes keep it busy "
            "forever, very large linear layers among them. Raise `timeout`, or make them smaller."
        )
        raise UnsupportedError(msg) from error
    except OSError as error:
        msg = f"cannot start the packer {command[0]!r}: {error}"
        raise ConfigError(msg) from error
    return _COLORS.sub("", done.stdout)


def _reason(log: str) -> str:
    """Return why the packer stopped: its own message, or the line that raised a bare assertion."""
    lines = [line.strip() for line in log.splitlines() if line.strip(" =")]
    found = _REFUSAL.search(log)
    message = found[1].strip() if found else ""
    if not message:
        raised = [line for line in lines if line.startswith("assert")]
        message = " ".join([*raised[-1:], *lines[-1:]]) or "it printed nothing"
    return message if message.endswith(".") else f"{message}."
