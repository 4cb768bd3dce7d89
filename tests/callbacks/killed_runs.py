"""Kills training runs at random moments and resumes them: run by `test_killed.py` and `make soak`.

One process, which has everything imported, forks a child for each run and sends it SIGKILL after a
random time. A second child resumes from the newest checkpoint that is there, and has to end with
the bits of the run that nobody killed. Whatever files a killed run leaves behind must be whole.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytorch_lightning as pl
import torch

from lightning_linger.callbacks import (
    FuseBNCallback,
    IntegerValidatorCallback,
    NormalizeCallback,
    ONNXExportCallback,
    QuantizeCallback,
    RNGStateCallback,
)
from tests.callbacks.boring import Classifier, loader, trainer

EPOCHS = 3


def fit(folder: Path, ckpt: Path | None) -> None:
    """Train with a checkpoint and an export after every epoch, and write the final state."""
    pl.seed_everything(21 if ckpt is None else 22, verbose=False)
    callbacks = [
        FuseBNCallback(),
        NormalizeCallback(output="99%"),
        QuantizeCallback(at_epoch=1),
        IntegerValidatorCallback(),
        ONNXExportCallback(folder / "epoch-{epoch}.onnx", at_epoch=[0, 2]),
        RNGStateCallback(),
        pl.callbacks.ModelCheckpoint(folder / "checkpoints", "{epoch}", save_top_k=-1),
    ]
    model = Classifier()
    run = trainer(folder, callbacks, EPOCHS, enable_checkpointing=True)
    run.fit(model, loader(), loader(2, shuffle=False), ckpt_path=ckpt)
    torch.save(model.state_dict(), folder / "unfinished.pt")
    (folder / "unfinished.pt").rename(folder / "final.pt")


def forked(work: Callable[[], None], log: Path) -> int:
    """Start a child that does the work and ends; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            work()
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finished(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def newest(folder: Path) -> Path | None:
    found = sorted(
        (folder / "checkpoints").glob("*.ckpt"), key=lambda p: int(p.stem.partition("=")[2])
    )
    return found[-1] if found else None


def broken_files(folder: Path) -> list[str]:
    """Read every checkpoint and every ONNX file; name what cannot be read, or is left over."""
    broken = []
    for path in folder.rglob("*"):
        if path.name.startswith("."):
            continue  # a temporary file of a killed writer: nothing has its name
        try:
            if path.suffix == ".ckpt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".onnx":
                onnx.checker.check_model(onnx.load(path))
        except Exception as error:
            broken.append(f"{path.name}: {error}")
    return broken


def differing(one: Path, other: Path) -> list[str]:
    first, second = (torch.load(path / "final.pt", weights_only=True) for path in (one, other))
    return [key for key in first if not torch.equal(first[key], second[key])]


def try_once(folder: Path, whole: Path, delay: float) -> dict[str, Any]:
    """Kill a run after some seconds, look at what it left, and resume it."""
    child = forked(lambda: fit(folder, None), folder / "killed.log")
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    completed = finished(child)
    broken = broken_files(folder)
    checkpoint = newest(folder)
    again = forked(lambda: fit(folder, checkpoint), folder / "resumed.log")
    resumed = finished(again)
    return {
        "delay": delay,
        "completed before": completed,
        "from": checkpoint.name if checkpoint else None,
        "broken": broken + broken_files(folder),
        "resumed": resumed,
        # Without a checkpoint the run starts over, from the seed of a resumed one.
        "differs": differing(folder, whole) if resumed and checkpoint else [],
    }


def has_failed(report: dict[str, Any]) -> bool:
    return bool(report["broken"] or report["differs"] or not report["resumed"])


def main(folder: Path, tries: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield one report per try."""
    torch.set_num_threads(1)
    warm = folder / "warm"
    warm.mkdir()
    fit(warm, None)
    whole = folder / "whole"
    whole.mkdir()
    start = time.monotonic()
    if not finished(forked(lambda: fit(whole, None), whole / "log")):
        sys.exit((whole / "log").read_text())
    seconds = time.monotonic() - start
    chance = random.Random(seed)
    for index in range(tries):
        place = folder / f"try-{index}"
        place.mkdir()
        yield try_once(place, whole, chance.uniform(0.1, 1.0) * seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    for report in main(**vars(arguments)):
        print(json.dumps(report), flush=True)
        failures += has_failed(report)
    sys.exit(failures > 0)
