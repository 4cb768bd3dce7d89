"""``lightning-linger convert-checkpoint``: a checkpoint in another layout."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import STATE_NAME
from lightning_linger.export.catch import from_catch, read_layers, to_catch
from lightning_linger.export.files import check_target, write_atomically
from lightning_linger.nn.conversion import check_layout, convert, find_layers
from lightning_linger.stages.checkpoints import read_checkpoint

_DESCRIPTION = """\
Convert LSTM layers with projection, or a model that is quantized for Cambricon's MLU, from one
checkpoint layout to another.

one direction:
  asr                  LSTMP of pytorch-asr-extension
  lstmp                lightning_linger.nn.LSTMP
  torch                nn.LSTM(..., proj_size=...)

two directions:
  asr-ublstmp          UBLSTMP of pytorch-asr-extension
  ublstmp              lightning_linger.nn.UBLSTMP
  fast-ublstmp         two nn.LSTM, forward_lstmp and backward_lstmp
  lstmp-pair           two LSTMP, such as lstmp and lstmp2
  torch-bidirectional  nn.LSTM(..., proj_size=..., bidirectional=True)

a whole quantized model:
  linger               calibrated for platform mlu
  catch                what Cambricon's CATCH loads; into linger it needs --like
"""

# Layouts of a whole model.
_MODELS = ("linger", "catch")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "convert-checkpoint",
        help="convert layers, or a quantized model, to another checkpoint layout",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="checkpoint to read")
    add("target", metavar="TARGET", type=Path, help="checkpoint to write")
    add("--from", dest="old", metavar="LAYOUT", required=True, help="layout of SOURCE")
    add("--to", dest="new", metavar="LAYOUT", required=True, help="layout of TARGET")
    add(
        "--prefix",
        metavar="PATH",
        help="convert only the layer at this dotted path; by default, every layer in the layout",
    )
    add(
        "--key",
        metavar="NAME",
        help="entry of SOURCE that is the state dict; by default 'state_dict' if there is one, as "
        "in a Lightning checkpoint, otherwise SOURCE itself",
    )
    add(
        "--like",
        metavar="CHECKPOINT",
        type=Path,
        help="from catch to linger: state dict of the model, quantized in the same way",
    )
    add("--force", action="store_true", help="overwrite TARGET if it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Convert a checkpoint.

    Raises:
        ConfigError: If SOURCE cannot be read or does not have the layout, or if TARGET cannot be
            written or exists.
    """
    whole = {arguments.old, arguments.new} & set(_MODELS)
    if whole:
        _check_model_layouts(arguments)
    else:
        check_layout(arguments.old)
        check_layout(arguments.new)
    source, target = arguments.source, check_target(arguments.target)
    if target.exists() and not arguments.force:
        kind = "SOURCE itself" if source.exists() and target.samefile(source) else "there already"
        msg = f"{str(target)!r} is {kind}. Pass another TARGET, or --force to overwrite it."
        raise ConfigError(msg)
    checkpoint = read_checkpoint(source)
    key = arguments.key
    if key is None and isinstance(checkpoint.get("state_dict"), Mapping):
        key = "state_dict"
    state_dict = checkpoint if key is None else _entry(checkpoint, key, source)
    if whole:
        converted, paths = _convert_model(state_dict, arguments)
    else:
        converted, paths = _convert_layers(state_dict, arguments)
    result = converted if key is None else {**checkpoint, key: converted}
    buffer = io.BytesIO()
    torch.save(result, buffer)
    write_atomically(target, buffer.getvalue())
    names = ", ".join(path or "the layer itself" for path in paths)
    print(f"{target}: {arguments.old} -> {arguments.new} for {names}")
    if checkpoint.get("optimizer_states"):
        print(
            "note: the optimizer states were kept and belong to the old layout; load the weights "
            "and start a new fit.",
            file=sys.stderr,
        )


def _convert_layers(
    state_dict: Mapping[str, Any], arguments: argparse.Namespace
) -> tuple[Mapping[str, Any], list[str]]:
    _check_state_dict(state_dict, arguments.source)
    if arguments.prefix is None:
        paths = find_layers(state_dict, arguments.old)
    else:
        paths = [arguments.prefix]
    return convert(state_dict, arguments.old, arguments.new, arguments.prefix), paths


def _check_model_layouts(arguments: argparse.Namespace) -> None:
    pair = (arguments.old, arguments.new)
    if set(pair) != set(_MODELS):
        msg = f"{pair[0]!r} is not converted to {pair[1]!r}: linger and catch, to each other."
        raise ConfigError(msg)
    if arguments.prefix is not None:
        msg = "--prefix is for single layers; a quantized model is converted whole. Leave it out."
        raise ConfigError(msg)
    if (arguments.like is None) == (arguments.new == "linger"):
        needed = "Pass" if arguments.new == "linger" else "Leave out"
        msg = f"{needed} --like, the state dict of the model that CATCH's scales are for."
        raise ConfigError(msg)


def _convert_model(
    state_dict: Mapping[str, Any], arguments: argparse.Namespace
) -> tuple[Mapping[str, Any], list[str]]:
    if arguments.new == "catch":
        converted = to_catch(state_dict)
        return converted, list(read_layers(converted))
    like = read_checkpoint(arguments.like)
    found = like.get("state_dict")
    model = found if isinstance(found, Mapping) else like
    return from_catch(state_dict, model), list(read_layers(state_dict))


def _entry(checkpoint: dict[str, Any], key: str, source: Path) -> Mapping[str, Any]:
    entry = checkpoint.get(key)
    if not isinstance(entry, Mapping):
        mappings = [name for name, value in checkpoint.items() if isinstance(value, Mapping)]
        msg = (
            f"{str(source)!r} has no state dict {key!r}. Pass --key with one of "
            f"{', '.join(map(repr, mappings)) or 'its entries'}, or leave it out if the file is a "
            "state dict."
        )
        raise ConfigError(msg)
    return entry


def _check_state_dict(state_dict: Mapping[str, Any], source: Path) -> None:
    keys = list(state_dict)
    if not all(isinstance(key, str) for key in keys):
        msg = f"{str(source)!r} is no state dict: its keys are not all strings. Pass --key."
        raise ConfigError(msg)
    if any(STATE_NAME in key.split(".") for key in keys):
        msg = (
            f"{str(source)!r} is a quantized model, whose ranges belong to its layers as they are. "
            "Convert the float checkpoint, and quantize afterwards."
        )
        raise ConfigError(msg)
