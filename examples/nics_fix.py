"""Fixed-point training as NICS-fix does it, on scikit-learn's digits.

Trains a small residual network in float, then with scales 2^x that follow each batch (AUTO), then
with the scales as they are (FIXED); gradients have 16 bits and a scale of their own. Then the
scales go through a YAML file into a second model that has the weights alone.

Run with `python examples/nics_fix.py`. Needs `pip install "lightning-linger[examples]"`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
import yaml
from common import Results, TensorData, accuracy_of
from digits import Digits, digits_data

import lightning_linger as linger
from lightning_linger import nics_fix as nfp
from lightning_linger.callbacks import FuseBNCallback, QuantizeCallback
from lightning_linger.presets import read_preset


def train(data: TensorData, epochs: int, preset: dict[str, object], out: Path) -> Digits:
    """Train through the three methods, a third of the epochs each."""
    pl.seed_everything(0, verbose=False)
    model = Digits()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        default_root_dir=out,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            FuseBNCallback(),
            QuantizeCallback(at_epoch=epochs // 3, freeze_at_epoch=2 * epochs // 3, preset=preset),
        ],
    )
    trainer.fit(model, data)
    return model.eval()


def reloaded(model: Digits, preset: dict[str, object], configs: Path) -> Digits:
    """Return a new model with the float weights of another one, and the scales of a file."""
    other = Digits()
    linger.prepare(other, (other.example_input_array,))
    linger.fuse_bn(other)
    linger.quantize(other, read_preset(preset))
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("_linger.")}
    other.load_state_dict(weights, strict=False)
    nfp.load_fix_configs(other, yaml.safe_load(configs.read_text())["data"])
    return other.eval()


@torch.no_grad()
def main(out: Path, epochs: int, bitwidth: int = 8, stochastic: bool = False) -> Results:
    """Train, save, load, and print what came of it."""
    out.mkdir(parents=True, exist_ok=True)
    data = digits_data()
    preset: dict[str, object] = {
        "name": "nics_fix",
        "bitwidth": bitwidth,
        "stochastic": stochastic,
        "gradient_bits": 16,
    }
    with torch.enable_grad():
        model = train(data, epochs, preset, out)
    images, labels = data.test.tensors
    fixed = model(images)
    nfp.print_fix_configs(model)

    configs = out / "fix.yaml"
    scales = {
        "data": nfp.get_fix_configs(model, data_only=True),
        "grad": nfp.get_fix_configs(model, grad=True, data_only=True),
    }
    configs.write_text(yaml.safe_dump(scales))
    torch.save(nfp.fix_state_dict(model), out / "fixed.pt")
    with linger.integer(model):
        integers = model(images)
    again = reloaded(model, preset, configs)(images)
    nfp.set_fix_method(model, nfp.FIX_NONE)
    results = {
        "float": accuracy_of(model(images), labels),
        "fixed": accuracy_of(fixed, labels),
        "fixed_vs_integer": float((fixed != integers).sum()),
        "fixed_vs_reloaded": float((fixed != again).sum()),
    }
    print(f"scikit-learn digits, {len(data.test)} test images, {bitwidth} bits")
    for name in ("float", "fixed"):
        print(f"{name + ' accuracy':32} {results[name]:8.2%}")
    print(f"{'logits that differ, integers':32} {results['fixed_vs_integer']:8.0f}")
    print(f"{'logits that differ, reloaded':32} {results['fixed_vs_reloaded']:8.0f}")
    print(f"scales: {configs}, values: {out / 'fixed.pt'}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/nics_fix"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--bitwidth", type=int, default=8)
    parser.add_argument("--stochastic", action="store_true", help="round by chance in training")
    arguments = parser.parse_args()
    main(arguments.out, arguments.epochs, arguments.bitwidth, arguments.stochastic)
