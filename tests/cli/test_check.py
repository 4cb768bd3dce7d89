"""``lightning-linger check``: its verdict, and what is refused."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import lightning_linger as linger
from lightning_linger.callbacks import QuantizeCallback
from lightning_linger.cli import main

MODELS = '''
import pytorch_lightning as pl
import torch
from torch import nn


class Net(pl.LightningModule):
    def __init__(self, kernel=3, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.conv = nn.Conv2d(1, width, kernel)
        self.norm = nn.BatchNorm2d(width)
        self.example_input_array = torch.randn(2, 1, 12, 12)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Late(Net):
    def __init__(self):
        super().__init__()
        del self.conv

    def configure_model(self):
        self.conv = nn.Conv2d(1, 4, 7)


class Dict(Net):
    def __init__(self):
        super().__init__()
        self.example_input_array = {"x": torch.randn(1, 1, 12, 12)}


class Bare(nn.Module):
    """Has no example, and takes two inputs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x, tokens):
        return self.fc(x) + self.embedding(tokens)


class Outer:
    Inner = Net
    number = 3


def failing():
    raise RuntimeError("out of\\nideas")


def no_model():
    return 3
'''

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in a folder with the models, and return its code and what it prints."""
    (tmp_path / "check_cli_models.py").write_text(MODELS)
    (tmp_path / "check_cli_broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "check_cli_models", raising=False)

    def call(name: str, *arguments: str) -> tuple[int, str, str]:
        module = name if ":" in name or name == "broken" else f"check_cli_models:{name}"
        code = main(["check", "--module", module, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def models(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("check_cli_models")


def refused(result: tuple[int, str, str]) -> str:
    """Return the error, one line."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("lightning-linger: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("lightning-linger: error: ").strip()


# --- verdicts -----------------------------------------------------------------------------------


def test_it_can_be_deployed(run: Run) -> None:
    assert run("Net") == (0, "venusa: can be deployed\n", "")


def test_it_cannot(run: Run) -> None:
    code, out, err = run("Net", "--kwargs", '{"kernel": 7}', "--platform", "arcs")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0] == "arcs: cannot be deployed (1 error)"
    assert lines[1].split() == ["site", "rule", "found", "allowed", "severity", "remedy"]
    assert re.match(
        r"conv/conv2d/0 +kernel +7x7 +a kernel is 1 to 5 high and wide +error", lines[2]
    )


def test_warnings_are_no_errors(run: Run) -> None:
    code, out, _ = run("Net", "--platform", "mars")
    assert code == 0
    assert "mars: can be deployed (1 warning)" in out
    assert "there is a packer for the engine" in out


def test_resources(run: Run) -> None:
    code, out, _ = run("Net", "--resources", "--platform", "arcs")
    assert code == 0
    assert re.search(r"^conv/conv2d/0 +conv +3,600 +40 ", out, re.MULTILINE)
    assert re.search(r"^share memory .* of 393,216 bytes", out, re.MULTILINE)
    assert run("Net", "--resources", "--kwargs", '{"kernel": 7}')[0] == 1


@pytest.mark.parametrize("name", ["Dict", "Outer.Inner"])
def test_ways_to_name_a_model(run: Run, name: str) -> None:
    assert run(name)[0] == 0


def test_layers_of_configure_model(run: Run) -> None:
    code, out, _ = run("Late")
    assert code == 1
    assert "7x7" in out


def test_inputs(run: Run) -> None:
    assert run("Bare", "--input", "2x4", "--input", "2:int64")[0] == 0
    assert run("Bare", "--input", "2x4", "--input", "tokens=2:int64")[0] == 0
    assert run("Bare", "--input", "tokens=2:int64", "--input", "x=2x4")[0] == 0
    code, out, _ = run("Net", "--input", "1x1x300x300")
    assert code == 1
    assert "share_memory" in out


# --- checkpoints --------------------------------------------------------------------------------


@pytest.fixture
def trained(models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A checkpoint of a quantized network with a kernel of 7."""
    model = models.Net(kernel=7)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[QuantizeCallback(platform="arcs")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(4, 1, 12, 12)))
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    capsys.readouterr()
    return tmp_path / "net.ckpt"


def test_a_checkpoint_knows_its_hyperparameters(run: Run, trained: Path) -> None:
    code, out, _ = run("Net", "--ckpt", str(trained))
    assert code == 1
    assert "7x7" in out


def test_a_checkpoint_is_checked_as_it_was_quantized(run: Run, trained: Path) -> None:
    assert "arcs: cannot be deployed" in run("Net", "--ckpt", str(trained))[1]
    _, out, _ = run("Net", "--ckpt", str(trained), "--platform", "venus")
    assert "other_platform" in out
    _, out, _ = run("Net", "--ckpt", str(trained), "--input", "1x1x300x300")
    assert "share_memory" in out


def test_a_state_dict(run: Run, trained: Path, tmp_path: Path) -> None:
    state = torch.load(trained, weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "quantized.pt")
    plain = {key: value for key, value in state.items() if not key.startswith("_linger.")}
    assert len(plain) < len(state)
    torch.save(plain, tmp_path / "plain.pt")
    for name, platform in (("quantized", "arcs"), ("plain", "venusa")):
        code, out, _ = run("Net", "--kwargs", '{"kernel": 7}', "--ckpt", f"{name}.pt")
        assert code == 1
        assert out.startswith(f"{platform}: cannot be deployed")


def test_a_checkpoint_that_does_not_fit(run: Run, trained: Path) -> None:
    error = refused(run("Net", "--kwargs", '{"kernel": 3}', "--ckpt", str(trained)))
    assert re.search(r"net\.ckpt' does not fit Net: .*size mismatch for conv\.weight", error)
    assert "bare" in refused(run("Bare", "--ckpt", str(trained))).lower()


def test_damaged_checkpoints(run: Run, tmp_path: Path) -> None:
    assert "cannot read 'none.ckpt'" in refused(run("Net", "--ckpt", "none.ckpt"))
    (tmp_path / "bad.ckpt").write_bytes(b"\x80\x02nothing")
    assert "no checkpoint, or it is damaged" in refused(run("Net", "--ckpt", "bad.ckpt"))
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert "holds a list" in refused(run("Net", "--ckpt", "list.ckpt"))


class Unsafe:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)


def test_nothing_is_unpickled(run: Run, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": Unsafe()}, tmp_path / "evil.ckpt")
    error = refused(run("Net", "--ckpt", "evil.ckpt"))
    assert "may not be trusted" in error
    assert not (tmp_path / "executed").exists()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "has no class 'nothing'"),
        ("Outer.number", "has no class 'Outer.number'"),
        ("Outer.none.deeper", "has no class"),
        ("no_model", "makes a int. Name a class of nn.Module"),
        ("failing", "cannot make check_cli_models:failing(): out of ideas."),
        ("check_cli_models:", "--module is MODULE:CLASS"),
        (":Net", "--module is MODULE:CLASS"),
        ("broken", "--module is MODULE:CLASS"),
        ("check_cli_broken:Net", "cannot import 'check_cli_broken': No module named"),
        ("check_cli_none:Net", "cannot import 'check_cli_none'"),
    ],
)
def test_bad_modules(run: Run, name: str, message: str) -> None:
    assert message in refused(run(name))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ("{kernel: 3}", "--kwargs is a JSON object"),
        ("[3]", "--kwargs is a JSON object"),
        ('{"kernels": 3}', "cannot make check_cli_models:Net(kernels=3): "),
        ('{"kernel": "wide"}', "cannot make check_cli_models:Net(kernel='wide'): "),
    ],
)
def test_bad_kwargs(run: Run, kwargs: str, message: str) -> None:
    error = refused(run("Net", "--kwargs", kwargs))
    assert message in error


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["1x"], "--input is a shape"),
        (["1x0x3"], "--input is a shape"),
        (["two"], "--input is a shape"),
        (["1x1x12x12:float99"], "the dtype of an input is one of float32"),
        (["x=1x1x12x12", "1x4"], "stands behind one with a name"),
        (["1x2x12x12"], "Net does not run on the inputs 1x2x12x12: "),
        (["y=1x1x12x12"], "Net does not run on the inputs y=1x1x12x12: "),
    ],
)
def test_bad_inputs(run: Run, inputs: list[str], message: str) -> None:
    arguments = [argument for text in inputs for argument in ("--input", text)]
    assert message in refused(run("Net", *arguments))


def test_no_inputs(run: Run) -> None:
    assert "Bare has no example_input_array. Pass --input" in refused(run("Bare"))


def test_bad_platform(run: Run) -> None:
    assert "venusx" in refused(run("Net", "--platform", "venusx"))


def test_resources_without_an_engine(run: Run) -> None:
    error = refused(run("Net", "--platform", "onnxruntime", "--resources"))
    assert "has no memories to plan" in error
    assert run("Net", "--platform", "onnxruntime")[0] == 0


def test_a_model_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check"])
    assert stop.value.code == 2
    assert "--module" in capsys.readouterr().err


def test_the_functions_say_the_same(run: Run, models: Any) -> None:
    _, out, _ = run("Net", "--kwargs", '{"kernel": 7}', "--resources", "--platform", "venus")
    model = models.Net(kernel=7)
    inputs = (model.example_input_array,)
    findings = linger.check(model, "venus", inputs)
    assert out == f"{findings}\n\n{linger.resources(model, 'venus', inputs)}\n"
