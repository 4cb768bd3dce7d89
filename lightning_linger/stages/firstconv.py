"""Models that take raw images: the first convolution normalizes what it quantizes."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.core.graph import Node, Run
from lightning_linger.core.images import FirstConv, RawImages
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.sites import Site

# These show a convolution the same pixels, whatever their values.
_SAME_PIXELS = frozenset({"permute", "transpose", "contiguous"})


def take_raw_images(model: nn.Module, firstconv: FirstConv) -> nn.Module:
    """Let a model take raw uint8 images too, which its first convolution normalizes.

    The convolution's input quantizer computes ``(x / 255 - mean) / std`` before it rounds. So
    weights and ranges stay those of normalized images, and the zeros that the convolution pads with
    stay the zeros of normalized images. Tensors of real numbers are taken as normalized already.

    Args:
        model: A prepared model.
        firstconv: The normalization.

    Returns:
        The model.

    Raises:
        UnsupportedError: If the model has no two-dimensional convolution, or the first one that
            runs has another number of channels, or does not read the model's input alone.
    """
    instrumentation = instrumentation_of(model)
    keys = {_first_convolution(model, run, firstconv).key for run in instrumentation.graph.runs}
    if len(keys) > 1:
        msg = f"`firstconv`: in training another convolution runs first: {sorted(keys)}."
        raise UnsupportedError(msg)
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    for site in instrumentation.sites:
        site.raw_images = RawImages(firstconv, device) if site.key in keys else None
    instrumentation.note_plan("firstconv", dataclasses.asdict(firstconv), {})
    instrumentation.thaw()
    return model


def raw_site(model: nn.Module) -> Site | None:
    """Return the site of the convolution that takes raw images, None if there is none."""
    sites = instrumentation_of(model).sites
    return next((site for site in sites if site.raw_images is not None), None)


def require_quantized_images(model: nn.Module) -> None:
    """Refuse a convolution that takes raw images and stays float.

    Raises:
        ConfigError: Names it.
    """
    raw = raw_site(model)
    if raw is not None and not raw.quantized:
        msg = (
            f"`firstconv`: `{raw.key}` has to be quantized to take raw images, and stays float: "
            f"{raw.why_float}."
        )
        raise ConfigError(msg)


def code_differences(model: nn.Module) -> int:
    """Count the raw values whose code depends on how the normalization is written.

    An engine may compute ``(x - 255 mean) / (255 std)``, which is rounded elsewhere than
    ``(x / 255 - mean) / std``. All 256 values of every channel are compared.

    Args:
        model: A calibrated model that takes raw images.

    Returns:
        The number of values with different codes.
    """
    site = raw_site(model)
    if site is None or "0" not in site.inputs:
        msg = f"{type(model).__name__} takes no raw images. Pass `firstconv` to `linger.calibrate`."
        raise UnsupportedError(msg)
    assert site.raw_images is not None  # that is how it was found
    firstconv = site.raw_images.firstconv
    mean, std = firstconv.constants()
    values = torch.arange(256).repeat(len(mean), 1)[..., None]
    other = (values.float() - mean * 255.0) / (std * 255.0)
    images = (firstconv.normalized(values), other)
    here, there = (site.operand_codes(0, x.to(site.raw_images.mean.device)) for x in images)
    assert here is not None  # the site has an input quantizer
    assert there is not None
    return int(torch.ne(here, there).sum())


def _first_convolution(model: nn.Module, run: Run, firstconv: FirstConv) -> Node:
    node = next((node for node in run.nodes if node.op == "conv2d"), None)
    if node is None:
        msg = f"`firstconv`: {type(model).__name__} runs no two-dimensional convolution."
        raise UnsupportedError(msg)
    channels = node.inputs[0].shape[-3]
    if channels != len(firstconv.mean):
        msg = (
            f"`firstconv`: mean and std are of {len(firstconv.mean)} channels, `{node.key}` at "
            f"{node.location} reads {channels}."
        )
        raise UnsupportedError(msg)
    producers = {spec.value: producer for producer in run.nodes for spec in producer.outputs}
    value = node.inputs[0].value
    while True:
        if len(run.consumers(value)) > 1:
            msg = (
                f"`firstconv`: the image that `{node.key}` reads is read elsewhere too "
                f"({', '.join(run.consumers(value))}), where it would not be normalized."
            )
            raise UnsupportedError(msg)
        if value in run.given:
            return node
        before = producers.get(value)
        if before is None or before.op not in _SAME_PIXELS:
            what = "no call" if before is None else f"`{before.key}` at {before.location}"
            msg = (
                f"`firstconv`: `{node.key}`, the first convolution that runs, reads what {what} "
                "made, not the model's input, and cannot take raw images. Move the call in front "
                "of the model, or leave `firstconv` out."
            )
            raise UnsupportedError(msg)
        value = before.inputs[0].value
