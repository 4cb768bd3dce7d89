"""Small models and helpers that several test files share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.sites import Site


class Lambda(nn.Module):
    """Layers as attributes, and a function that is the forward."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class Chain(nn.Module):
    """A sequence of layers under the name ``net``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    """A residual block with batch norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Chained(nn.Module):
    """A residual block in which no module is called twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + x)


class ResNet(nn.Module):
    """A tiny residual classifier: folding, reuse of an activation module, addition, pooling."""

    def __init__(self, channels: int = 6, classes: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.layers = nn.Sequential(Block(channels), Block(channels))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(torch.relu(self.bn(self.stem(x))))
        return self.fc(self.dropout(self.pool(x).flatten(1)))


IMAGES = (4, 3, 12, 12)


def images(batch: int = 4) -> Tensor:
    """A batch for :class:`ResNet`."""
    return torch.randn(batch, *IMAGES[1:])


def trained(
    model: nn.Module,
    *inputs: Tensor,
    config: linger.QuantConfig | None = None,
    fold: str | None = None,
    steps: int = 3,
    lr: float = 0.0,
    **selection: Any,
) -> nn.Module:
    """Prepare, fold if asked, quantize, run training steps, switch to evaluation."""
    linger.prepare(model, inputs)
    if fold is not None:
        linger.fuse_bn(model, mode=fold)
    linger.quantize(model, config, **selection)
    train(model, inputs, steps, lr)
    return model.eval()


def train(model: nn.Module, inputs: Sequence[Any], steps: int, lr: float) -> None:
    """Run training forwards, and SGD steps where ``lr`` is not zero."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters or [nn.Parameter(torch.zeros(1))], lr=lr or 1.0)
    for _ in range(steps):
        if not lr:
            with torch.no_grad():
                model(*inputs)
            continue
        optimizer.zero_grad()
        first_tensor(model(*inputs)).square().mean().backward()
        optimizer.step()


def first_tensor(output: Any) -> Tensor:
    """The first tensor of an output tree."""
    return torch.utils._pytree.tree_leaves(output)[0]


@torch.no_grad()
def assert_integer_exact(model: nn.Module, *inputs: Any, finite: bool = True) -> None:
    """Fake-quant evaluation equals integer execution bit for bit, and integers really flow."""
    systems: list[str | None] = []
    fake = model(*inputs)
    with linger.integer(model):
        instrumentation = instrumentation_of(model)
        instrumentation.tap = lambda event: (
            systems.append(event.site.system()) if event.site.quantized else None
        )
        whole = model(*inputs)
        instrumentation.tap = None
    assert "integer" in systems
    assert set(systems) <= {"integer", None}
    for a, b in zip(
        torch.utils._pytree.tree_leaves(fake), torch.utils._pytree.tree_leaves(whole), strict=True
    ):
        if not isinstance(a, Tensor):
            assert a == b
            continue
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert not finite or torch.isfinite(a).all()
        assert torch.equal(a.isnan(), b.isnan())
        a, b = (x.masked_fill(x.isnan(), 0) for x in (a, b))
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} values differ"


def keys(model: nn.Module) -> list[str]:
    """The site keys of a prepared model."""
    return [site.key for site in instrumentation_of(model).sites]


def site_of(model: nn.Module, key: str) -> Site:
    """One site of a prepared model."""
    return instrumentation_of(model).find(key)


def bits_of(values: Tensor, step: float) -> Tensor:
    """The integer codes of values on a grid; fails if they are not on it."""
    codes = values.double() / step
    assert torch.equal(codes, codes.round())
    return codes.long()


def float_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of the ``state_dict`` that belongs to the float model."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith("_linger.")}
