"""The command line as a whole."""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lightning_linger as linger
from lightning_linger import cli

ROOT = Path(__file__).parents[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lightning-linger {linger.__version__}\n"


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "convert-checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["bake"], ["convert-checkpoint", "one"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: lightning-linger" in capsys.readouterr().err


def test_a_subcommand_is_one_entry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: argparse.Namespace) -> None:
        msg = "`count` is\n   too small."
        if arguments.count < 1:
            raise linger.ConfigError(msg)
        print("counted")

    def add_parser(subparsers: Any) -> None:
        parser = subparsers.add_parser("count")
        parser.add_argument("count", type=int)
        parser.set_defaults(run=run)

    monkeypatch.setattr(cli, "_SUBCOMMANDS", (SimpleNamespace(add_parser=add_parser),))
    assert cli.main(["count", "1"]) == 0
    assert capsys.readouterr().out == "counted\n"
    assert cli.main(["count", "0"]) == 2
    assert capsys.readouterr().err == "lightning-linger: error: `count` is too small.\n"


def test_it_is_installed_under_its_name() -> None:
    scripts = re.search(r"\[project\.scripts\]\n(.*)\n", (ROOT / "pyproject.toml").read_text())
    assert scripts is not None
    assert scripts[1] == f'lightning-linger = "{cli.main.__module__}:{cli.main.__name__}"'


def test_as_a_process(tmp_path: Path) -> None:
    """The exit code arrives, and an error is one line without a traceback."""
    command = [sys.executable, "-m", "lightning_linger.cli", "convert-checkpoint"]
    command += [str(tmp_path / "none.pt"), str(tmp_path / "new.pt"), "--from", "asr"]
    done = subprocess.run(
        [*command, "--to", "lstmp"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("lightning-linger: error: cannot read")
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    torch.save({f"weight{i}": torch.ones(2) for i in range(4000)}, tmp_path / "large.pt")
    command = [sys.executable, "-m", "lightning_linger.cli", "analyse", str(tmp_path / "large.pt")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert "Traceback" not in errors
    assert process.returncode == 141
