"""Two processes: the same on every rank, and what one process computes with the global batch."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_linger.callbacks import NormalizeCallback, QuantizeCallback
from tests.callbacks import distributed_run
from tests.callbacks.boring import trainer
from tests.callbacks.distributed_run import RANKS, Plain, data, ranges

ROOT = Path(__file__).parents[2]
SECONDS = 240


def run_script(script: Path, *arguments: str) -> str:
    """Run a script that starts a process per rank; end them all if it takes too long."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-4000:]
    return output


def alone(folder: Path, callbacks: list[Any], **kwargs: Any) -> Plain:
    """Fit in this process, with what both ranks together have as a batch."""
    pl.seed_everything(5, verbose=False)
    module = Plain()
    run = trainer(folder, callbacks, 1, num_sanity_val_steps=0, **kwargs)
    run.fit(module, data(4 * RANKS), data(4 * RANKS))
    return module


def test_row31_two_processes_have_the_same_ranges_after_each_step(tmp_path: Path) -> None:
    run_script(Path(distributed_run.__file__), str(tmp_path))
    first, second = (
        json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(RANKS)
    )
    failed = {name: result["failed"] for name, result in first.items() if "failed" in result}
    assert not failed

    export = first.pop("export"), second.pop("export")
    assert export[0] == {
        "written": ["0.onnx", "1.onnx", "model.onnx"],
        "mismatches": 0,
        "there": True,
    }
    assert export[1] == {"written": [], "mismatches": None, "there": True}

    for name in first:
        assert first[name] == second[name], f"{name}: the ranks differ"

    for name in ("ddp", "static graph", "find unused", "no broadcast", "accumulation"):
        assert len(first[name]["digests"]) == 3 * distributed_run.BATCHES, name
        assert len({ours for _, ours in first[name]["digests"][4:]}) == 8, "ranges moved"
    for name in ("learned", "learned later"):
        assert first[name]["learned"], name
        weights = [weights for weights, _ in first[name]["digests"]]
        assert len(set(weights)) == len(weights) == 3 * distributed_run.BATCHES, name
    assert first["resume"] == {"0": [], "1": []}
    for name, found in first["algorithms"].items():
        assert found["applied"] == ["equalize", "reestimate_bn", name]
    assert first["condition"] == {"on": [False, True, True]}
    assert first["sharded"].keys() > {"file", "pieces", "file from 1", "pieces from 1", "loaded"}
    assert not any(first["sharded"].values()), "sharded training differs from DDP"
    said = {
        "sync_batchnorm": "replaces every batch norm",
        "sharded apart": "`bn` cannot be folded into `stem`",
        "learned": "nobody would reduce their gradients",
        "export": "works on the whole model",
        "algorithm": "they lie in pieces",
        "tensor parallel": "a part of its weight",
    }
    assert first["refused"].keys() == said.keys()
    for name, words in said.items():
        assert words in first["refused"][name], first["refused"][name]

    # -40 comes from rank 0 in a batch that is not finite on rank 1, so it is left out.
    assert first["estimators"]["minmax"] == [-12.0, 9.0, 2]
    assert first["estimators"]["absmax"] == [-12.0, 12.0, 2]
    # The values that count are -1, 2, -1, 9 and -12, in bins of 18 / 2048.
    assert first["estimators"]["50%"] == pytest.approx([-2.0, 2.0, 2], abs=0.02)

    # One value of 1 and three of 4.
    assert first["means"] == {"unlike": 3.25, "one empty": 4.0, "empty": 0.0}

    assert all(value != 1.0 for value in first["learned by chance"]["learned"].values())

    whole = alone(tmp_path, [QuantizeCallback()])
    assert first["global batch"]["ranges"] == ranges(whole)
    for name, weight in whole.named_parameters():
        found = torch.tensor(first["global batch"]["weights"][name])
        assert torch.allclose(found, weight, rtol=1e-4, atol=1e-6), name

    limited = ranges(
        alone(
            tmp_path,
            [NormalizeCallback(weight=None, output="2*mean")],
            limit_train_batches=1,
        )
    )
    assert limited.keys() == first["dynamic limits"]["ranges"].keys()
    for name, bound in limited.items():
        assert first["dynamic limits"]["ranges"][name] == pytest.approx(bound, rel=1e-5)

    assert len(first["narrowing"]["digests"]) == 3 * distributed_run.BATCHES
    assert all(row["drop"] > 0 for row in first["narrowing"]["rows"] if row["bits"] == 2)
    weights = {bits.partition("/")[0] for bits in first["narrowing"]["bits"]} - {"", "-"}
    assert weights - {"8"}, "chosen widths stay when others change"
    assert any(bits.endswith("/6/6") for bits in first["narrowing"]["bits"])

    assert first["without data"]["max_lsb"] == 1
    assert first["without data"]["outputs"]["changed"] == 1.0

    # Two batches of 4 images on each rank, 4 classes.
    counted = {site: elements for site, elements, _ in first["metrics"]["divergence"]}
    assert counted["fc/linear/0"] == 2 * 4 * RANKS * 4
    assert all(mismatches == 0 for _, _, mismatches in first["metrics"]["divergence"])
    worst = min(sqnr for _, sqnr, _ in first["metrics"]["error"])
    assert first["metrics"]["logged"]["quant_error/worst_sqnr"] == pytest.approx(worst, rel=1e-6)
    assert first["metrics"]["best"]


@pytest.mark.slow
def test_the_example_runs_on_two_processes(tmp_path: Path) -> None:
    script = ROOT / "examples" / "distributed.py"
    output = run_script(script, "--out", str(tmp_path), "--epochs", "4")
    lines = sorted(line for line in output.splitlines() if line.startswith("rank "))
    assert [line[:11] for line in lines] == ["rank 0 of 2", "rank 1 of 2"]
    assert len({line.partition("on all, ")[2] for line in lines}) == 1, "reduced over the ranks"
    assert re.search(r"on all, 0 of \d{5,} codes differ", lines[0])
    assert all(float(re.search(r"share ([\d.]+);", line)[1]) > 0.6 for line in lines)
    assert {path.name for path in tmp_path.glob("*.onnx")} == {"digits.onnx"}
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
