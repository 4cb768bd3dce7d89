"""Calibration: ranges from data, without training."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import ConfigError, QuantizationWarning
from lightning_linger.core.images import FirstConv, is_raw
from lightning_linger.core.instrumentation import instrumentation_of, is_prepared
from lightning_linger.core.logs import logger
from lightning_linger.core.modes import kept_modes
from lightning_linger.core.progress import with_progress
from lightning_linger.core.quantizer import Quantizer
from lightning_linger.core.recipe import plain_data
from lightning_linger.stages.firstconv import require_quantized_images, take_raw_images
from lightning_linger.stages.journal import log_sites
from lightning_linger.stages.prepare import check_example, prepare, strip
from lightning_linger.stages.quantize import quantize
from lightning_linger.stages.selection import QUANT_MARK, Fields, Selection
from lightning_linger.stages.skipped import skipped_layers

_NOTHING = object()


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    config: QuantConfig | None = None,
    *,
    types: Sequence[type[nn.Module] | str] | None = None,
    modules: Sequence[str] | None = None,
    overrides: Mapping[str, Fields] | None = None,
    firstconv: FirstConv | None = None,
    batches: int | None = None,
    inplace: bool = True,
) -> nn.Module:
    """Quantize a model with ranges from some batches; weights and statistics stay as they are.

    Args:
        model: A prepared model, or a plain one, whose sites are found with the first batch. If it
            is not quantized yet, it is, with ``config``.
        loader: Batches: a tensor, a tuple or list whose first entry is the input, or a mapping of
            keyword inputs.
        config: How to quantize, e.g. ``linger.preset("cambricon")``. A model that is quantized
            already keeps its settings, and others than these are an error.
        types: Allow-list of module types or op kinds; used with ``config``, as are
        modules: globs on dotted paths, and
        overrides: fields per glob or ``type:Name``, or None to leave a layer in float.
        firstconv: Let the model take raw uint8 images from then on; the batches may be raw or
            normalized (see :func:`lightning_linger.take_raw_images`).
        batches: How many batches move the ranges, None for all; that there are more is said once in
            the log.
        inplace: Whether the model itself is quantized, or a copy.

    Returns:
        The model or its copy, in the mode it had.

    Raises:
        ConfigError: If an argument is wrong, the loader is empty, all ranges are frozen, the model
            takes no raw images and gets some, or it cannot be copied. A plain model is then as it
            was.
    """
    _check_arguments(model, loader, config, firstconv, batches)
    if not inplace:
        model = _copy_of(model)
    given = iter(loader)
    first = next(given, _NOTHING)
    if first is _NOTHING:
        msg = "the calibration loader gave no batch."
        raise ConfigError(msg)
    plain = not is_prepared(model)
    try:
        if plain:
            _prepare(model, first, firstconv)
        if not instrumentation_of(model).switches.quantize:
            quantize(model, config, types, modules, overrides)
        else:
            _refuse_other_plan(model, config, Selection(types, modules, overrides, QUANT_MARK))
            _refuse_frozen(model)
        if firstconv is not None:
            take_raw_images(model, firstconv)
            require_quantized_images(model)
            _warn_of_pixels(first, firstconv)
    except BaseException:
        if plain:
            strip(model)
        raise
    observed = 0
    limited = itertools.islice(itertools.chain([first], given), batches)
    with learning_ranges(model):
        for batch in with_progress(limited, "Calibrating"):
            check_example(batch)
            run_batch(model, batch)
            observed += 1
    if batches is not None and next(given, _NOTHING) is not _NOTHING:
        of = f" of {len(loader)}" if isinstance(loader, Sized) else ""
        logger.warning("calibration used the first %d%s batches", observed, of)
    settle(model)
    _report_skipped(model)
    logger.info("calibrated %s on %d batches", type(model).__name__, observed)
    log_sites(model)
    return model


@contextlib.contextmanager
def learning_ranges(model: nn.Module) -> Iterator[None]:
    """Let forwards in evaluation mode, without gradients, move the ranges of a quantized model."""
    instrumentation = instrumentation_of(model)
    try:
        with kept_modes(model), torch.no_grad():
            model.eval()
            for site in instrumentation.sites:
                site.train()
            yield
    finally:
        instrumentation.thaw()


def run_batch(model: nn.Module, batch: Any) -> None:
    """Call a model with a batch of calibration data.

    Args:
        model: The model.
        batch: A tensor, a tuple or list whose first entry is the input, or a mapping of keyword
            inputs.
    """
    args, kwargs = _inputs_of(batch)
    model(*args, **kwargs)


def settle(model: nn.Module) -> None:
    """End a calibration: give inputs without a range, with a warning, the step of their engine."""
    for site in instrumentation_of(model).sites:
        unseen = None if site.platform is None else site.platform.unseen_step
        for quantizer in site.inputs.values():
            if unseen is None or not isinstance(quantizer, Quantizer):
                continue
            if not (quantizer.known and float(quantizer.estimator.absmax()) > 0):
                quantizer.assume(unseen * quantizer.grid.qmax)
                warnings.warn(
                    f"`{quantizer.name}`: calibration has seen no finite value but zeros; its "
                    f"scale is {unseen}. Calibrate with batches that reach it.",
                    QuantizationWarning,
                    stacklevel=3,
                )


def _report_skipped(model: nn.Module) -> None:
    skipped = [row for row in skipped_layers(model) if not row.chosen]
    if skipped:
        warnings.warn(
            f"{len(skipped)} layers stay float: "
            + ", ".join(f"`{row.layer}` ({row.why})" for row in skipped[:5])
            + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
            + ". `linger.skipped_layers(model)` lists them all.",
            QuantizationWarning,
            stacklevel=3,
        )


def _refuse_other_plan(model: nn.Module, config: QuantConfig | None, selection: Selection) -> None:
    """Refuse settings that differ from those a model is quantized with."""
    given = {name: value for name, value in selection.describe().items() if value}
    if config is not None:
        given |= dataclasses.asdict(config)
    planned = instrumentation_of(model).plans["quantize"]
    other = [name for name, value in plain_data(given).items() if planned.get(name) != value]
    if other:
        msg = (
            f"{type(model).__name__} is quantized already, with other settings than these: "
            f"{', '.join(other)}. Calibrate it without settings, or call `linger.quantize` with "
            "them first."
        )
        raise ConfigError(msg)


def _refuse_frozen(model: nn.Module) -> None:
    """Refuse a model in which no batch would move a range."""
    sites = [site for site in instrumentation_of(model).sites if site.quantizers()]
    if sites and all("activations" in site.frozen for site in sites):
        msg = (
            f"the ranges of {type(model).__name__} are frozen, so no batch moves them. Let them "
            "move first: `linger.freeze_ranges(model, frozen=False, parts=['activations'])`."
        )
        raise ConfigError(msg)


def _warn_of_pixels(batch: Any, firstconv: FirstConv) -> None:
    """Say so if images of real numbers look like pixels from 0 to 255."""
    args, kwargs = _inputs_of(batch)
    images = [
        x
        for x in (*args, *kwargs.values())
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 3 and x.numel()
    ]
    reach = max((float(x.detach().abs().max()) for x in images), default=0.0)
    if reach > 2.0 * firstconv.reach:
        warnings.warn(
            f"`firstconv`: a batch of real numbers reaches {reach:.4g}; normalized images reach "
            f"{firstconv.reach:.4g}. Real numbers are taken as normalized already: pass raw images "
            "as uint8 tensors.",
            QuantizationWarning,
            stacklevel=3,
        )


def _check_arguments(model: Any, loader: Any, config: Any, firstconv: Any, batches: Any) -> None:
    if not isinstance(model, nn.Module):
        msg = f"`model` is a torch.nn.Module. Found: {type(model).__name__}."
        raise ConfigError(msg)
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        msg = (
            "`loader` gives batches: a DataLoader, a list, or a generator; [x] for a single batch "
            f"x. Found: {type(loader).__name__}."
        )
        raise ConfigError(msg)
    if not isinstance(config, QuantConfig | None):
        msg = (
            "`config` is a linger.QuantConfig, or what linger.preset(...) returns. Found: "
            f"{config!r}."
        )
        raise ConfigError(msg)
    if not isinstance(firstconv, FirstConv | None):
        msg = f"`firstconv` is a linger.FirstConv(mean, std). Found: {firstconv!r}."
        raise ConfigError(msg)
    if batches is not None and (type(batches) is not int or batches < 1):
        msg = f"`batches` must be a positive integer, or None for all. Found: {batches!r}."
        raise ConfigError(msg)


def _copy_of(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a user's module raises
        msg = (
            f"{type(model).__name__} cannot be copied ({error}). Calibrate it in place, with "
            "inplace=True, or make the copy yourself."
        )
        raise ConfigError(msg) from error


def _prepare(model: nn.Module, batch: Any, firstconv: FirstConv | None) -> None:
    args, kwargs = _inputs_of(batch)
    if firstconv is not None:
        # In float the model takes normalized images alone.
        args = tuple(_normalized(x, firstconv) for x in args)
        kwargs = {name: _normalized(x, firstconv) for name, x in kwargs.items()}
    try:
        prepare(model, args, kwargs)
    except RuntimeError as error:
        if not any(isinstance(x, Tensor) and is_raw(x) for x in (*args, *kwargs.values())):
            raise
        msg = (
            f"{type(model).__name__} takes no uint8 tensors ({error}). Pass normalized images, or "
            "`firstconv`, with which it takes raw ones."
        )
        raise ConfigError(msg) from error


def _normalized(x: Any, firstconv: FirstConv) -> Any:
    return firstconv.normalized(x) if isinstance(x, Tensor) and is_raw(x) else x


def _inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return (batch[0],), {}
    return (batch,), {}
