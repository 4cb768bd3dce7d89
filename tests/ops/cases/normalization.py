"""Norms whose statistics are those of the input's own values."""

import random

import torch
from torch import nn

from tests.ops.cases import Case, layer, on_convs, on_linears

LAYER = {
    "linger/16": "the engine computes it in 8 bits",
    "venus": "venus has a layer norm of its own with 16-bit weights",
}
GROUPS = {"linger": "the engine normalizes the last axis"}


def affine(make):
    """A norm with weights drawn at random."""

    def build():
        norm = make()
        nn.init.normal_(norm.weight, 1.0, 0.5)
        if getattr(norm, "bias", None) is not None:
            nn.init.normal_(norm.bias, 0.0, 0.5)
        return norm

    return build


def behind_linear(make, shape=(2, 3, 6)):
    def build(rng: random.Random):
        model = nn.Sequential(nn.Linear(shape[-1], shape[-1]), make())
        return model, (torch.randn(shape) * 2.0 ** rng.randint(-2, 3),)

    return build


def behind_conv(make):
    def build(rng: random.Random):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), make())
        return model, (torch.randn(2, 3, 7, 7) * 2.0 ** rng.randint(-2, 3),)

    return build


CASES = [
    Case(
        "layer_norm",
        "affine",
        behind_linear(affine(lambda: nn.LayerNorm(6))),
        refused=LAYER,
        gradient="finite",
    ),
    Case(
        "layer_norm",
        "no-bias",
        behind_linear(affine(lambda: nn.LayerNorm(6, bias=False)), (5, 6)),
        refused=LAYER,
        gradient="finite",
    ),
    Case(
        "layer_norm",
        "plain",
        behind_linear(lambda: nn.LayerNorm(6, elementwise_affine=False)),
        refused=LAYER,
    ),
    Case(
        "layer_norm",
        "maps",
        behind_conv(affine(lambda: nn.LayerNorm((4, 5, 5)))),
        refused=LAYER,
        gradient="finite",
    ),
    Case(
        "layer_norm",
        "first",
        layer(affine(lambda: nn.LayerNorm(16)), (4, 16)),
        refused=LAYER,
        gradient="finite",
    ),
    Case(
        "layer_norm",
        "function",
        on_linears(lambda a: nn.functional.layer_norm(a, (3, 6)), shape=(2, 3, 6)),
        refused=LAYER,
    ),
    Case(
        "rms_norm",
        "affine",
        behind_linear(affine(lambda: nn.RMSNorm(6))),
        refused={"linger": "the engine takes the mean off"},
        gradient="finite",
    ),
    Case(
        "group_norm",
        "affine",
        behind_conv(affine(lambda: nn.GroupNorm(2, 4))),
        refused=GROUPS,
        gradient="finite",
    ),
    Case(
        "group_norm",
        "function",
        on_convs(lambda a: nn.functional.group_norm(a, 2)),
        refused=GROUPS,
    ),
    Case(
        "instance_norm",
        "affine",
        behind_conv(affine(lambda: nn.InstanceNorm2d(4, affine=True))),
        refused=GROUPS,
        gradient="finite",
    ),
    Case(
        "instance_norm",
        "plain",
        behind_conv(lambda: nn.InstanceNorm2d(4)),
        refused=GROUPS,
    ),
]
