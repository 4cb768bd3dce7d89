"""Magnitudes of weights and activations: values, sources, names, files."""

import copy
import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import cli
from lightning_linger.analysis.statistics import measure
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import Lambda


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.fc = nn.Linear(4, 3)
        self.example_input_array = torch.ones(2, 1, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        return self.act(self.fc(x.mean((2, 3))))


@pytest.mark.parametrize("size", [1, 7, 99, 100, 101, 1000])
def test_each_column_by_hand(size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    row = measure("x", x)
    magnitudes = sorted(abs(value) for value in x.tolist())
    dynamic = magnitudes[max(int(size * 0.99) - 1, 0)]
    assert row.max == magnitudes[-1]
    assert row.dynamic == dynamic
    assert row.mean == pytest.approx(sum(magnitudes) / size, rel=1e-12)
    assert row.max_over_mean == pytest.approx(row.max / row.mean)
    assert row.max_over_dynamic == magnitudes[-1] / dynamic


def test_outliers_are_flagged_above_the_threshold() -> None:
    x = torch.ones(200)
    x[3] = -10.0
    assert measure("x", x).flag == ""
    x[3] = -10.5
    row = measure("x", x)
    assert (row.max, row.dynamic, row.flag) == (10.5, 1.0, "outliers")
    assert measure("x", x, threshold=11.0).flag == ""


def test_what_is_not_finite_is_flagged_and_measured_without() -> None:
    row = measure("x", torch.tensor([1.0, float("nan"), -2.0, float("inf")]))
    assert (row.max, row.mean, row.flag) == (2.0, 1.5, "not finite")
    zeros = measure("x", torch.zeros(4))
    assert (zeros.max, zeros.max_over_mean, zeros.max_over_dynamic, zeros.flag) == (0, 1, 1, "")
    spike = measure("x", F.pad(torch.ones(1), (0, 199)))
    assert spike.max_over_dynamic == math.inf
    assert spike.flag == "outliers"


def test_weights_of_every_source(tmp_path: Path) -> None:
    model = Net()
    names = ["stem.weight", "bn.weight", "bn.bias", "fc.weight", "fc.bias"]
    torch.save(model.state_dict(), tmp_path / "state.pt")
    checkpoint = {"state_dict": model.state_dict(), "epoch": 3}
    torch.save(checkpoint, tmp_path / "run.ckpt")
    expected = list(linger.analyse_weights(model))
    assert [row.tensor for row in expected] == names
    assert expected[0].shape == "4x1x3x3"
    assert expected[0].max == float(model.stem.weight.detach().abs().max())
    sources: list[Any] = [
        *(model.state_dict(), checkpoint),
        *(tmp_path / "state.pt", str(tmp_path / "run.ckpt")),
    ]
    for source in sources:
        assert list(linger.analyse_weights(source)) == expected
    linger.prepare(model, (model.example_input_array,))
    linger.quantize(model)
    assert list(linger.analyse_weights(model)) == expected


def test_a_source_that_holds_other_things_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(linger.ConfigError, match="no weights"):
        linger.analyse_weights({"epoch": 3})
    with pytest.raises(linger.ConfigError, match="cannot read"):
        linger.analyse_weights(tmp_path / "none.pt")
    with pytest.raises(linger.ConfigError, match=r"matches no tensor.*stem"):
        linger.analyse_weights(Net(), pattern="sten.*")
    with pytest.raises(linger.ConfigError, match="threshold"):
        linger.analyse_weights(Net(), threshold=0.0)


def test_activations_of_layers_and_nothing_of_the_model_changes() -> None:
    model = Net().train()
    model.bn.eval()
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 1, 6, 6)
    rows = linger.analyse_activations(model, x)
    assert [row.tensor for row in rows] == ["stem", "bn", "act", "fc", "act@1"]
    assert rows[0].max == float(model.stem(x).detach().abs().max())
    assert rows[0].shape == "4x4x4x4"
    assert (model.training, model.bn.training, model.stem.training) == (True, False, True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.stem._forward_hooks
    assert [row.tensor for row in linger.analyse_activations(model, x, pattern="act*")] == [
        *("act", "act@1")
    ]


def test_activations_of_sites_are_those_of_the_stage_that_is_on() -> None:
    model = Net()
    x = torch.randn(4, 1, 6, 6)
    linger.prepare(model, (x,))
    linger.fuse_bn(model)
    linger.quantize(model)
    linger.calibrate(model, [x]).train()
    state = copy.deepcopy(model.state_dict())
    rows = {row.tensor: row for row in linger.analyse_activations(model, (x,))}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {"stem/conv2d/0", "/mean/0", "fc/linear/0"} <= set(rows)
    model.eval()
    with torch.no_grad():
        assert rows["fc/linear/0"].max >= float(model(x).abs().max())
        codes = rows["stem/conv2d/0"].max / float(_step(model, "stem/conv2d/0"))
    assert codes == round(codes)


def _step(model: nn.Module, key: str) -> Any:
    output = instrumentation_of(model).find(key).output
    assert output is not None
    return output.step()


def test_batches_are_tensors_tuples_and_mappings() -> None:
    model = Lambda(lambda self, x, *, scale: self.fc(x) * scale, fc=nn.Linear(3, 2))
    x = torch.randn(5, 3)
    expected = measure("fc", model.fc(x))
    assert linger.analyse_activations(model, {"x": x, "scale": 2})[0] == expected
    assert linger.analyse_activations(model, (x,), {"scale": 2})[0] == expected
    nothing = Lambda(lambda self, x: x + 1, child=nn.Identity())
    with pytest.raises(linger.ConfigError, match="no layer"):
        linger.analyse_activations(nothing, x)


def test_saved_as_text_csv_and_json(tmp_path: Path) -> None:
    state = {"a": torch.randn(50), "b": F.pad(torch.ones(1), (0, 199))}
    rows = linger.analyse_weights(state)
    text = rows.save(tmp_path / "w.log").read_text()
    assert text == f"{rows}\n"
    assert text.splitlines()[0].split()[:3] == ["tensor", "shape", "mean"]
    assert "outliers" in text.splitlines()[2]
    with rows.save(tmp_path / "w.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["max"]) for row in read] == [row.max for row in rows]
    assert float(read[1]["max_over_dynamic"]) == math.inf
    loaded = json.loads(rows.save(str(tmp_path / "w.json")).read_text())
    assert loaded[0]["dynamic"] == rows[0].dynamic
    assert (loaded[1]["max_over_dynamic"], loaded[1]["flag"]) == (None, "outliers")
    with pytest.raises(linger.ConfigError, match="does not exist"):
        rows.save(tmp_path / "none" / "w.csv")


def test_the_command_on_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"net.a": torch.randn(50), "net.b": F.pad(torch.ones(1), (0, 199))}
    torch.save(state, tmp_path / "state.pt")
    target = tmp_path / "out.json"
    source = str(tmp_path / "state.pt")
    assert cli.main(["analyse", source, "--pattern", "*b", "-o", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "net.b" in printed
    assert "net.a" not in printed
    assert "1 of 1 tensors are flagged" in printed
    assert [row["tensor"] for row in json.loads(target.read_text())] == ["net.b"]
    assert cli.main(["analyse"]) == 2
    assert "either SOURCE" in capsys.readouterr().err
    assert cli.main(["analyse", source, "-o", str(tmp_path / "no" / "out.csv")]) == 2


def test_the_command_on_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyse", "--module", "tests.analysis.test_statistics:Net"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names[:2] == ["stem.weight", "bn.weight"]
    assert "act@1" in names
    command = ["analyse", "--module", "tests.analysis.test_statistics:Net", "--input", "1x3x6x6"]
    assert cli.main(command) == 2
    assert "does not run on the inputs" in capsys.readouterr().err
