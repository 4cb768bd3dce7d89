"""``lightning-linger export`` and ``verify``: from a checkpoint to a file, and proof of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import pytorch_lightning as pl
import torch
from onnx import numpy_helper

import lightning_linger as linger
from lightning_linger.callbacks import FuseBNCallback, QuantizeCallback
from lightning_linger.cli import main
from tests.callbacks.boring import Classifier, loader, trainer

MODULE = "tests.callbacks.boring:Classifier"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint before and one after quantization."""
    pl.seed_everything(5, verbose=False)
    folder = tmp_path_factory.mktemp("run")
    run = trainer(folder, [FuseBNCallback(), QuantizeCallback(at_epoch=1)], epochs=1)
    model = Classifier()
    run.fit(model, loader())
    run.save_checkpoint(folder / "folded.ckpt")
    run.fit_loop.max_epochs = 2
    run.fit(model, loader())
    run.save_checkpoint(folder / "quantized.ckpt")
    x = next(iter(loader(batch_size=10)))[0].numpy()
    np.savez(folder / "data.npz", x=x, labels=np.zeros(10))
    np.save(folder / "data.npy", x)
    return {
        name: folder / name for name in ("folded.ckpt", "quantized.ckpt", "data.npz", "data.npy")
    }


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_a_checkpoint_becomes_a_file_that_is_verified(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt, target = checkpoints["quantized.ckpt"], tmp_path / "model.onnx"
    arguments = ["export", str(ckpt), "--module", MODULE, "--dialect", "linger"]
    assert main([*arguments, "-o", str(target), "--batch", "1"]) == 0
    assert f"{target}: linger, " in capsys.readouterr().out
    assert "QConv2d" in ops(target)
    proof = ["verify", str(target), "--ckpt", str(ckpt), "--module", MODULE, "--data"]
    for data in ("data.npz", "data.npy"):
        assert main([*proof, str(checkpoints[data])]) == 0
        assert "equal, 40 output elements in 10 batches" in capsys.readouterr().out


def test_what_the_board_made_is_compared(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt, target = checkpoints["quantized.ckpt"], tmp_path / "model.onnx"
    model = linger.load_checkpoint(Classifier, ckpt).eval()
    x = torch.from_numpy(np.load(checkpoints["data.npy"])[:1])
    linger.export_onnx(model, (x,), target)
    proof = ["verify", str(target), "--ckpt", str(ckpt), "--module", MODULE]
    proof += ["--data", str(checkpoints["data.npz"]), "--input-bin", str(tmp_path / "input.bin")]
    assert main(proof) == 0
    assert "input 'x', int8 [1, 1, 6, 6]" in capsys.readouterr().out
    codes = np.fromfile(tmp_path / "input.bin", np.int8)
    assert codes.size == 36
    with torch.no_grad(), linger.integer(model):
        real = model(x).numpy()
    dequant = next(n for n in onnx.load(target).graph.node if n.op_type == "Dequant")
    step = next(a.f for a in dequant.attribute)
    board = np.rint(real * step).astype(np.int8)
    board.tofile(tmp_path / "output.bin")
    assert main([*proof, "--output-bin", str(tmp_path / "output.bin")]) == 0
    assert "output.bin: equal" in capsys.readouterr().out
    board[0, 3] ^= 1
    board.tofile(tmp_path / "output.bin")
    assert main([*proof, "--output-bin", str(tmp_path / "output.bin")]) == 1
    out = capsys.readouterr().out
    assert "output.bin: DIFFERENT: `output` [0, 3]" in out
    assert f"found {board[0, 3]} ({board[0, 3] / step:g})" in out


def test_a_changed_file_is_found_out(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt, target = checkpoints["quantized.ckpt"], tmp_path / "model.onnx"
    assert main(["export", str(ckpt), "--module", MODULE, "-o", str(target)]) == 0
    proto = onnx.load(target)
    weight = next(t for t in proto.graph.initializer if t.name == "conv/conv2d/0/weight")
    array = -numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(proto, target)
    proof = ["verify", str(target), "--ckpt", str(ckpt), "--module", MODULE]
    assert main([*proof, "--data", str(checkpoints["data.npz"])]) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT" in out
    assert "first difference: `conv/conv2d/0` [" in out


def test_an_earlier_stage_exports_its_float_mathematics(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "folded.onnx"
    ckpt = checkpoints["folded.ckpt"]
    assert main(["export", str(ckpt), "--module", MODULE, "-o", str(target), "--batch", "3"]) == 0
    assert {"Conv", "Gemm"} <= set(ops(target))
    assert "BatchNormalization" not in ops(target)
    model = linger.load_checkpoint(Classifier, ckpt).eval()
    x = torch.randn(3, 1, 6, 6)
    import onnxruntime

    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    assert np.allclose(found, model(x).detach().numpy(), atol=1e-5)


def test_options_reach_the_export(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    arguments = ["export", "--ckpt", str(checkpoints["quantized.ckpt"]), "--module", MODULE]
    arguments += ["--input-names", "image", "--output-names", "logits", "--dynamic", "image:0=n"]
    arguments += ["--input", "2x1x6x6", "--external-data", "-o", str(target)]
    assert main(arguments) == 0
    graph = onnx.load(target).graph
    assert [graph.input[0].name, graph.output[0].name] == ["image", "logits"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"
    assert len(list(tmp_path.glob("m.onnx.*.data"))) == 1


Run = Callable[[dict[str, Path], Path], list[str]]


def export(*more: str) -> Run:
    return lambda c, f: [
        *("export", str(c["quantized.ckpt"]), "--module", MODULE, "-o", str(f / "m.onnx")),
        *more,
    ]


def verified(*more: Any) -> Run:
    def arguments(c: dict[str, Path], f: Path) -> list[str]:
        assert main(export()(c, f)) == 0
        start = ["verify", str(f / "m.onnx"), "--module", MODULE]
        return [*start, *(m(c, f) if callable(m) else m for m in more)]

    return arguments


def file(name: str) -> Callable[[dict[str, Path], Path], str]:
    return lambda c, f: str(c.get(name, f / name))


def broken(c: dict[str, Path], f: Path) -> str:
    (f / "broken.npz").write_bytes(b"PK nothing")
    return str(f / "broken.npz")


WRONG: dict[str, tuple[Run, str]] = {
    "no folder": (
        lambda c, f: ["export", str(c["quantized.ckpt"]), "--module", MODULE, "-o", "/none/m.onnx"],
        "the folder '/none' does not exist",
    ),
    "another dialect": (export("--dialect", "qdq"), "quantized for platform 'venusa'"),
    "no batch": (export("--batch", "0"), "--batch is a positive number"),
    "no axis": (export("--dynamic", "x=batch"), "--dynamic is INPUT:AXIS=LABEL"),
    "no checkpoint": (
        lambda c, f: ["export", "none.ckpt", "--module", MODULE, "-o", str(f / "m.onnx")],
        "cannot read 'none.ckpt'",
    ),
    "no data": (
        verified("--ckpt", file("quantized.ckpt"), "--data", file("none.npy")),
        "cannot read",
    ),
    "broken data": (
        verified("--ckpt", file("quantized.ckpt"), "--data", broken),
        "holds no plain arrays",
    ),
    "too many data": (
        verified("--ckpt", file("quantized.ckpt"), "--data", file("data.npz"), file("data.npy")),
        "the inputs are ['x']; --data holds ['x'] by name and 1 arrays without",
    ),
    "a float checkpoint": (
        verified("--ckpt", file("folded.ckpt"), "--data", file("data.npz")),
        "quantize stage is off",
    ),
    "too many files": (
        verified(
            "--ckpt", file("quantized.ckpt"), "--data", file("data.npz"), "--input-bin", "a", "b"
        ),
        "--input-bin takes a path for each of ['x']. Found: 2",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_a_line(
    arguments: Run,
    message: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(checkpoints, tmp_path)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
