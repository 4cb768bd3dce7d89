"""A run as a file of JSON lines, next to what its loggers write.

One object per line, the first of ``kind`` ``run``. Lines are only ever appended and flushed one by
one, so a run that dies leaves everything up to its last epoch. No logger is needed to read it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_linger.core.errors import ConfigError
from lightning_linger.dashboard.records import (
    EpochRecord,
    Layer,
    LayerError,
    OutputErrors,
    RunRecord,
    StageSwitch,
    ValueHistogram,
    WidthSwitch,
)

FILE_NAME = "linger.jsonl"
FORMAT = 1


class RunLog:
    """Writes the records of a run.

    Args:
        path: Of the file.
        resumed: Whether the file goes on, rather than starts.
    """

    def __init__(self, path: Path, resumed: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resumed:
            path.unlink(missing_ok=True)

    def run(self, record: RunRecord) -> None:
        """Write what is known when the run starts."""
        self._write(
            "run",
            {
                "format": FORMAT,
                "name": record.name,
                "platform": record.platform,
                "exact": record.exact,
                "settings": record.settings,
                "layers": [dataclasses.asdict(layer) for layer in record.layers],
            },
        )

    def switch(self, switch: StageSwitch) -> None:
        """Write that stages were switched."""
        self._write("switch", dataclasses.asdict(switch))

    def widths(self, switch: WidthSwitch) -> None:
        """Write that widths were switched."""
        self._write("widths", dataclasses.asdict(switch))

    def epoch(self, epoch: EpochRecord) -> None:
        """Write what a validation found."""
        self._write("epoch", dataclasses.asdict(epoch))

    def histograms(self, histograms: Mapping[str, ValueHistogram]) -> None:
        """Write how the values of layers lie."""
        rows = [dataclasses.asdict(histogram) for histogram in histograms.values()]
        self._write("histograms", {"layers": rows})

    def integer_metrics(self, metrics: Mapping[str, float]) -> None:
        """Write the user's metrics of the integer model."""
        self._write("integer", {"metrics": dict(metrics)})

    def _write(self, kind: str, content: dict[str, Any]) -> None:
        line = json.dumps(_plain({"kind": kind, **content}), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_run(folder: Path) -> RunRecord:
    """Read the run of a folder.

    Args:
        folder: The folder of the logger, which holds ``linger.jsonl``, or that file.

    Raises:
        ConfigError: If there is no such file, or it is not one of this library's.
    """
    path = folder / FILE_NAME if folder.is_dir() else folder
    if not path.is_file():
        below = sorted(str(found.parent) for found in folder.rglob(FILE_NAME))
        hint = (
            f"Runs below it: {', '.join(below[:5])}."
            if below
            else "Train with QuantErrorCallback or IntegerValidatorCallback and a logger, then "
            "pass the logger's folder (`trainer.log_dir`)."
        )
        msg = f"{str(folder)!r} holds no {FILE_NAME}. {hint}"
        raise ConfigError(msg)
    record = RunRecord(name=path.parent.name)
    for number, content in enumerate(_lines(path), start=1):
        _read(record, content, f"line {number} of {str(path)!r}")
    return record


def _read(record: RunRecord, content: dict[str, Any], place: str) -> None:
    try:
        _READERS[content.pop("kind")](record, content)
    except (KeyError, TypeError, AttributeError) as error:
        msg = (
            f"{place} is not one that this version writes ({error!r}). Read it with the version "
            "that wrote it."
        )
        raise ConfigError(msg) from error


def _lines(path: Path) -> list[dict[str, Any]]:
    # A run that died may have left half a line at the end.
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    lines = [line for line in whole.splitlines() if line]
    try:
        found = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        msg = f"{str(path)!r} is damaged: {error}."
        raise ConfigError(msg) from error
    if not found or not isinstance(found[0], dict) or found[0].get("kind") != "run":
        msg = f"{str(path)!r} does not begin with the record of a run."
        raise ConfigError(msg)
    return found


def _read_start(record: RunRecord, content: dict[str, Any]) -> None:
    if content["format"] != FORMAT:
        msg = f"the run log has format {content['format']}, this version reads {FORMAT}."
        raise ConfigError(msg)
    record.name = content["name"] or record.name
    record.platform, record.exact = content["platform"], content["exact"]
    record.settings = content["settings"]
    record.layers = [
        Layer(**{**layer, "inputs": tuple(layer["inputs"])}) for layer in content["layers"]
    ]


def _read_switch(record: RunRecord, content: dict[str, Any]) -> None:
    content["stages"] = tuple(content["stages"])
    switch = StageSwitch(**content)
    # A resumed run repeats what came after its checkpoint.
    record.switches = [s for s in record.switches if s.step < switch.step] + [switch]


def _read_widths(record: RunRecord, content: dict[str, Any]) -> None:
    record.switch_widths(WidthSwitch(**content))


def _read_epoch(record: RunRecord, content: dict[str, Any]) -> None:
    content["stages"] = tuple(content["stages"])
    content["layers"] = tuple(LayerError(**_numbers(row)) for row in content["layers"])
    content["outputs"] = OutputErrors(**content["outputs"])
    epoch = EpochRecord(**content)
    record.epochs = [e for e in record.epochs if e.step < epoch.step] + [epoch]


def _read_histograms(record: RunRecord, content: dict[str, Any]) -> None:
    for row in content["layers"]:
        lists = {name: tuple(row[name]) for name in ("edges", "reference", "quantized")}
        record.histograms[row["site"]] = ValueHistogram(**{**row, **lists})


def _read_integer_metrics(record: RunRecord, content: dict[str, Any]) -> None:
    record.integer_metrics = content["metrics"]


_READERS: dict[str, Callable[[RunRecord, dict[str, Any]], None]] = {
    "run": _read_start,
    "switch": _read_switch,
    "widths": _read_widths,
    "epoch": _read_epoch,
    "histograms": _read_histograms,
    "integer": _read_integer_metrics,
}


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Give back the value that JSON has no word for."""
    return {
        name: math.nan if row[name] is None and name in ("sqnr", "isolated_sqnr") else row[name]
        for name in row
    }


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it; what is not finite becomes null."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
