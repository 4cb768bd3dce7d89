"""Multiplications, parameters and memory, against counts by hand, torch's and the packer's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_linger as linger
from lightning_linger.analysis import Resources
from tests.models import Chain, Lambda, ResNet
from tests.thinker.cases.case import chain, conv, on_conv, on_linear
from tests.thinker.cases.networks import KeywordSpotter


class SmallNet(nn.Module):
    """A convolution with a batch norm, a depthwise one, a pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = F.max_pool2d(self.depthwise(x), 2)
        return self.fc(x.flatten(1))


SMALL = (torch.randn(1, 3, 16, 16),)


def counted_by_torch(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Return the multiplications of convolutions and matrix products that torch counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


# --- counts -------------------------------------------------------------------------------------


def test_a_network_by_hand() -> None:
    found = linger.resources(SmallNet(), "venusa", SMALL)
    rows = {row.site: row for row in found}
    conv, depthwise, fc = (
        rows[site] for site in ("conv/conv2d/0", "depthwise/conv2d/0", "fc/linear/0")
    )
    assert conv.macs == 16 * 16 * 8 * 3 * 3 * 3
    assert depthwise.macs == 8 * 8 * 8 * 3 * 3
    assert fc.macs == 128 * 10
    assert found.macs == conv.macs + depthwise.macs + fc.macs
    # A bias for each channel of the folded batch norm.
    assert conv.parameters == 8 * 3 * 3 * 3 + 8
    assert depthwise.parameters == 8 * 3 * 3 + 8
    assert fc.parameters == 128 * 10 + 10
    # 3 input channels are stored as 8, 3 rows of a depthwise kernel as 4; biases have 32 bits.
    assert (conv.weights, conv.biases) == (8 * 8 * 3 * 3, 32)
    assert (depthwise.weights, depthwise.biases) == (8 * 4 * 3, 32)
    assert (fc.weights, fc.biases) == (128 * 10, 48)
    assert found.flash == conv.weights + depthwise.weights + fc.weights + 32 + 32 + 48
    assert found.psram == found.flash
    # The input and the result of the first layer; of the second.
    assert conv.activations == 3 * 256 + 8 * 256
    assert depthwise.activations == 8 * 256 + 8 * 64
    # The workspace of a linear layer is as large as its input.
    assert fc.activations == 128 + 16 + 128
    # The first and the third layer share a buffer of weights, so do the second and the fourth.
    assert found.share_memory == conv.activations + (fc.weights + 48) + (depthwise.weights + 32)
    assert found.fits


def test_the_engine_decides_how_weights_are_stored() -> None:
    found = {
        platform: {row.site: row for row in linger.resources(SmallNet(), platform, SMALL)}
        for platform in ("venusa", "arcs", "venus")
    }
    weights = {name: rows["depthwise/conv2d/0"].weights for name, rows in found.items()}
    assert weights == {"venusa": 8 * 4 * 3, "arcs": 80, "venus": 16 * 3 * 3}


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (ResNet, (torch.randn(1, 3, 32, 32),)),
        (KeywordSpotter, (torch.randn(1, 1, 49, 40),)),
        (lambda: Chain(nn.ConvTranspose2d(4, 6, 3, 2, 1)), (torch.randn(1, 4, 8, 8),)),
        (lambda: Chain(nn.Conv1d(4, 6, 3, groups=2)), (torch.randn(1, 4, 16),)),
        (lambda: Chain(nn.Linear(8, 4), nn.Linear(4, 8)), (torch.randn(1, 5, 8),)),
        (
            lambda: Lambda(lambda m, x: m.a(x) @ m.b(x).mT, a=nn.Linear(8, 4), b=nn.Linear(8, 4)),
            (torch.randn(1, 5, 8),),
        ),
    ],
    ids=["resnet", "separable", "transposed", "groups", "linear", "matmul"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_multiplications_are_those_that_torch_counts(
    make: Callable[[], nn.Module], inputs: tuple[torch.Tensor, ...], batch: int
) -> None:
    expected = counted_by_torch(make(), *inputs)
    many = tuple(torch.cat([x] * batch) for x in inputs)
    assert linger.resources(make(), "arcs", many).macs == expected


@pytest.mark.parametrize("make", [ResNet, KeywordSpotter])
def test_parameters_are_torchs(make: Callable[[], nn.Module]) -> None:
    """A batch norm is folded; what is left of it is the bias of the layer before it."""
    model = make()
    x = torch.randn(1, *((3, 32, 32) if make is ResNet else (1, 49, 40)))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    expected = sum(m.weight.numel() + m.weight.shape[0] for m in layers)
    assert linger.resources(model, "venusa", (x,)).parameters == expected


def test_attention() -> None:
    model = Lambda(
        lambda m, x: m.mha(x, x, x, need_weights=False)[0],
        mha=nn.MultiheadAttention(16, 2, batch_first=True),
    )
    found = linger.resources(model, "venusa", (torch.randn(1, 5, 16),))
    projections, products = 4 * 5 * 16 * 16, 2 * 2 * 5 * 5 * 8
    assert found.macs == projections + products
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_an_lstm() -> None:
    model = Lambda(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(8, 12, batch_first=True))
    (row,) = linger.resources(model, "venusa", (torch.randn(1, 6, 8),))
    assert row.macs == 6 * 4 * 12 * (8 + 12)
    assert row.parameters == sum(p.numel() for p in model.parameters())


def test_an_embedding_multiplies_nothing() -> None:
    model = Lambda(lambda m, x: m.embedding(x), embedding=nn.Embedding(20, 8))
    (row,) = linger.resources(model, "venusa", (torch.zeros(1, 6, dtype=torch.int64),))
    assert (row.macs, row.parameters, row.weights) == (0, 160, 160)


# --- memory -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A model, and what the packer of pythinker 3.0.4 asks for.

    Args:
        build: Returns the model.
        inputs: Its input.
        share_memory: Bytes on venusa, arcs and venus.
        psram: Bytes on venusa, arcs and venus.
    """

    build: Callable[[], nn.Module]
    inputs: torch.Tensor
    share_memory: tuple[int, int, int]
    psram: tuple[int, int, int]


def everywhere(size: int) -> tuple[int, int, int]:
    return (size, size, size)


PACKED = {
    "images": Packed(
        chain(conv(3, 16, 3, 2, 1), nn.ReLU, conv(16, 16, 3, 2, 1)),
        torch.randn(1, 3, 224, 224),
        everywhere(354816),
        everywhere(3584),
    ),
    "depthwise": Packed(
        chain(lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64)),
        torch.randn(1, 64, 32, 32),
        (132096, 131904, 131904),
        (1024, 832, 832),
    ),
    "pointwise": Packed(
        chain(conv(256, 64, 1)), torch.randn(1, 256, 16, 16), everywhere(98560), everywhere(16640)
    ),
    "linear": Packed(
        chain(lambda: nn.Linear(512, 256), nn.ReLU, lambda: nn.Linear(256, 256)),
        torch.randn(1, 512),
        (199936, 200192, 200448),
        everywhere(198656),
    ),
    "max_pool": Packed(
        on_conv(lambda m, x: F.max_pool2d(m.conv(x), 2)),
        torch.randn(1, 4, 66, 66),
        everywhere(34112),
        everywhere(304),
    ),
    "avg_pool": Packed(
        on_conv(lambda m, x: F.avg_pool2d(m.conv(x), 3, 1)),
        torch.randn(1, 4, 40, 40),
        everywhere(52736),
        everywhere(304),
    ),
    "softmax": Packed(
        on_linear(lambda m, x: m.fc(x).softmax(-1)),
        torch.randn(1, 100, 16),
        (13184, 9984, 9920),
        everywhere(320),
    ),
    "batch_norm": Packed(
        on_conv(lambda m, x: m.conv(x) + 0.3),
        torch.randn(1, 4, 8, 8),
        everywhere(736),
        everywhere(336),
    ),
}


@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED)
def test_memory_is_what_the_packer_asks_for(case: Packed) -> None:
    for platform, share_memory, psram in zip(
        ("venusa", "arcs", "venus"), case.share_memory, case.psram, strict=True
    ):
        found = linger.resources(case.build(), platform, (case.inputs,))
        assert (found.share_memory, found.psram) == (share_memory, psram), platform


def test_large_activations_lie_in_psram() -> None:
    found = linger.resources(Chain(nn.Conv2d(1, 1, 1)), "venusa", (torch.randn(1, 1, 512, 1281),))
    assert found.psram == found.flash + 2 * 512 * 1281  # of more than 640 KiB each
    assert found.share_memory == found.flash  # weights that are fetched


def test_what_does_not_fit() -> None:
    found = linger.resources(Chain(nn.Conv2d(1, 1, 1)), "venusa", (torch.randn(1, 1, 512, 512),))
    assert found.share_memory > found.share_memory_limit == 393216
    assert not found.fits


# --- how resources print ------------------------------------------------------------------------


def test_a_table() -> None:
    found = linger.resources(SmallNet(), "arcs", SMALL)
    *table, flash, psram, share_memory = str(found).splitlines()
    assert table[0].split() == [
        *("site", "layer", "macs", "parameters", "weights", "biases", "activations")
    ]
    assert table[1].split() == [*("conv/conv2d/0", "conv", "55,296", "224", "576", "32", "2,816")]
    assert table[-1].split() == ["total", "61,184", "1,594", "1,936", "112", "2,816"]
    assert flash.split() == ["flash", "2,048", "bytes", "of", "weights", "and", "biases"]
    assert psram.split()[:4] == ["psram", "2,048", "of", "8,388,608"]
    assert share_memory.split()[:5] == ["share", "memory", "4,256", "of", "393,216"]
    assert found.__rich__().row_count == len(found) + 1
    assert isinstance(found, Resources)
