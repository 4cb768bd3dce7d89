"""Quantization-aware training on several processes: Lightning's strategy, and nothing else.

Trains the digits network of `digits.py` with DDP. Only the Trainer's arguments differ from a run in
one process: ranges, error metrics and the exported file take care of themselves.

Run with `python examples/distributed.py --devices 2`.
Needs `pip install "lightning-linger[examples]"`. On GPUs, pass `--accelerator gpu`; on several
machines, `--nodes`, started as Lightning's documentation says for your cluster.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
from digits import Digits, digits_data

from lightning_linger.callbacks import (
    FuseBNCallback,
    IntegerValidatorCallback,
    ONNXExportCallback,
    QuantizeCallback,
    RNGStateCallback,
)


def main(out: Path, epochs: int, accelerator: str, devices: int, nodes: int) -> None:
    """Train in float for half of the epochs, then quantized; write checkpoints and an ONNX file."""
    # Every process needs the same seed: the data is shuffled with it and then divided.
    pl.seed_everything(1)
    validator = IntegerValidatorCallback(batches=1)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy="ddp",
        max_epochs=epochs,
        default_root_dir=out,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=5,
        callbacks=[
            FuseBNCallback(),
            QuantizeCallback(at_epoch=epochs // 2),
            validator,
            ONNXExportCallback(out / "digits.onnx"),
            RNGStateCallback(),
            pl.callbacks.ModelCheckpoint(out / "checkpoints", save_last=True),
        ],
    )
    trainer.fit(Digits(), datamodule=digits_data())
    codes = sum(row.elements for row in validator.latest)
    mismatches = sum(row.mismatches for row in validator.latest)
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    print(
        f"rank {trainer.global_rank} of {trainer.world_size}: "
        f"accuracy on its share {accuracy:.4f}; "
        f"on all, {mismatches} of {codes} codes differ between integers and fake-quant",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/distributed"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=1)
    main(**vars(parser.parse_args()))
