"""Repairing a file whose weights lie in files beside it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import lightning_linger as linger
from lightning_linger import cli
from lightning_linger.export import OnnxIntegerRunner, written
from lightning_linger.export.repair import repair, repair_file
from tests.export.graphs import model_of, node, ops

RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.integers(-128, 128, (6, 40), np.int8),
    "v": RNG.integers(-128, 128, (5, 6), np.int8),
    "b": RNG.integers(-999, 999, 5, np.int32),
}
X = RNG.standard_normal((2, 40)).astype(np.float32)
SCALES = {"scale_x": 32.0, "scale_w": 64.0, "scale_o": 8.0}
LATER = {**SCALES, "scale_x": 8.0, "scale_o": 1.0}


@pytest.fixture(params=["one file", "a file per tensor"])
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Two layers without Quant and Dequant."""
    nodes = [
        node("QLinear", ["x", "w"], ["h"], **SCALES),
        node("QLinear", ["h", "v", "b"], ["y"], **LATER),
    ]
    path = tmp_path / "from" / "model.onnx"
    path.parent.mkdir()
    onnx.save(
        model_of(nodes, "x", "y", WEIGHTS),
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=request.param == "one file",
        location="weights.bin" if request.param == "one file" else None,
        size_threshold=0,
    )
    return path


def run(path: Path) -> np.ndarray:
    return OnnxIntegerRunner(path).run({"x": X})["y"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("folder", ["from", "to"])
def test_weights_stay_out_of_the_graph(source: Path, folder: str, tmp_path: Path) -> None:
    target = tmp_path / folder / "repaired.onnx"
    target.parent.mkdir(exist_ok=True)
    before = contents(source.parent)
    repaired = repair_file(source, target)
    assert sum(change.startswith("inserted") for change in repaired.changes) == 2
    (data,) = written.data_files(target)
    graph = onnx.load(target, load_external_data=False)
    assert graph == repaired.model
    assert ops(graph) == ["Quant", "QLinear", "QLinear", "Dequant"]
    assert not any(tensor.raw_data for tensor in graph.graph.initializer)
    wanted = {*before, "repaired.onnx", data.name} if folder == "from" else {target.name, data.name}
    assert set(contents(target.parent)) == wanted
    for name, content in before.items():
        assert (source.parent / name).read_bytes() == content
    # It needs nothing of what it was made from.
    inline = repair(source)
    assert inline.changes == repaired.changes
    for name in before:
        (source.parent / name).unlink()
    assert np.array_equal(run(target), OnnxIntegerRunner(inline.model).run({"x": X})["y"])
    for tensor in onnx.load(target).graph.initializer:
        assert np.array_equal(onnx.numpy_helper.to_array(tensor), WEIGHTS[tensor.name])


def test_a_file_may_be_repaired_in_its_place(source: Path) -> None:
    assert cli.main(["repair", str(source), "-o", str(source), "--force"]) == 0
    first, (data,) = run(source), written.data_files(source)
    # A second time there is nothing to change, and one file of weights.
    assert cli.main(["repair", str(source), "-o", str(source), "--force"]) == 0
    assert written.data_files(source) == [data]
    assert np.array_equal(run(source), first)


def external(path: Path) -> list[Path]:
    return sorted(found for found in path.parent.iterdir() if found != path)


def lose(path: Path) -> None:
    external(path)[0].unlink()


def shorten(path: Path) -> None:
    lost = external(path)[0]
    lost.write_bytes(lost.read_bytes()[:3])


def outside(path: Path) -> None:
    (path.parent.parent / "secret").write_bytes(bytes(1000))
    model = onnx.load(path, load_external_data=False)
    entries = model.graph.initializer[0].external_data
    next(entry for entry in entries if entry.key == "location").value = "../secret"
    onnx.save(model, path)


def too_few(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].dims[0] += 1
    onnx.save(model, path)


@pytest.mark.parametrize("damage", [lose, shorten, outside, too_few])
def test_data_that_cannot_be_read_is_named(
    source: Path, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    damage(source)
    target = tmp_path / "repaired.onnx"
    with pytest.raises(linger.ConfigError, match=r"tensor '[wvb]' cannot be read"):
        repair_file(source, target)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("from", "secret")]
    with pytest.raises(linger.ConfigError):
        repair(source)


@pytest.mark.parametrize("failing", [0, 1], ids=["weights", "graph"])
def test_an_interrupted_repair_leaves_the_earlier_file(
    source: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    repair_file(source, source)
    expected, model = run(source), onnx.load(source)
    swapped = -onnx.numpy_helper.to_array(model.graph.initializer[0])
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(swapped, "w"))
    other = source.with_name("other.onnx")
    onnx.save(model, other, save_as_external_data=True, location="other.bin", size_threshold=0)
    calls = []

    def refuse(found: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > failing:
            raise OSError(28, "No space left on device")
        Path(found).rename(target)

    with monkeypatch.context() as patched:
        patched.setattr(written.os, "replace", refuse)
        with pytest.raises(linger.ConfigError, match=r"cannot write.*No space left"):
            repair_file(other, source)
    assert len(calls) == failing + 1
    assert np.array_equal(run(source), expected)
    assert not [path for path in source.parent.iterdir() if path.name.endswith(".tmp")]
    repair_file(other, source)
    assert not np.array_equal(run(source), expected)
    assert len(written.data_files(source)) == 1
