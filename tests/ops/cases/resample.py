"""Interpolation and adaptive maxima."""

import torch.nn.functional as F
from torch import nn

from tests.ops.cases import Case, layer, on_convs

LINE, CUBE = (2, 3, 9), (1, 2, 4, 5, 3)
NO_WEIGHTS = {"linger": "the engine moves whole values only"}
NO_3D = {"linger": "no name for a 3-dimensional convolution"}


def resized(name, shape=(2, 3, 6, 5), refused=None, **arguments):
    build = on_convs(lambda a: F.interpolate(a, **arguments).relu(), shape=shape)
    return Case("interpolate", name, build, refused=refused or {})


def linear(name, shape=(2, 3, 6, 5), **arguments):
    arguments.setdefault("mode", "bilinear")
    return resized(name, shape, NO_3D if len(shape) == 5 else NO_WEIGHTS, **arguments)


def pooled(dims, name, size, shape, refused=None):
    pool = getattr(F, f"adaptive_max_pool{dims}d")
    build = on_convs(lambda a: pool(a, size).relu(), shape=shape)
    return Case(f"adaptive_max_pool{dims}d", name, build, refused=refused or {})


CASES = [
    resized("twice", scale_factor=2),
    resized("half", scale_factor=0.5),
    resized("uneven", size=(9, 7)),
    resized("per-dim", scale_factor=(1.5, 3.0)),
    resized("recomputed", scale_factor=1.7, recompute_scale_factor=True),
    resized("line", LINE, scale_factor=3.0),
    resized("cube", CUBE, NO_3D, size=(8, 5, 6)),
    resized("exact", size=(11, 4), mode="nearest-exact"),
    Case(
        "interpolate",
        "module",
        layer(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=4)), (1, 3, 5, 4)),
    ),
    linear("bilinear", scale_factor=2),
    linear("bilinear-sizes", size=(5, 13)),
    linear("bilinear-corners", size=(11, 4), align_corners=True),
    linear("bilinear-factor", scale_factor=1.3),
    linear("linear", LINE, size=17, mode="linear"),
    linear("trilinear", CUBE, scale_factor=2, mode="trilinear"),
    pooled(1, "three", 3, LINE),
    pooled(2, "even", (3, 5), (2, 3, 6, 5)),
    pooled(2, "uneven", (4, 3), (2, 3, 6, 5)),
    pooled(2, "one", 1, (2, 3, 6, 5)),
    pooled(2, "keep", (None, 2), (2, 3, 6, 5)),
    pooled(3, "cube", (2, 3, 2), CUBE, NO_3D),
]
