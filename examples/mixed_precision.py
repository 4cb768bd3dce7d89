"""A width per layer under a budget of bytes, on scikit-learn's digits.

Trains the network of `digits.py` in float, measures what each layer loses at each width, and gives
every layer the width that the sensitivities ask for, in as many bytes as the model has with one
width for all. Compares both, after calibration alone and after quantization-aware training, with
and without distillation from the float model.

Run with `python examples/mixed_precision.py`. Needs `pip install "lightning-linger[examples]"`.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from statistics import mean

import pytorch_lightning as pl
import torch
from common import Classifier, Overrides, TensorData, accuracy_of
from digits import Digits, digits_data
from rich.console import Console
from rich.table import Table

import lightning_linger as linger
from lightning_linger.callbacks import DistillationCallback, FuseBNCallback, QuantizeCallback

PLATFORM = "venusa"
WIDTHS = (2, 3, 4, 6, 8)
UNIFORM = (3,)  # the budgets: what a model with this width for all weights takes
METHODS = ("calibrated", "trained", "distilled")

Accuracies = dict[str, float]


def trainer(epochs: int, callbacks: list[pl.Callback], out: Path) -> pl.Trainer:
    """Return a trainer that leaves nothing behind."""
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=out,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


@torch.no_grad()
def accuracy(model: Classifier, data: TensorData) -> float:
    """Return the accuracy on the test data."""
    inputs, labels = data.test.tensors
    return accuracy_of(model.eval()(inputs), labels)


def calibrated(
    model: Classifier, data: TensorData, bits: int, overrides: Overrides | None
) -> Classifier:
    """Return a quantized copy whose weights are those of the float model."""
    quantized = copy.deepcopy(model)
    linger.fuse_bn(linger.prepare(quantized, (data.train.tensors[0][:2],)))
    config = linger.QuantConfig(platform=PLATFORM, weight_bits=bits)
    linger.quantize(quantized, config, overrides=overrides)
    linger.calibrate(quantized, data.train.tensors[0].split(256))
    return quantized


def trained(
    model: Classifier,
    data: TensorData,
    bits: int,
    overrides: Overrides | None,
    epochs: int,
    out: Path,
    distill: bool = False,
) -> Classifier:
    """Return a copy that is trained further on the grid."""
    # Lightning trains a model in the mode that it finds it in.
    quantized = copy.deepcopy(model).train()
    quantized.hparams["learning_rate"] *= 0.5
    quantize = QuantizeCallback(platform=PLATFORM, weight_bits=bits, overrides=overrides)
    # With few bits the last part of training needs the statistics that the chip has.
    callbacks = [FuseBNCallback(freeze_at_epoch=2 * epochs // 3), quantize]
    if distill:
        callbacks.append(DistillationCallback(weight=1.0, temperature=2.0))
    pl.seed_everything(1, verbose=False)
    trainer(epochs, callbacks, out).fit(quantized, data)
    return quantized


def one_seed(seed: int, data: TensorData, epochs: int, out: Path) -> dict[str, Accuracies]:
    """Train in float, choose widths, and compare; returns accuracies by model and budget."""
    pl.seed_everything(seed, verbose=False)
    model = Digits()
    trainer(epochs, [], out).fit(model, data)
    results = {"float": {"": accuracy(model, data)}}

    measured = linger.prepare(copy.deepcopy(model).eval(), (data.train.tensors[0][:2],))
    linger.fuse_bn(measured)
    rows = linger.sensitivity(measured, data.train.tensors[0][:512].split(256), bits=WIDTHS)
    rows.save(out / f"sensitivity.{seed}.csv")
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    for bits in UNIFORM:
        overrides = linger.choose_bits(measured, rows, weights * bits / 8, platform=PLATFORM)
        (out / f"mixed.{bits}.{seed}.json").write_text(json.dumps(overrides, indent=1))
        for name, chosen in ((f"{bits} bits", None), (f"mixed, as {bits} bits", overrides)):
            runs = {
                "calibrated": calibrated(model, data, bits, chosen),
                "trained": trained(model, data, bits, chosen, epochs, out),
                "distilled": trained(model, data, bits, chosen, epochs, out, distill=True),
            }
            results[name] = {method: accuracy(run, data) for method, run in runs.items()}
    return results


def main(out: Path, epochs: int, seeds: int) -> dict[str, Accuracies]:
    """Compare, and print the means over the seeds."""
    out.mkdir(parents=True, exist_ok=True)
    data = digits_data()
    found = [one_seed(seed, data, epochs, out) for seed in range(seeds)]
    results = {
        name: {method: mean(run[name][method] for run in found) for method in methods}
        for name, methods in found[0].items()
    }
    table = Table("weights", *METHODS, title=f"accuracy, {len(data.test)} images, {seeds} seeds")
    for name, methods in results.items():
        if methods.keys() == {""}:
            table.add_row(name, f"{100 * methods['']:.2f} %")
        else:
            table.add_row(name, *(f"{100 * methods[method]:.2f} %" for method in METHODS))
    console = Console()
    console.print(table)
    console.print(f"Sensitivities and the chosen widths: {out}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mixed_precision"))
    parser.add_argument("--epochs", type=int, default=6, help="in float, and of each further run")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    main(arguments.out, arguments.epochs, arguments.seeds)
