"""Small convolutional networks as a user would write them: plain modules, `+` and `F.relu`."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut to the two convolutions."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images: three stages of three blocks, 16, 32 and 64 channels wide."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(before, after, stride=1 if before == after else 2)
                for before, after in pairwise(widths)
            )
        )
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = F.relu(self.bn(self.conv(x)))
        x = F.adaptive_avg_pool2d(self.blocks(x), 1)
        return self.fc(torch.flatten(x, 1))


def conv_bn(
    channels_in: int,
    channels_out: int,
    kernel: int | tuple[int, int],
    activation: nn.Module | None,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
) -> nn.Sequential:
    """Return a convolution, its batch norm and, where given, the activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(channels_out),
    ]
    return nn.Sequential(*layers, *([activation] if activation else []))


class DSCNN(nn.Module):
    """Keyword spotting on 49x10 features: four depthwise-separable blocks of 64 channels."""

    def __init__(self, classes: int = 12, width: int = 64) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(1, width, (10, 4), nn.ReLU(), stride=2, padding=(5, 1)),
            *(
                nn.Sequential(
                    conv_bn(width, width, 3, nn.ReLU(), padding=1, groups=width),
                    conv_bn(width, width, 1, nn.ReLU()),
                )
                for _ in range(4)
            ),
        )
        self.pool = nn.AvgPool2d((25, 5))
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        return self.fc(torch.flatten(self.pool(self.features(x)), 1))


class InvertedResidual(nn.Module):
    """Widen, filter each channel, project; the input is added where the shape stays."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        widen = [conv_bn(channels_in, inner, 1, nn.ReLU6())] if expansion > 1 else []
        self.layers = nn.Sequential(
            *widen,
            conv_bn(inner, inner, 3, nn.ReLU6(), stride=stride, padding=1, groups=inner),
            conv_bn(inner, channels_out, 1, None),
        )
        self.keeps_shape = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """Add the input to the projection where it fits."""
        return x + self.layers(x) if self.keeps_shape else self.layers(x)


class MobileNetV2(nn.Module):
    """A narrow MobileNetV2 for 96x96 images."""

    # expansion, channels, blocks, stride of the first block
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 48, 2, 2), (6, 64, 2, 1))

    def __init__(self, classes: int = 10, head: int = 256) -> None:
        super().__init__()
        channels = 16
        blocks: list[nn.Module] = []
        for expansion, width, count, first_stride in self.STAGES:
            for index in range(count):
                stride = 1 if index else first_stride
                blocks.append(InvertedResidual(channels, width, stride, expansion))
                channels = width
        self.features = nn.Sequential(
            conv_bn(3, 16, 3, nn.ReLU6(), stride=2, padding=1),
            *blocks,
            conv_bn(channels, head, 1, nn.ReLU6()),
        )
        self.fc = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.fc(torch.flatten(x, 1))
