"""``lightning-linger sensitivity``: what each layer costs at each width, and a choice of widths."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.analysis.bits import COSTS, choose_bits
from lightning_linger.analysis.planning import default_config
from lightning_linger.analysis.sensitivity import (
    MODES,
    PARTS,
    measure_sensitivity,
    output_score,
)
from lightning_linger.cli.arrays import read_arrays
from lightning_linger.cli.models import add_model_arguments, build_prepared_root
from lightning_linger.cli.output import print_table
from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import ConfigError, LingerError
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.export.files import check_target, write_atomically
from lightning_linger.platforms import PLATFORMS, platform_of
from lightning_linger.simulate.divergence import Forward
from lightning_linger.stages.checkpoints import recorded_example
from lightning_linger.stages.fuse_bn import fuse_bn
from lightning_linger.stages.prepare import check_example

_DESCRIPTION = """\
Quantize the layers of a model one at a time, at each width, and measure what that does to its
output on data. A model that is not planned to be quantized is, with batch norms folded, as
QuantizeCallback would do it; the model in the checkpoint is not changed.

  lightning-linger sensitivity --module my.net:Net --ckpt float.ckpt --data images.npy
  ... --budget 50000 --overrides mixed.json       and the best widths within 50000 bytes of weights

The overrides are printed as they stand in the YAML of QuantizeCallback.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "sensitivity",
        help="show what each layer costs at each width, and choose widths under a budget",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add(
        "--data",
        metavar="PATH",
        type=Path,
        nargs="+",
        required=True,
        help="samples: an .npy per argument of forward, in order, or an .npz with arrays named "
        "like them (the first is named 0 if it has no name)",
    )
    add("--samples", metavar="N", type=int, default=256, help="use the first N of them (256)")
    add("--batch", metavar="N", type=int, default=64, help="so many at once (64)")
    add("--platform", choices=sorted(PLATFORMS), default="venusa", help="target, if not planned")
    add("--bits", metavar="N", type=int, nargs="+", default=[2, 4, 8], help="widths (2 4 8)")
    add("--part", choices=PARTS, default="weights", help="what of a layer has the width")
    add("--mode", choices=MODES, default="one_at_a_time")
    add("--metric", choices=("noise", "kl"), default="noise", help="of the output")
    add("--modules", metavar="GLOB", nargs="+", help="only layers of such paths")
    add("--budget", metavar="N", type=float, help="choose widths that keep the model within N")
    add("--cost", choices=COSTS, default="weight_bytes", help="what the budget counts")
    add("--overrides", metavar="FILE", type=Path, help="write the chosen widths as JSON")
    add("-o", "--output", metavar="FILE", type=Path, help="write the table: .csv, .json, or text")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table, and choose widths.

    Raises:
        ConfigError: If an argument is wrong, a file cannot be read, or the budget is too small.
    """
    for target in (arguments.output, arguments.overrides):
        if target is not None:
            check_target(target)
    if arguments.overrides is not None and arguments.budget is None:
        msg = "--overrides takes the widths that --budget chooses. Pass --budget too."
        raise ConfigError(msg)
    model = build_prepared_root(arguments)
    forwards = list(_forwards(model, arguments))
    instrumentation = instrumentation_of(model)
    config: QuantConfig | None = None
    if "quantize" not in instrumentation.plans:
        config = default_config(platform_of(arguments.platform))
        if "fuse_bn" not in instrumentation.plans:
            fuse_bn(model)
    model.eval()
    try:
        rows = measure_sensitivity(
            model,
            forwards,
            output_score(arguments.metric, forwards),
            arguments.bits,
            arguments.mode,
            arguments.part,
            arguments.modules,
            config,
        )
    except LingerError:
        raise
    except Exception as error:  # whatever the user's forward raises
        said = " ".join(str(error).split())
        msg = f"{type(model).__name__} does not run on the data: {said} Pass other --data."
        raise ConfigError(msg) from error
    print_table(rows)
    if arguments.output is not None:
        print(f"written to {rows.save(arguments.output)}")
    if arguments.budget is not None:
        platform = None if config is None else config.platform
        overrides = choose_bits(model, rows, arguments.budget, arguments.cost, platform)
        print("overrides:")
        for site, fields in overrides.items():
            print(f"  {json.dumps(site)}: {json.dumps(fields)}")
        if arguments.overrides is not None:
            text = json.dumps(overrides, indent=1) + "\n"
            write_atomically(arguments.overrides, text.encode())
            print(f"written to {arguments.overrides}")


def _forwards(model: nn.Module, arguments: argparse.Namespace) -> Iterator[Forward]:
    if arguments.batch < 1 or arguments.samples < 1:
        msg = "--batch and --samples are positive numbers."
        raise ConfigError(msg)
    runner, args, kwargs = recorded_example(model)
    names = [str(position) for position in range(len(args))] + list(kwargs)
    examples = [*args, *kwargs.values()]
    arrays = read_arrays(arguments.data, names)
    tensors = [
        torch.from_numpy(arrays[name])[: arguments.samples].to(_dtype_of(example))
        for name, example in zip(names, examples, strict=True)
    ]
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        msg = f"--data holds {sorted(sizes)} samples. Every input needs as many, and some."
        raise ConfigError(msg)
    check_example(tensors)
    for parts in zip(*(tensor.split(arguments.batch) for tensor in tensors), strict=True):
        named = dict(zip(kwargs, parts[len(args) :], strict=True))
        yield partial(runner, *parts[: len(args)], **named)


def _dtype_of(example: Any) -> torch.dtype:
    if not isinstance(example, Tensor):
        msg = (
            f"forward takes a {type(example).__name__}, which --data cannot hold. Call "
            "`linger.sensitivity` from Python instead."
        )
        raise ConfigError(msg)
    return example.dtype
