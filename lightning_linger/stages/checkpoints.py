"""Checkpoints: a prepared model from its class and a file, without data and without a run."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.config import FuseConfig, NormalizeConfig, QuantConfig, override
from lightning_linger.core.errors import ConfigError, LingerError, UnsupportedError
from lightning_linger.core.graph import Graph
from lightning_linger.core.images import FirstConv
from lightning_linger.core.instrumentation import (
    EXTRA_STATE,
    STATE_PREFIX,
    Instrumentation,
    instrumentation_of,
)
from lightning_linger.core.recipe import (
    decode,
    graph_from_plain,
    unreadable_in,
    value_from_plain,
)
from lightning_linger.core.registry import op_of
from lightning_linger.core.sharding import class_name
from lightning_linger.stages.firstconv import take_raw_images
from lightning_linger.stages.fuse_bn import plan_fuse_bn
from lightning_linger.stages.normalize import plan_normalize
from lightning_linger.stages.prepare import prepare, prepare_from, strip
from lightning_linger.stages.quantize import plan_quantize
from lightning_linger.stages.selection import NORMALIZE_MARK, QUANT_MARK

RECIPE_KEY = STATE_PREFIX + EXTRA_STATE

_MARKS = {"normalize": NORMALIZE_MARK, "quantize": QUANT_MARK}


def load_checkpoint(
    made: Callable[..., nn.Module],
    path: str | os.PathLike[str],
    *,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Make a model of a class and give it the weights and the quantization of a checkpoint.

    What was prepared, where and how is read from the checkpoint, which is never unpickled. The
    stages that were on are on again, so the model can be evaluated, exported, or trained on.

    Args:
        made: The class, e.g. of a LightningModule, or a function that makes the float model.
        path: A Lightning checkpoint of a run with this library's callbacks, or a saved
            ``state_dict`` of a prepared model.
        example_inputs: Positional inputs of one forward. With them the model is run once, and an
            error says if it does not make the calls that the checkpoint was trained with. Without,
            its modules and their classes are compared, but not the code of ``forward``.
        example_kwargs: Keyword inputs.
        **kwargs: Arguments of the class; they replace the hyperparameters in the checkpoint.

    Returns:
        The model, on the CPU and in training mode, like one that was just made.

    Raises:
        ConfigError: If the file cannot be read, holds no quantization, or belongs to another model;
            names the difference.
        UnsupportedError: If an op or an argument of the recorded model cannot be rebuilt.
    """
    source = Path(path)
    checkpoint = read_checkpoint(source)
    state = checkpoint.get("state_dict", checkpoint)
    arguments = {**hyper_parameters(checkpoint, made), **kwargs}
    try:
        model = made(**arguments)
    except TypeError as error:
        msg = (
            f"cannot make {_name(made)}({', '.join(arguments)}) for {str(source)!r}: {error}. Pass "
            "its arguments to `load_checkpoint`."
        )
        raise ConfigError(msg) from error
    # What Lightning calls between making a module and loading its weights.
    getattr(model, "configure_model", _nothing)()
    getattr(model, "on_load_checkpoint", _nothing)(checkpoint)
    restore(model, state, example_inputs, example_kwargs)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        msg = f"{str(source)!r} does not fit {_name(made)}: {' '.join(str(error).split())}"
        raise ConfigError(msg) from error
    return model


def restore(
    model: nn.Module,
    state: Mapping[str, Any],
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a float model into the prepared and planned one whose ``state_dict`` this is.

    Ranges, and what is on, come with ``model.load_state_dict(state)`` afterwards.

    Args:
        model: A float model of the same class; prepared in place.
        state: The ``state_dict`` of a prepared model.
        example_inputs: See :func:`load_checkpoint`.
        example_kwargs: Keyword inputs.

    Returns:
        The model.

    Raises:
        ConfigError: If the state belongs to another model; names the difference.
        UnsupportedError: If an op or an argument of the recorded model cannot be rebuilt.
    """
    recipe = recipe_of(state)
    try:
        _require_same_modules(model, recipe["owners"])
        graph = graph_from_plain(recipe["graph"])
        if example_inputs is not None or example_kwargs is not None:
            prepare(model, example_inputs or (), example_kwargs)
            _require_same_calls(model, graph, instrumentation_of(model))
        else:
            _require_rebuildable(graph, recipe["quantizers"])
            prepare_from(model, graph)
        _plan(model, recipe)
    except LingerError:
        strip(model)
        raise
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        strip(model)
        msg = (
            f"the quantization state of the checkpoint cannot be read ({error!r}). Load another "
            "checkpoint, or load this one with the version that wrote it."
        )
        raise ConfigError(msg) from error
    if example_inputs is None and example_kwargs is None:
        instrumentation_of(model).example = recipe["example"]
    return model


def recipe_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a ``state_dict`` says about the structure of its model, as plain data.

    Raises:
        ConfigError: If it is not the state of a prepared model, or of another format.
    """
    found = state.get(RECIPE_KEY)
    if not isinstance(found, Tensor):
        msg = (
            "the checkpoint holds no quantization state: it was written without this library's "
            "callbacks. Load its weights into a float model and call `linger.prepare`."
        )
        raise ConfigError(msg)
    return decode(found)


def recorded_example(model: nn.Module) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return the module that is called from outside, and inputs of the kind it was recorded with.

    Floating point inputs are random numbers of the recorded shape.

    Raises:
        ConfigError: If the inputs were not plain tensors and values.
    """
    example = instrumentation_of(model).example
    if example is None:
        msg = "no call was recorded to take example inputs from. Pass them."
        raise ConfigError(msg)
    args, kwargs = value_from_plain(example["args"]), value_from_plain(example["kwargs"])
    obstacle = unreadable_in((args, kwargs))
    if obstacle is not None:
        msg = f"the example inputs hold a {obstacle.text}, which a checkpoint does not. Pass them."
        raise ConfigError(msg)
    return model.get_submodule(example["module"]), args, kwargs


# --- the file -----------------------------------------------------------------------------------


def read_checkpoint(source: Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling anything but tensors and plain values.

    Raises:
        ConfigError: If it cannot be read, is no dictionary, or holds other objects.
    """
    try:
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        msg = f"cannot read {str(source)!r}: {error.strerror or error}."
        raise ConfigError(msg) from error
    # What a broken file raises depends on where it is broken.
    except Exception as error:
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if refused:
            msg = (
                f"{str(source)!r} holds {refused[1]}, which is not loaded from a file that may not "
                "be trusted. Save its state dict alone, with torch.save(model.state_dict(), path)."
            )
        else:
            msg = f"{str(source)!r} is no checkpoint, or it is damaged: torch cannot load it."
        raise ConfigError(msg) from error
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        msg = f"{str(source)!r} holds a {kind}. Save a state dict or a Lightning checkpoint."
        raise ConfigError(msg)
    return checkpoint


def hyper_parameters(checkpoint: Mapping[str, Any], made: Callable[..., Any]) -> dict[str, Any]:
    """Return the hyperparameters of a Lightning checkpoint that a class takes."""
    found = checkpoint.get("hyper_parameters")
    if not isinstance(found, Mapping):
        return {}
    parameters = inspect.signature(made).parameters.values()
    names = {parameter.name for parameter in parameters}
    holder = checkpoint.get("hparams_name")
    if holder in names and holder != "kwargs":
        return {str(holder): dict(found)}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(found)
    return {name: value for name, value in found.items() if name in names}


# --- the structure ------------------------------------------------------------------------------


def _plan(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    for stage, name in _MARKS.items():
        for path, fields in recipe["marks"].get(stage, {}).items():
            setattr(model.get_submodule(path), name, fields)
    for stage, plan in recipe["plans"].items():
        settings = dict(plan)
        chosen = [settings.pop(name, None) for name in ("types", "modules", "overrides")]
        if stage == "fuse_bn":
            plan_fuse_bn(model, override(FuseConfig(), settings), chosen[1])
        elif stage == "normalize":
            plan_normalize(model, NormalizeConfig().override(settings), *chosen)
        elif stage == "quantize":
            plan_quantize(model, QuantConfig().override(settings), *chosen)
        elif stage == "firstconv":
            take_raw_images(model, FirstConv.parse(settings))
        else:
            msg = f"the checkpoint has a stage {stage!r} that this version does not know."
            raise ConfigError(msg)


def _require_same_modules(model: nn.Module, owners: Mapping[str, str]) -> None:
    here = {path: class_name(module) for path, module in model.named_modules()}
    differing = [
        f"`{path}` is {there} in the checkpoint and {here.get(path, 'missing')} here"
        for path, there in owners.items()
        if here.get(path) != there
    ]
    if differing:
        msg = (
            f"the checkpoint belongs to another model than {type(model).__name__}: "
            f"{_some(differing)}. Pass the class, and the arguments, that it was trained with."
        )
        raise ConfigError(msg)


def _require_same_calls(model: nn.Module, graph: Graph, made: Instrumentation) -> None:
    there, here = {node.key for node in graph}, {node.key for node in made.graph}
    if there != here:
        msg = (
            f"{type(model).__name__} does not make the calls that the checkpoint was trained with. "
            f"Only in the checkpoint: {sorted(there - here)[:5]}; only here: "
            f"{sorted(here - there)[:5]}. Use the code of that time, and inputs of that kind."
        )
        raise ConfigError(msg)


def _require_rebuildable(graph: Graph, quantizers: Sequence[str]) -> None:
    quantized = {name.partition(":")[0] for name in quantizers}
    for node in graph:
        op = op_of(node.op)
        if op is None and node.key in quantized:
            msg = (
                f"`{node.key}` is quantized in the checkpoint, and the op {node.op!r} is not "
                "registered. Import the module that registers it first."
            )
            raise UnsupportedError(msg)
        obstacle = unreadable_in((node.args, node.kwargs))
        if op is not None and op.has_site and obstacle is not None:
            msg = (
                f"`{node.key}` takes an argument that a checkpoint does not hold: {obstacle.text}. "
                "Pass `example_inputs`, with which the model is run once instead."
            )
            raise UnsupportedError(msg)


def _some(lines: list[str]) -> str:
    more = f", and {len(lines) - 5} more" if len(lines) > 5 else ""
    return "; ".join(lines[:5]) + more


def _name(made: Callable[..., Any]) -> str:
    return getattr(made, "__name__", str(made))


def _nothing(*_: Any) -> None:
    """Stand in for a hook that the model does not have."""
