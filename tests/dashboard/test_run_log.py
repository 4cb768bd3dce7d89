"""The file of a run: what is written is read back, and what is broken is refused."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from lightning_linger.core.errors import ConfigError
from lightning_linger.dashboard.charts import stage_timeline
from lightning_linger.dashboard.records import EpochRecord, RunRecord, StageSwitch, WidthSwitch
from lightning_linger.dashboard.run_log import FILE_NAME, RunLog, read_run
from lightning_linger.dashboard.timeline import (
    Span,
    labelled_spans,
    stage_spans,
    widths_label,
)
from tests.dashboard.runs import STEM, layers, run


def write(record: RunRecord, folder: Path, resumed: bool = False) -> Path:
    log = RunLog(folder / FILE_NAME, resumed)
    log.run(record)
    for switch in record.switches:
        log.switch(switch)
    for epoch in record.epochs:
        log.epoch(epoch)
    log.histograms(record.histograms)
    return log.path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    record = run()
    path = write(record, tmp_path)
    assert read_run(tmp_path) == record
    assert read_run(path) == record


def test_every_line_is_json_without_words_of_its_own(tmp_path: Path) -> None:
    record = run()
    error = dataclasses.replace(record.epochs[-1].layers[0], sqnr=math.nan)
    record.epochs[-1] = dataclasses.replace(record.epochs[-1], layers=(error,))
    path = write(record, tmp_path)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
    assert math.isnan(read_run(tmp_path).epochs[-1].layers[0].sqnr)


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    record = run()
    path = write(record, tmp_path)
    path.write_text(path.read_text() + '{"kind": "epo')
    assert read_run(tmp_path) == record


def test_a_new_run_replaces_the_file_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    record = run()
    write(record, tmp_path)
    again = dataclasses.replace(record, epochs=record.epochs[2:], switches=record.switches[2:])
    write(again, tmp_path, resumed=True)
    assert read_run(tmp_path) == record
    write(again, tmp_path)
    assert read_run(tmp_path) == again


def test_what_a_resumed_run_repeats_counts_once(tmp_path: Path) -> None:
    record = run()
    log = RunLog(tmp_path / FILE_NAME)
    log.run(record)
    for step in (10, 20, 30, 20):
        log.epoch(EpochRecord(step // 10, step))
        log.switch(StageSwitch(step // 10, step, ()))
    read = read_run(tmp_path)
    assert [epoch.step for epoch in read.epochs] == [10, 20]
    assert [switch.step for switch in read.switches] == [10, 20]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "does not begin"),
        ('{"kind": "epoch"}\n', "does not begin"),
        ("no json\n", "damaged"),
        ('{"kind": "run", "format": 999}\n', "format 999"),
        ('{"kind": "run"}\n', "line 1"),
        ('{"kind": "run", "format": 1, "name": "", "platform": "", "exact": true, '
         '"settings": {}, "layers": []}\n{"kind": "surprise"}\n', "line 2"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path)


def test_a_folder_without_a_run_names_the_runs_below_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="QuantErrorCallback"):
        read_run(tmp_path)
    write(run(), tmp_path / "version_3")
    with pytest.raises(ConfigError, match="version_3"):
        read_run(tmp_path)


def test_the_spans_of_a_stage() -> None:
    record = run()
    assert stage_spans(record, "fuse_bn") == [(10, 40)]
    assert stage_spans(record, "quantize") == [(20, 40)]
    record.switches.append(StageSwitch(3, 30, ("fuse_bn",)))
    assert stage_spans(record, "quantize") == [(20, 30)]
    assert stage_spans(RunRecord(), "quantize") == []


def narrower(step: int) -> WidthSwitch:
    bits = {layer.site: re.sub("^8", "4", layer.bits) for layer in layers()}
    return WidthSwitch(step // 10, step, bits, {layer.site: 8 for layer in layers()})


def test_quantization_is_divided_where_widths_change(tmp_path: Path) -> None:
    record = run()
    record.switch_widths(WidthSwitch(0, 0, {x.site: x.bits for x in record.layers}, {}))
    record.switch_widths(narrower(30))
    assert labelled_spans(record, "quantize") == [Span(20, 30, "8/8/8"), Span(30, 40, "4/8/8")]
    assert labelled_spans(record, "fuse_bn") == [Span(10, 40)]
    assert labelled_spans(run(), "quantize") == [Span(20, 40)]
    chart = stage_timeline(record)["data"][-3]
    assert chart["text"] == ["8/8/8", "4/8/8"]
    assert chart["customdata"][1] == "steps 30 to 40, 4/8/8 bits (weight/input/output)"


def test_widths_that_a_resumed_run_repeats_count_once(tmp_path: Path) -> None:
    path = tmp_path / "linger.jsonl"
    log = RunLog(path)
    log.run(run())
    for step in (10, 30, 30):
        log.widths(narrower(step))
    log.widths(WidthSwitch(2, 20, {x.site: x.bits for x in layers()}, {}))
    assert [switch.step for switch in read_run(path).widths] == [10, 20]


def test_widths_of_layers_in_one() -> None:
    assert widths_label(["8/8/8", "8/8/8"]) == "8/8/8"
    assert widths_label(["2/8/8", "-/8/float", "8/8/7"]) == "2-8/8/7-8"
    assert widths_label(["-/8/float"]) == "-/8/float"


def test_what_a_run_knows_of_its_layers() -> None:
    record = run()
    assert record.latest is record.epochs[-1]
    assert [layer.site for layer in record.measured_layers] == [x.site for x in record.layers]
    assert record.layer(STEM).label == "stem conv2d"
    assert list(record.metrics_by_stage()) == ["float", "constrained", "QAT"]
    assert record.metrics_by_stage()["QAT"] == record.epochs[-1].metrics
    assert record.histograms[STEM].clipped == 0.2
