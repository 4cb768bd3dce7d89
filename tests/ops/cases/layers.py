"""Layers, batch norms, pools and clamping activations."""

from torch import nn
from torch.nn import functional as F

from tests.ops.cases import Case, layer, on_convs

IMAGE, LINE, CUBE, ROW = (3, 4, 8, 8), (3, 4, 12), (2, 4, 5, 6, 4), (6, 4)


_NO_MAXIMUM = {"linger": "maximum", "linger/16": "a change from 16-bit codes"}
_NO_CEIL = {"linger": "ceil_mode"}


def _no_3d(what):
    return {"linger": f"no name for a 3-dimensional {what}"}


def _weighted(kind, name, make, shape, **fields):
    # The float function has other weights than the quantized one.
    return Case(kind, name, layer(make, shape), gradient="finite", **fields)


CASES = [
    _weighted("conv1d", "strided", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), LINE),
    _weighted("conv2d", "dilated", lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), IMAGE),
    _weighted(
        "conv2d", "reflect", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE
    ),
    _weighted("conv2d", "depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), IMAGE),
    _weighted(
        "conv3d",
        "padded",
        lambda: nn.Conv3d(4, 2, 3, padding=1),
        CUBE,
        refused=_no_3d("convolution"),
    ),
    _weighted("conv_transpose1d", "strided", lambda: nn.ConvTranspose1d(4, 6, 4, 2, 1), LINE),
    _weighted(
        "conv_transpose2d", "groups", lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), IMAGE
    ),
    _weighted(
        "conv_transpose3d",
        "strided",
        lambda: nn.ConvTranspose3d(4, 2, 2, 2),
        CUBE,
        refused=_no_3d("convolution"),
    ),
    _weighted("linear", "rows", lambda: nn.Linear(4, 5), ROW),
    _weighted("linear", "3d", lambda: nn.Linear(12, 5), LINE),
    _weighted("batch_norm", "1d", lambda: nn.BatchNorm1d(4), ROW),
    _weighted("batch_norm", "2d", lambda: nn.BatchNorm2d(4), IMAGE),
    _weighted(
        "batch_norm",
        "3d",
        lambda: nn.BatchNorm3d(4, affine=False),
        CUBE,
        refused=_no_3d("batch norm"),
    ),
    Case("relu", "after-layer", on_convs(F.relu)),
    Case("relu", "after-move", on_convs(lambda a: F.relu(a.flatten(1)))),
    Case("relu6", "scaled", on_convs(lambda a: F.relu6(a * 8))),
    Case("hardtanh", "shared", on_convs(lambda a: F.hardtanh(a) + a)),
    Case("clamp", "numbers", on_convs(lambda a: a.clamp(-0.3, 0.5))),
    Case(
        "clamp",
        "tensors",
        on_convs(lambda a, b, c: a.clamp(b - 0.5, c + 0.5), 3),
        refused=_NO_MAXIMUM,
    ),
    Case("clamp", "one-tensor", on_convs(lambda a, b: a.clamp(max=b), 2), refused=_NO_MAXIMUM),
    Case("clamp_min", "tensor", on_convs(lambda a, b: a.clamp_min(b), 2), refused=_NO_MAXIMUM),
    Case("clamp_min", "number", on_convs(lambda a: a.clamp_min(-0.1))),
    Case("clamp_max", "number", on_convs(lambda a: a.clamp_max(0.4))),
    Case("avg_pool2d", "padded", on_convs(lambda a: F.avg_pool2d(a, 3, 2, 1))),
    Case(
        "avg_pool2d",
        "ceil",
        on_convs(lambda a: F.avg_pool2d(a, 3, 2, 1, True, False)),
        refused=_NO_CEIL,
    ),
    Case(
        "avg_pool2d",
        "divisor",
        on_convs(lambda a: F.avg_pool2d(a, 2, divisor_override=3)),
        refused={"linger": "the engine divides by the size of the window"},
    ),
    Case("avg_pool1d", "plain", on_convs(lambda a: F.avg_pool1d(a, 3), shape=LINE)),
    Case(
        "avg_pool3d",
        "plain",
        on_convs(lambda a: F.avg_pool3d(a, 2), shape=CUBE),
        refused=_no_3d("convolution"),
    ),
    Case("max_pool2d", "padded", on_convs(lambda a: F.max_pool2d(a, 3, 2, 1))),
    Case("max_pool1d", "plain", on_convs(lambda a: F.max_pool1d(a, 3), shape=LINE)),
    Case(
        "max_pool3d",
        "plain",
        on_convs(lambda a: F.max_pool3d(a, 2), shape=CUBE),
        refused=_no_3d("convolution"),
    ),
    Case(
        "adaptive_avg_pool1d", "four", on_convs(lambda a: F.adaptive_avg_pool1d(a, 4), shape=LINE)
    ),
    Case("adaptive_avg_pool2d", "uneven", on_convs(lambda a: F.adaptive_avg_pool2d(a, (2, 4)))),
    Case(
        "adaptive_avg_pool3d",
        "one",
        on_convs(lambda a: F.adaptive_avg_pool3d(a, 1), shape=CUBE),
        refused=_no_3d("convolution"),
    ),
    Case("mean", "dims", on_convs(lambda a: a.mean((1, 3)))),
]
