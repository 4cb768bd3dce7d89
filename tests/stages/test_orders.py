"""Stages and algorithms called in any order: an error that says so, or a model that is right."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, NotReadyError, QuantConfig
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import Chain, assert_integer_exact

SEQUENCES, LENGTH = 12, 6


def network() -> Chain:
    torch.manual_seed(0)
    return Chain(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)),
    )


def images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module) -> None:
    model.train()
    for _ in range(2):
        model(images()).square().mean().backward()


LEARNED = QuantConfig(range="lsq", weight_range="lsq")
CALLS: dict[str, Callable[[Any], Any]] = {
    "fuse_bn": linger.fuse_bn,
    "normalize": linger.normalize,
    "quantize": linger.quantize,
    "quantize to 6 bits": lambda model: linger.quantize(model, QuantConfig(weight_bits=6)),
    "quantize and learn": lambda model: linger.quantize(model, LEARNED),
    "calibrate": lambda model: linger.calibrate(model, [images()]),
    "freeze": linger.freeze_ranges,
    "unfreeze": lambda model: linger.freeze_ranges(model, frozen=False),
    "train": train,
    "equalize": linger.equalize,
    "correct_bias": lambda model: linger.correct_bias(model, [images()]),
}


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_calls_is_refused_or_right(seed: int) -> None:
    """The result is that of the float model, whose layers the calls may have changed, too."""
    chosen = random.Random(seed)
    for _ in range(SEQUENCES):
        model = linger.prepare(network(), (images(),))
        done = []
        for name in chosen.choices(list(CALLS), k=LENGTH):
            try:
                CALLS[name](model)
            except (ConfigError, NotReadyError):
                continue
            done.append(name)
        model.eval()
        with torch.no_grad():
            found = model(images())
            if instrumentation_of(model).switches.quantize:
                with linger.integer(model):
                    assert torch.equal(model(images()), found), done
            real = linger.strip(model)(images())
        # Before it is trained, a learned range of a power of two may leave a third of a value out.
        assert (found - real).norm() <= 0.25 * real.norm(), done


@pytest.mark.parametrize("modules", [None, ["net.3"]])
def test_batch_norms_are_folded_before_quantization(modules: list[str] | None) -> None:
    model = linger.prepare(network(), (images(),))
    if modules is not None:
        linger.fuse_bn(model)
    linger.calibrate(model, [images()])
    before = model.eval()(images())
    with pytest.raises(ConfigError, match=r"`net.0/conv2d/0` is quantized already.*strip"):
        linger.fuse_bn(model, mode="frozen", modules=modules)
    assert torch.equal(model(images()), before)
    assert instrumentation_of(model).switches.fuse_mode == "running"


def test_the_mode_of_folding_changes_at_any_time() -> None:
    model = linger.fuse_bn(linger.prepare(network(), (images(),)))
    linger.calibrate(model, [images()])
    linger.fuse_bn(model, mode="frozen")
    assert instrumentation_of(model).switches.fuse_mode == "frozen"
    assert_integer_exact(model.eval(), images())
