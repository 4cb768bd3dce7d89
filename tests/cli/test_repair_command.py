"""``lightning-linger repair``."""

from pathlib import Path

import onnx
import pytest

from lightning_linger import cli
from tests.export.graphs import model_of, node, ops

ADD = {"scale_x": 32.0, "scale_y": 32.0, "scale_o": 16.0}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(model_of([node("iqAdd", ["x", "x"], ["y"], **ADD)], "x", "y"), path)
    return path


def test_it_writes_next_to_the_file(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = source.read_bytes()
    assert cli.main(["repair", str(source)]) == 0
    target = source.with_name("model_repaired.onnx")
    assert ops(onnx.load(target)) == ["Quant", "iqAdd", "Dequant"]
    assert source.read_bytes() == before
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("`")[0] for line in lines[:2]] == ["inserted Quant ", "inserted Dequant of "]
    assert lines[2:] == [f"{target}: 2 changes"]
    assert cli.main(["repair", str(target), "-o", str(source.with_name("again.onnx"))]) == 0
    assert capsys.readouterr().out.endswith("again.onnx: no changes\n")


def test_a_file_is_overwritten_on_request_only(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["repair", str(source), "-o", str(source)]
    before = source.read_bytes()
    assert cli.main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert cli.main([*arguments, "--force"]) == 0
    assert source.read_bytes() != before


@pytest.mark.parametrize("content", [None, b"", b"no onnx", b"\x08\x07\x12"])
def test_damaged_files_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    assert cli.main(["repair", str(path)]) == 2
    assert capsys.readouterr().err.startswith("lightning-linger: error: ")
    assert sorted(tmp_path.iterdir()) == before
