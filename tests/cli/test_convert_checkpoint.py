"""Checkpoint files: what is converted, what is kept, and what is refused."""

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import lightning_linger as linger
from lightning_linger.cli import main
from lightning_linger.nn import LSTMP, UBLSTMP, asr_to_lstmp, lstmp_to_asr, lstmp_to_torch


class Model(pl.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = LSTMP(4, width, 6)
        self.second = LSTMP(width, 2, 5)
        self.head = nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.head(self.second(self.first(batch)[0])[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def command(source: Path, target: Path, old: str, new: str, *more: str) -> int:
    return main(["convert-checkpoint", str(source), str(target), "--from", old, "--to", new, *more])


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(found) == list(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.fixture
def asr(tmp_path: Path) -> Path:
    path = tmp_path / "asr.pt"
    torch.save(lstmp_to_asr(Model().state_dict()), path)
    return path


def test_a_state_dict(asr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new.pt"
    assert command(asr, target, "asr", "lstmp") == 0
    model = Model()
    model.load_state_dict(read(target))
    assert_same(lstmp_to_asr(model.state_dict()), read(asr))
    out = capsys.readouterr().out
    assert out == f"{target}: asr -> lstmp for first, second\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asr.pt", "new.pt"]


def test_one_layer_of_several(asr: Path, tmp_path: Path) -> None:
    target = tmp_path / "new.pt"
    assert command(asr, target, "asr", "lstmp", "--prefix", "second") == 0
    assert_same(read(target), asr_to_lstmp(read(asr), "second"))
    assert "first.weight_x" in read(target)


def test_a_lightning_checkpoint_keeps_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    model = Model()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(2, 5, 4)))
    trainer.save_checkpoint(source)
    assert command(source, target, "lstmp", "torch") == 0
    assert "optimizer states" in capsys.readouterr().err
    old, new = read(source), read(target)
    assert list(new) == list(old)
    assert new["hyper_parameters"] == {"width": 3}
    assert new["optimizer_states"][0]["state"].keys() == old["optimizer_states"][0]["state"].keys()
    assert_same(new["state_dict"], lstmp_to_torch(old["state_dict"]))
    assert command(target, source, "torch", "lstmp", "--force") == 0
    assert_same(Model.load_from_checkpoint(source).state_dict(), model.state_dict())


def test_an_entry_by_name(asr: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "named.pt", tmp_path / "new.pt"
    torch.save({"epoch": 3, "net": read(asr)}, source)
    assert command(source, target, "asr", "lstmp", "--key", "net") == 0
    assert read(target)["epoch"] == 3
    assert_same(read(target)["net"], asr_to_lstmp(read(asr)))


def test_the_layer_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "old.pt", tmp_path / "new.pt"
    layer = UBLSTMP(4, 3, 6)
    torch.save(layer.state_dict(), source)
    assert command(source, target, "ublstmp", "torch-bidirectional") == 0
    assert "for the layer itself" in capsys.readouterr().out
    nn.LSTM(4, 6, proj_size=3, bidirectional=True).load_state_dict(read(target))


def test_nothing_is_overwritten(
    asr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new.pt"
    target.write_bytes(b"precious")
    before = asr.read_bytes()
    assert command(asr, target, "asr", "lstmp") == 2
    assert f"{str(target)!r} is there already" in capsys.readouterr().err
    assert target.read_bytes() == b"precious"
    assert command(asr, tmp_path / "." / asr.name, "asr", "lstmp") == 2
    assert "is SOURCE itself" in capsys.readouterr().err
    assert asr.read_bytes() == before
    assert command(asr, target, "asr", "lstmp", "--force") == 0
    assert "first.input_linearity.weight" in read(target)
    assert command(asr, asr, "asr", "lstmp", "--force") == 0
    assert_same(read(asr), read(target))


def test_a_failed_write_leaves_what_was_there(
    asr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new.pt"
    target.write_bytes(b"precious")

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    assert command(asr, target, "asr", "lstmp", "--force") == 2
    assert "No space left" in capsys.readouterr().err
    assert target.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asr.pt", "new.pt"]


def _other(path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), path)


def _quantized(path: Path) -> None:
    model = linger.prepare(nn.Linear(2, 2), (torch.randn(1, 2),))
    torch.save({"state_dict": linger.quantize(model).state_dict()}, path)


def _cut_off(path: Path) -> None:
    torch.save(OrderedDict(weight=torch.zeros(1000)), path)
    path.write_bytes(path.read_bytes()[:2000])


FILES: dict[str, tuple[Any, list[str], str]] = {
    "missing": (lambda path: None, [], "cannot read '.*': No such file"),
    "folder": (lambda path: path.mkdir(), [], "cannot read '.*'"),
    "empty": (lambda path: path.touch(), [], "no checkpoint, or it is damaged"),
    "text": (lambda path: path.write_text("weights"), [], "no checkpoint, or it is damaged"),
    "cut off": (_cut_off, [], "no checkpoint, or it is damaged"),
    "module": (
        lambda path: torch.save(nn.Linear(2, 2), path),
        [],
        r"holds torch\.nn\.modules\.linear\.Linear.*state dict alone",
    ),
    "tensor": (lambda path: torch.save(torch.ones(1), path), [], "holds a Tensor"),
    "keys": (lambda path: torch.save({1: torch.ones(1)}, path), [], "keys are not all strings"),
    "quantized": (_quantized, [], "is a quantized model.*Convert the float checkpoint"),
    "other layers": (_other, [], "no layer in layout 'asr': no 'weight_p'.*Near: 'weight'"),
    "other prefix": (_other, ["--prefix", "fc"], r"at 'fc': no 'fc\.weight_p'"),
    "no entry": (
        lambda path: torch.save({"net": {}, "epoch": 1}, path),
        ["--key", "model"],
        "no state dict 'model'.*'net'",
    ),
}


@pytest.mark.parametrize(("write", "more", "message"), FILES.values(), ids=FILES.keys())
def test_files_that_do_not_fit(
    write: Any, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "old.pt", tmp_path / "new.pt"
    write(source)
    assert command(source, target, "asr", "lstmp", *more) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert re.search(message, found.err), found.err
    assert not target.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kaldi", "lstmp", "unknown layout 'kaldi'. The layouts are asr, lstmp"),
        ("asr", "keras", "unknown layout 'keras'. The layouts are asr, lstmp"),
        ("asr", "ublstmp", "'asr' converts to asr, lstmp, torch"),
    ],
)
def test_layouts_that_do_not_fit(
    old: str, new: str, message: str, asr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(asr, tmp_path / "new.pt", old, new) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new.pt").exists()


@pytest.mark.parametrize("layouts", [("kaldi", "asr"), ("asr", "kaldi")])
def test_a_layout_is_checked_before_a_file_is_read(
    layouts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path / "none.pt", tmp_path / "new.pt", *layouts) == 2
    assert "unknown layout 'kaldi'" in capsys.readouterr().err


def test_the_folder_of_the_target_must_exist(
    asr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(asr, tmp_path / "none" / "new.pt", "asr", "lstmp") == 2
    assert "does not exist. Create it." in capsys.readouterr().err
