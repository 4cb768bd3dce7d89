"""``lightning-linger export``: a checkpoint as an ONNX file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lightning_linger.cli.models import add_model_arguments, build_prepared_model
from lightning_linger.core.errors import ConfigError
from lightning_linger.export.exporter import export_onnx

_DESCRIPTION = """\
Write the model of a checkpoint to an ONNX file, in the stage the checkpoint is in: quantized, or
plain ONNX of a float, folded or constrained model.

Example inputs have the shapes that the model was recorded with, unless --input or --batch says
otherwise. The packer of the engine needs --batch 1.
"""

_AXIS = re.compile(r"(?P<name>.+):(?P<axis>\d+)=(?P<label>\w+)")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "export",
        help="write the model of a checkpoint to an ONNX file",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, nargs="?", help="the same as --ckpt")
    add_model_arguments(parser)
    add("-o", "--output", metavar="PATH", type=Path, required=True, help="the file to write")
    add("--dialect", metavar="NAME", default="linger", help="linger (default), linger1 or qdq")
    add("--batch", metavar="N", type=int, help="batch size of the example inputs")
    add("--input-names", metavar="NAME", nargs="+", help="names of the graph's inputs")
    add("--output-names", metavar="NAME", nargs="+", help="names of the graph's outputs")
    add(
        "--dynamic",
        metavar="INPUT:AXIS=LABEL",
        action="append",
        default=[],
        help="leave a size open, e.g. x:0=batch; once for each axis",
    )
    add("--opset", metavar="N", type=int, help="version of standard ONNX, for qdq")
    add("--signed", action="store_true", help="int8 activations, for qdq")
    add("--int4-weights", action="store_true", help="int4 for weights of up to 4 bits, for qdq")
    add("--integer-inputs", action="store_true", help="take codes in the place of real values")
    add("--integer-outputs", action="store_true", help="give codes in the place of real values")
    add(
        "--external-data",
        action="store_true",
        default=None,
        help="write the weights to a file of their own",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Export, and say where to.

    Raises:
        LingerError: If the model cannot be made, or the file cannot be written.
    """
    dynamic_axes = _parse_axes(arguments.dynamic)
    arguments.ckpt = arguments.checkpoint or arguments.ckpt
    model, args, kwargs = build_prepared_model(arguments, arguments.batch)
    written = export_onnx(
        model,
        args,
        arguments.output,
        arguments.dialect,
        kwargs,
        input_names=arguments.input_names,
        output_names=arguments.output_names,
        dynamic_axes=dynamic_axes,
        integer_inputs=arguments.integer_inputs,
        integer_outputs=arguments.integer_outputs,
        opset_version=arguments.opset,
        signed=arguments.signed,
        int4_weights=arguments.int4_weights,
        external_data=arguments.external_data,
    )
    print(f"{written}: {arguments.dialect}, {written.stat().st_size:,} bytes")


def _parse_axes(texts: list[str]) -> dict[str, dict[int, str]]:
    axes: dict[str, dict[int, str]] = {}
    for text in texts:
        found = _AXIS.fullmatch(text)
        if found is None:
            msg = f"--dynamic is INPUT:AXIS=LABEL, e.g. x:0=batch. Found: {text!r}."
            raise ConfigError(msg)
        axes.setdefault(found["name"], {})[int(found["axis"])] = found["label"]
    return axes
