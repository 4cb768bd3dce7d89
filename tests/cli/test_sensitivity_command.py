"""``lightning-linger sensitivity``: the table, the choice, and what is refused."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lightning_linger as linger
from lightning_linger.analysis.sensitivity import read_sensitivities
from lightning_linger.cli import main

MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 3)
        self.example_input_array = torch.zeros(1, 2, 6)

    def forward(self, x, scale=None):
        y = torch.relu(self.bn(self.conv(x))).mean(2)
        return self.fc(y if scale is None else y * scale)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "measured_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "measured_models", raising=False)
    importlib.invalidate_caches()
    rng = np.random.default_rng(0)
    np.save("x.npy", rng.normal(size=(20, 2, 6)))
    np.savez("both.npz", **{"0": rng.normal(size=(20, 2, 6)), "scale": rng.normal(size=(20, 8))})
    np.save("short.npy", rng.normal(size=(3, 8)))
    np.save("nan.npy", np.full((2, 2, 6), np.nan))
    np.save("wrong.npy", rng.normal(size=(20, 5, 6)))
    return tmp_path


MODULE = ["sensitivity", "--module", "measured_models:Net"]


def saved(folder: Path) -> Any:
    torch.manual_seed(0)
    model = importlib.import_module("measured_models").Net()
    torch.save(model.state_dict(), folder / "net.pt")
    return model


def test_the_rows_are_those_of_the_function(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(folder)
    options = ["--ckpt", "net.pt", "--data", "x.npy", "--batch", "8", "--bits", "3", "8"]
    assert main([*MODULE, *options, "-o", "rows.csv"]) == 0
    printed = capsys.readouterr().out
    data = torch.from_numpy(np.load("x.npy")).float().split(8)
    linger.fuse_bn(linger.prepare(model, (data[0],)))
    expected = linger.sensitivity(model, data, bits=(3, 8))
    assert list(read_sensitivities(Path("rows.csv"))) == list(expected)
    assert str(expected) in printed


def test_widths_are_chosen_under_a_budget(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(folder)
    weights = 8 * 2 * 3 + 8 * 3
    options = ["--ckpt", "net.pt", "--data", "both.npz", "--platform", "onnxruntime"]
    inputs = ["--input", "1x2x6", "--input", "scale=1x8", "--modules", "conv", "fc"]
    budget = ["--budget", str(weights // 2), "--overrides", "mixed.json", "--part", "both"]
    assert main([*MODULE, *options, *inputs, *budget, "--metric", "kl"]) == 0
    overrides = json.loads(Path("mixed.json").read_text())
    assert set(overrides) == {"conv", "fc"}
    used = 48 * overrides["conv"]["weight_bits"] + 24 * overrides["fc"]["weight_bits"]
    assert used <= 8 * (weights // 2)
    printed = capsys.readouterr().out
    assert f'  "conv": {json.dumps(overrides["conv"])}' in printed.splitlines()


def test_a_target_of_layers_with_real_results(folder: Path) -> None:
    model = saved(folder)
    options = ["--ckpt", "net.pt", "--data", "x.npy", "--platform", "mlu", "--budget", "40"]
    assert main([*MODULE, *options, "--overrides", "mixed.json"]) == 0
    linger.fuse_bn(linger.prepare(model, (torch.zeros(1, 2, 6),)))
    config = linger.QuantConfig(platform="mlu", output_bits=None)
    linger.quantize(model, config, overrides=json.loads(Path("mixed.json").read_text()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing.npy"], "cannot read 'nothing.npy'"),
        (["--data", "wrong.npy"], "Net does not run on the data"),
        (["--data", "nan.npy"], "holds NaN or infinity"),
        (["--data", "x.npy", "--bits", "1"], "`bits` holds integers from 2 to 16"),
        (["--data", "x.npy", "--batch", "0"], "--batch and --samples are positive"),
        (["--data", "x.npy", "--overrides", "f.json"], "Pass --budget too"),
        (["--data", "x.npy", "--budget", "3"], "the smallest possible is 18"),
        (["--data", "x.npy", "-o", "missing/rows.csv"], "does not exist"),
        (
            ["--data", "x.npy", "short.npy", "--input", "1x2x6", "--input", "scale=1x8"],
            "--data holds [3, 20] samples",
        ),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*MODULE, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("f.json").exists()
