"""What the algorithms of post-training quantization are worth, on scikit-learn's digits.

A small network of depthwise and pointwise convolutions is trained in float and quantized without
any further training, alone and with each algorithm: cross-layer equalization, batch norm statistics
estimated anew, bias correction, AdaRound. Networks like this one, when they were trained longer,
have channels whose ranges are far apart; here they are pulled apart by hand, by powers of two,
which leaves the float function as it is.

Run with `python examples/ptq_algorithms.py`. Needs `pip install "lightning-linger[examples]"`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from common import Classifier, TensorData, accuracy_of, digits_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lightning_linger as linger

PLATFORMS = ("venusa", "onnxruntime")
WEIGHT_BITS = (8, 4, 3)
# Calibration data: some of the training images.
BATCHES, BATCH_SIZE = 8, 64
# Channels are pulled apart by up to this many powers of two in either direction.
OCTAVES = 4


class Separable(Classifier):
    """Depthwise and pointwise convolutions."""

    def __init__(self, learning_rate: float = 5e-3) -> None:
        super().__init__(learning_rate)
        self.features = nn.Sequential(
            *self._convolution(1, 16, 3),
            *self._convolution(16, 16, 3, groups=16),
            *self._convolution(16, 24, 1),
            *self._convolution(24, 24, 3, stride=2, groups=24),
            *self._convolution(24, 32, 1),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    @staticmethod
    def _convolution(
        inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> tuple[nn.Module, ...]:
        convolution = nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))


@torch.no_grad()
def pull_apart(model: Separable, octaves: int, seed: int = 0) -> None:
    """Scale the channels between the layers; a ReLU passes positive factors on."""
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in model.features if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.features if isinstance(m, nn.BatchNorm2d)]
    for norm, following in zip(norms, [*layers[1:], model.fc], strict=True):
        exponents = torch.randint(-octaves, octaves + 1, (norm.num_features,), generator=generator)
        factors = torch.exp2(exponents.float())
        norm.weight.mul_(factors)
        norm.bias.mul_(factors)
        depthwise = isinstance(following, nn.Conv2d) and following.groups > 1
        shape = [1] * following.weight.dim()
        shape[0 if depthwise else 1] = -1
        following.weight.div_(factors.view(shape))


Step = Callable[[nn.Module, Sequence[Tensor]], object]


def _nothing(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Quantize only."""


def _learned(steps: int) -> Step:
    config = linger.AdaRoundConfig(steps=steps)
    return lambda model, batches: linger.adaround(model, batches, config)


def recipes(steps: int) -> dict[str, tuple[bool, Step]]:
    """Return whether to equalize before calibration, and what to do after it, by title."""
    return {
        "PTQ": (False, _nothing),
        "CLE": (True, _nothing),
        "CLE, BN": (True, linger.reestimate_bn),
        "CLE, bias": (True, linger.correct_bias),
        "CLE, AdaRound": (True, _learned(steps)),
    }


def quantized(
    model: nn.Module,
    batches: Sequence[Tensor],
    config: linger.QuantConfig,
    equalize: bool,
    afterwards: Step,
) -> nn.Module:
    """Return a quantized copy of a float model."""
    model = linger.prepare(copy.deepcopy(model).eval(), (batches[0],))
    linger.fuse_bn(model)
    if equalize:
        linger.equalize(model)
    linger.calibrate(model, batches, config)
    afterwards(model, batches)
    return model


def main(
    out: Path, epochs: int, limit: int | None = None, steps: int = 500
) -> dict[str, dict[str, float]]:
    """Train, quantize by every recipe, and print the accuracies.

    Args:
        out: Folder of what Lightning writes.
        epochs: Of the float training.
        limit: Use only so many images.
        steps: Of AdaRound, per layer.

    Returns:
        Test accuracy by recipe and target, e.g. ``["PTQ"]["venusa, 8 bit"]``.
    """
    pl.seed_everything(0, verbose=False)
    parts = [(rows.unsqueeze(1), labels) for rows, labels in digits_rows()]
    data = TensorData(*parts, limit=limit)
    model = Separable()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        default_root_dir=out,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    inputs, labels = data.test.tensors
    with torch.no_grad():
        before = model.eval()(inputs)
        pull_apart(model, OCTAVES)
        assert torch.equal(model(inputs), before)
    images = data.train.tensors[0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    batches = images[order[: BATCHES * BATCH_SIZE]].split(BATCH_SIZE)

    results: dict[str, dict[str, float]] = {title: {} for title in recipes(steps)}
    for platform in PLATFORMS:
        for bits in WEIGHT_BITS:
            config = linger.QuantConfig(platform=platform, weight_bits=bits)
            for title, recipe in recipes(steps).items():
                whole = quantized(model, batches, config, *recipe)
                with torch.no_grad():
                    accuracy = accuracy_of(whole(inputs), labels)
                results[title][f"{platform}, {bits} bit"] = accuracy
    title = f"{len(labels)} test images, float {100 * accuracy_of(before, labels):.2f} %"
    table = Table("weights", *results, title=title)
    for target in results["PTQ"]:
        table.add_row(target, *(f"{100 * found[target]:.2f} %" for found in results.values()))
    console = Console()
    console.print(table)
    console.print(
        "CLE: cross-layer equalization; BN: statistics of batch norms estimated anew; bias: bias "
        "correction."
    )
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ptq_algorithms"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--limit", type=int, help="use only so many images, to try it out")
    parser.add_argument("--steps", type=int, default=500, help="of AdaRound, per layer")
    arguments = parser.parse_args()
    main(arguments.out, arguments.epochs, arguments.limit, arguments.steps)
