"""A run that is killed leaves whole files, and resumes to the bits of one that was not."""

import json
from pathlib import Path

import onnx
import pytest
import torch

from tests.callbacks import killed_runs
from tests.callbacks.test_distributed import run_script


def test_killed_runs_resume_to_the_same_bits(tmp_path: Path) -> None:
    output = run_script(Path(killed_runs.__file__), str(tmp_path), "--tries", "5")
    reports = [json.loads(line) for line in output.splitlines() if line.startswith('{"delay"')]
    assert len(reports) == 5
    assert not [report for report in reports if killed_runs.has_failed(report)]
    # Some were killed at work: after a checkpoint, and before the end.
    assert any(not report["completed before"] and report["from"] for report in reports)


def test_broken_files_would_be_found(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3)}, tmp_path / "whole.ckpt")
    (tmp_path / ".model.onnx.1234.tmp").write_bytes(b"half")
    assert killed_runs.broken_files(tmp_path) == []
    content = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    (tmp_path / "half.onnx").write_bytes(b"\x08")
    found = sorted(text.partition(":")[0] for text in killed_runs.broken_files(tmp_path))
    assert found == ["half.ckpt", "half.onnx"]


def test_a_differing_end_would_be_found(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("other", 2.0)):
        (tmp_path / name).mkdir()
        torch.save({"x": torch.tensor(value), "y": torch.ones(())}, tmp_path / name / "final.pt")
    assert killed_runs.differing(tmp_path / "one", tmp_path / "other") == ["x"]
    good = {"broken": [], "differs": [], "resumed": True}
    assert not killed_runs.has_failed(good)
    for change in ({"broken": ["x"]}, {"differs": ["x"]}, {"resumed": False}):
        assert killed_runs.has_failed({**good, **change})


@pytest.mark.parametrize("size", [0, 1, 100])
def test_an_onnx_file_that_is_cut_off_is_no_model(tmp_path: Path, size: int) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(n, 1, [3]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    content = onnx.helper.make_model(graph).SerializeToString()
    (tmp_path / "cut.onnx").write_bytes(content[: min(size, len(content) - 5)])
    assert killed_runs.broken_files(tmp_path)
