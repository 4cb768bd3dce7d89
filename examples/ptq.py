"""Post-training quantization as Cambricon's tools do it: calibrate, save, rebuild, run.

Trains a small network on scikit-learn's digits in float, calibrates it on a few batches, with int8
and int16 layers and raw uint8 images, and runs a fresh model from the saved state dict.

Run with `python examples/ptq.py`. Needs `pip install "lightning-linger[examples]"`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import Classifier, Results, TensorData, accuracy_of, differing, digits_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.export.catch import load_catch, to_catch

# The mean and the deviation of pixels from 0 to 1.
NORMALIZATION = linger.FirstConv(mean=[0.3], std=[0.4])
BATCHES = 8
# The last layer in int16; the rest in int8 with one scale per output channel.
OVERRIDES = {"fc": {"weight_bits": 16, "activation_bits": 16}}


class Net(Classifier):
    """Two convolutions; nothing in it knows about quantization."""

    def __init__(self, learning_rate: float = 3e-3) -> None:
        super().__init__(learning_rate)
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        x = F.relu(self.conv2(x))
        return self.fc(x.flatten(1))


def raw_digits() -> list[tuple[Tensor, Tensor]]:
    """Return training and test images of one channel, as bytes from 0 to 255, and their labels."""
    return [
        ((rows * 255.0).round().to(torch.uint8).unsqueeze(1), labels)
        for rows, labels in digits_rows()
    ]


def train(epochs: int, folder: Path) -> tuple[Net, TensorData]:
    """Train in float, on normalized images."""
    parts = [(NORMALIZATION.normalized(images), labels) for images, labels in raw_digits()]
    data = TensorData(*parts)
    model = Net()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return model.eval(), data


def generate(model: nn.Module, data: TensorData, path: Path) -> nn.Module:
    """Return a calibrated copy of a float model, whose state is saved."""
    quantized = linger.calibrate(
        model,
        data.train_dataloader(),
        linger.preset("cambricon", dtype="int8", per_channel=True),
        overrides=OVERRIDES,
        firstconv=NORMALIZATION,
        batches=BATCHES,
        inplace=False,
    )
    torch.save(quantized.state_dict(), path)
    return quantized


def main(out: Path, epochs: int) -> Results:
    """Train, calibrate, save, rebuild and compare, and print what came of it."""
    pl.seed_everything(0, verbose=False)
    out.mkdir(parents=True, exist_ok=True)
    model, data = train(epochs, out)
    calibrated = generate(model, data, out / "quantized.pt")
    run = linger.load_checkpoint(Net, out / "quantized.pt").eval()

    # What Cambricon's own tools load, and a model made from it.
    torch.save(to_catch(calibrated.state_dict()), out / "catch.pth")
    catch_state = torch.load(out / "catch.pth", weights_only=True)
    images, labels = data.test.tensors
    from_catch = load_catch(Net(), catch_state, (images,)).eval()

    (_, _), (raw, _) = raw_digits()
    forwards: dict[str, Callable[[], Tensor]] = {
        "float": lambda: model(images),
        "calibrated": lambda: calibrated(images),
        "run": lambda: run(images),
        "run, raw images": lambda: run(raw),
        "from CATCH's state dict": lambda: from_catch(raw),
    }
    with torch.no_grad():
        logits = {name: forward() for name, forward in forwards.items()}
        with linger.integer(run):
            logits["run, integers, raw images"] = run(raw)

    results: Results = {"logits": logits["float"].numel()}
    table = Table("model", "accuracy", "other logits than the calibrated one's")
    for name, values in logits.items():
        results[name] = accuracy_of(values, labels)
        results[f"{name} differing"] = differing(values, logits["calibrated"])
        found = "-" if name == "float" else f"{results[f'{name} differing']:.0f}"
        table.add_row(name, f"{100 * results[name]:.2f} %", found)
    console = Console()
    console.print(table)
    console.print(f"Files: {out}: quantized.pt, catch.pth")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ptq"))
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    main(arguments.out, arguments.epochs)
