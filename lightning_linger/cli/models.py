"""Making a model and example inputs from what stands on the command line."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_linger.core.errors import ConfigError, LingerError
from lightning_linger.core.instrumentation import is_prepared
from lightning_linger.export.part import as_root
from lightning_linger.stages.checkpoints import (
    RECIPE_KEY,
    hyper_parameters,
    load_checkpoint,
    read_checkpoint,
    recorded_example,
)
from lightning_linger.stages.prepare import prepare

_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "int8", "int32", "int64", "bool")
}


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the arguments that name a model, which may have to be there."""
    add = parser.add_argument
    add(
        "--module",
        metavar="MODULE:CLASS",
        required=required,
        help="the model's class, e.g. my.module:Class; the working directory is searched first",
    )
    add(
        "--kwargs",
        metavar="JSON",
        default="{}",
        help="keyword arguments of CLASS as a JSON object; they replace those of a checkpoint",
    )
    add(
        "--ckpt",
        metavar="PATH",
        type=Path,
        help="a Lightning checkpoint, which knows how CLASS was made and quantized, or a state "
        "dict; nothing in it is unpickled but tensors and plain values",
    )
    add(
        "--input",
        metavar="[NAME=]SHAPE[:DTYPE]",
        action="append",
        default=[],
        dest="inputs",
        help="an example input, e.g. 1x3x32x32 or tokens=1x16:int64, once for each argument of "
        "forward; without any, those of the checkpoint, or the model's example_input_array",
    )


def build_model(
    arguments: argparse.Namespace,
) -> tuple[nn.Module, tuple[Any, ...] | None, dict[str, Any] | None]:
    """Make the model, and positional and keyword inputs: normal values, zeros where they are whole.

    The inputs are None where a checkpoint has prepared the model.

    Raises:
        ConfigError: If the class cannot be found or made, a checkpoint does not fit, an input is
            wrong, or none is given.
    """
    made, kwargs = _find_class(arguments.module), _parse_kwargs(arguments.kwargs)
    args, named = _parse_inputs(arguments.inputs)
    state: Mapping[str, Any] = {}
    if arguments.ckpt is not None:
        checkpoint = read_checkpoint(arguments.ckpt)
        kwargs = {**hyper_parameters(checkpoint, made), **kwargs}
        state = checkpoint.get("state_dict", checkpoint)
    try:
        if RECIPE_KEY in state:
            model = load_checkpoint(
                made, arguments.ckpt, example_inputs=args, example_kwargs=named, **kwargs
            )
            return model, None, None
        model = made(**kwargs)
        if hasattr(model, "configure_model"):  # where a LightningModule may make its layers
            model.configure_model()
    except LingerError:
        raise
    except Exception as error:  # whatever the user's class raises
        shown = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
        msg = f"cannot make {arguments.module}({shown}): {_said(error)} Pass other --kwargs."
        raise ConfigError(msg) from error
    if not isinstance(model, nn.Module):
        msg = f"{arguments.module} makes a {type(model).__name__}. Name a class of nn.Module."
        raise ConfigError(msg)
    if arguments.ckpt is not None:
        _load_weights(model, state, arguments.ckpt)
    return model, *((args, named) if args is not None else _example_of(model))


def build_prepared_model(
    arguments: argparse.Namespace, batch: int | None = None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Make the model, or the part of it that is called, prepared, and inputs to call it with.

    Args:
        arguments: The parsed arguments.
        batch: Size of the first axis of the inputs; None leaves it.

    Raises:
        ConfigError: As :func:`build_model`, or if the model does not run on the inputs.
    """
    model = build_prepared_root(arguments)
    part, args, kwargs = recorded_example(model)
    if batch is not None:
        args, kwargs = _with_batch(batch, args, kwargs)
    return as_root(model, part), args, kwargs


def build_prepared_root(arguments: argparse.Namespace) -> nn.Module:
    """Make the model, prepared.

    Raises:
        ConfigError: As :func:`build_model`, or if the model does not run on the inputs.
    """
    model, args, kwargs = build_model(arguments)
    if not is_prepared(model):
        try:
            prepare(model, args or (), kwargs)
        except LingerError:
            raise
        except Exception as error:  # whatever the user's forward raises
            inputs = shapes_of(args or (), kwargs or {})
            msg = (
                f"{type(model).__name__} does not run on the inputs {inputs}: {_said(error)} Pass "
                "other shapes with --input."
            )
            raise ConfigError(msg) from error
    return model


def _with_batch(
    batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat or cut the first axis, where it has the size that the first tensor's has."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
    if batch < 1 or not tensors:
        msg = f"--batch is a positive number of samples. Found: {batch}."
        raise ConfigError(msg)
    size = len(tensors[0])

    def resized(x: Tensor) -> Tensor:
        fits = x.ndim > 0 and len(x) == size
        return x[torch.arange(batch) % size] if fits else x

    changed: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(Tensor, resized, (args, kwargs))
    return changed


# --- the class ----------------------------------------------------------------------------------


def _find_class(text: str) -> Any:
    module_name, separator, class_name = text.partition(":")
    if not (module_name and separator and class_name):
        msg = f"--module is MODULE:CLASS, e.g. my.module:Class. Found: {text!r}."
        raise ConfigError(msg)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        msg = f"cannot import {module_name!r}: {_said(error)}"
        raise ConfigError(msg) from error
    for name in class_name.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        msg = f"{module_name!r} has no class {class_name!r}."
        raise ConfigError(msg)
    return found


def _parse_kwargs(text: str) -> dict[str, Any]:
    try:
        kwargs = json.loads(text)
    except json.JSONDecodeError as error:
        msg = f'--kwargs is a JSON object, e.g. {{"width": 8}}. Found {text!r}: {error}.'
        raise ConfigError(msg) from error
    if not isinstance(kwargs, dict):
        msg = f'--kwargs is a JSON object, e.g. {{"width": 8}}. Found: {text!r}.'
        raise ConfigError(msg)
    return kwargs


def _load_weights(model: nn.Module, state: Mapping[str, Any], source: Path) -> None:
    try:
        model.load_state_dict(state)
    except Exception as error:  # a RuntimeError, or what a hook of the model raises
        msg = f"{str(source)!r} does not fit {type(model).__name__}: {_said(error)}"
        raise ConfigError(msg) from error


# --- inputs -------------------------------------------------------------------------------------


def _example_of(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    example = getattr(model, "example_input_array", None)
    if example is None:
        msg = (
            f"{type(model).__name__} has no example_input_array. Pass --input with the shape of "
            "each argument of its forward."
        )
        raise ConfigError(msg)
    if isinstance(example, dict):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}


def _parse_inputs(
    texts: Sequence[str],
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]] | tuple[None, None]:
    if not texts:
        return None, None
    generator = torch.Generator().manual_seed(0)
    positional: list[Tensor] = []
    named: dict[str, Tensor] = {}
    for text in texts:
        name, tensor = _parse_input(text, generator)
        if name is not None:
            named[name] = tensor
        elif named:
            msg = f"the input {text!r} without a name stands behind one with a name. Put it first."
            raise ConfigError(msg)
        else:
            positional.append(tensor)
    return tuple(positional), named


def _parse_input(text: str, generator: torch.Generator) -> tuple[str | None, Tensor]:
    found = _INPUT.fullmatch(text)
    sizes = [] if found is None else [int(size) for size in found["shape"].split("x")]
    if found is None or 0 in sizes:
        msg = (
            "--input is a shape, e.g. 1x3x32x32, perhaps with a name and a dtype, "
            f"tokens=1x16:int64. Found: {text!r}."
        )
        raise ConfigError(msg)
    dtype = _DTYPES.get(found["dtype"] or "float32")
    if dtype is None:
        msg = f"the dtype of an input is one of {', '.join(_DTYPES)}. Found: {found['dtype']!r}."
        raise ConfigError(msg)
    if dtype.is_floating_point:
        return found["name"], torch.randn(sizes, generator=generator).to(dtype)
    return found["name"], torch.zeros(sizes, dtype=dtype)


def shapes_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return the shapes of inputs as text."""
    named = [*(("", x) for x in args), *((f"{name}=", x) for name, x in kwargs.items())]
    return ", ".join(
        name + ("x".join(map(str, x.shape)) if isinstance(x, Tensor) else repr(x))
        for name, x in named
    )


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."
