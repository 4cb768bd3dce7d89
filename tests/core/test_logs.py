"""The logger and the progress bar: levels, ranks, and silence.

``row65`` in a name is the row of the checklist of features that the test covers.
"""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_linger as linger
from lightning_linger.core.logs import NAME, VARIABLE, configure, logger
from lightning_linger.core.progress import with_progress

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch, lightning_linger as linger
from torch import nn
model = nn.Sequential(nn.Linear(2, 2))
linger.prepare(model, (torch.ones(1, 2),))
linger.quantize(model)
linger.calibrate(model, [torch.ones(1, 2)])
"""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    before = logger.level
    yield
    configure({})
    logger.setLevel(before)


@pytest.mark.parametrize(
    ("asked", "level"),
    [
        *(("DEBUG", 10), ("INFO", 20), ("WARNING", 30), ("ERROR", 40), ("FATAL", 50)),
        *(("-1", 10), ("0", 20), ("1", 30), ("2", 40), ("3", 50), ("info", 20), (" 2 ", 40)),
    ],
)
def test_row65_names_and_numbers(asked: str, level: int, caplog: pytest.LogCaptureFixture) -> None:
    configure({VARIABLE: asked})
    assert logging.getLogger(NAME).level == level
    assert not caplog.records


@pytest.mark.parametrize("asked", ["LOUD", "4", "-2", "1.5"])
def test_row65_an_unknown_value_is_warning_and_said_once(
    asked: str, caplog: pytest.LogCaptureFixture
) -> None:
    configure({VARIABLE: asked})
    assert logger.level == logging.WARNING
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert asked in record.getMessage()


def test_row65_the_default_is_warning_and_a_level_set_before_stays() -> None:
    logger.setLevel(logging.NOTSET)
    configure({})
    assert logger.level == logging.WARNING
    logger.setLevel(logging.INFO)
    configure({VARIABLE: ""})
    assert logger.level == logging.INFO


def test_stage_switches_at_info_and_ops_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 1, 5, 5)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    configure({VARIABLE: "INFO"})
    linger.prepare(model, (x,))
    linger.fuse_bn(model)
    linger.normalize(model)
    linger.quantize(model)
    linger.quantize(model)  # on already
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "fuse_bn of Sequential is on at 1 of 3 sites",
        "normalize of Sequential is on at 2 of 3 sites",
        "quantize of Sequential is on at 3 of 3 sites",
    ]
    caplog.clear()
    configure({VARIABLE: "DEBUG"})
    linger.calibrate(model, [x, x])
    debug = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    assert [message.partition(":")[0] for message in debug] == [
        row.site for row in linger.summary(model)
    ]
    assert "scale 2^" in debug[0]
    info = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert info == ["calibrated Sequential on 2 batches"]


@pytest.mark.parametrize(
    ("variables", "logs"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, False),
        ({"RANK": "1", "WORLD_SIZE": "1"}, True),
    ],
)
def test_only_rank_zero_logs(
    variables: dict[str, str],
    logs: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    logger.warning("said")
    assert bool(caplog.records) == logs


def _run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in (VARIABLE, "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=True,
    )


def test_a_program_that_asks_for_nothing_prints_nothing() -> None:
    done = _run(PROGRAM + "import logging; assert not logging.getLogger().handlers")
    assert (done.stdout, done.stderr) == ("", "")


def test_a_program_that_asks_gets_it_once() -> None:
    configured = "import logging; logging.basicConfig(format='mine: %(message)s')\n" + PROGRAM
    done = _run(configured, **{VARIABLE: "0"})
    lines = done.stderr.splitlines()
    assert [line for line in lines if "quantize" in line] == [
        "mine: quantize of Sequential is on at 1 of 1 sites"
    ]
    alone = _run(PROGRAM, **{VARIABLE: "0"}).stderr.splitlines()
    assert alone[0] == "[INFO] lightning_linger: quantize of Sequential is on at 1 of 1 sites"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TERM", "NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(with_progress(range(3), "Counting")) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", _Terminal())
    assert list(with_progress(iter(range(3)), "Counting")) == [0, 1, 2]
    assert "Counting" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", _Terminal())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert list(with_progress(range(3), "Counting")) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""


def test_calibration_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERM", raising=False)
    model = nn.Sequential(nn.Linear(2, 2))
    linger.prepare(model, (torch.ones(1, 2),))
    monkeypatch.setattr(sys, "stderr", _Terminal())
    linger.calibrate(model, [torch.ones(1, 2)])
    assert "Calibrating" in sys.stderr.getvalue()
