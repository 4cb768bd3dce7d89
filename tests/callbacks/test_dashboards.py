"""What the validating callbacks log, and show."""

import importlib.util
import io
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata

import lightning_linger as linger
from lightning_linger.callbacks import (
    FuseBNCallback,
    IntegerValidatorCallback,
    NormalizeCallback,
    ProgressiveBitsCallback,
    QuantErrorCallback,
    QuantizeCallback,
    SensitivityCallback,
)
from lightning_linger.callbacks import dashboard as dashboards
from lightning_linger.callbacks.dashboard import Budget, primary_metric
from lightning_linger.core.errors import ConfigError, QuantizationWarning
from lightning_linger.dashboard.run_log import FILE_NAME, read_run
from lightning_linger.dashboard.timeline import labelled_spans
from lightning_linger.simulate.integer import number_system
from tests.browser import chromium, tensorboard, wait_for_elements, wait_for_text
from tests.callbacks.boring import Classifier, fitted, loader, trainer

SITES = ("stem/conv2d/0", "conv/conv2d/0", "/add/0", "/mean/0", "fc/linear/0")
EPOCH_ENDS = [3, 6, 9]
QUANTIZED = [6, 9]
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


@dataclass
class Shown:
    """A finished run and what TensorBoard reads of it."""

    folder: Path
    model: Classifier
    errors: QuantErrorCallback
    integers: IntegerValidatorCallback
    events: EventAccumulator

    def scalars(self, tag: str) -> dict[int, float]:
        return {event.step: event.value for event in self.events.Scalars(tag)}


def read_events(folder: Path) -> EventAccumulator:
    everything = {"images": 0, "tensors": 0, "scalars": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("shown")
    logger = TensorBoardLogger(folder, name="", version="run")
    errors, integers = QuantErrorCallback(worst=3), IntegerValidatorCallback()
    stages = [FuseBNCallback(), NormalizeCallback(), QuantizeCallback(at_epoch=1)]
    pl.seed_everything(3, verbose=False)
    model = Classifier(dropout=0.0)
    run = trainer(folder, [*stages, errors, integers], epochs=3, logger=logger)
    run.fit(model, loader(), loader(1, shuffle=False))
    return Shown(
        Path(logger.log_dir), model.eval(), errors, integers, read_events(Path(logger.log_dir))
    )


def test_every_site_has_its_scalars_in_every_quantized_epoch(shown: Shown) -> None:
    assert [row.site for row in shown.errors.latest] == list(SITES)
    names = (
        *("sqnr", "sqnr_isolated", "cosine", "saturation", "exponent"),
        *("mismatch", "mismatch_isolated", "integer_sqnr", "integer_sqnr_isolated"),
    )
    for site in SITES:
        for name in names:
            assert list(shown.scalars(f"{name}/{site}")) == QUANTIZED, (name, site)
    assert all(value == 0.0 for value in shown.scalars("mismatch/stem/conv2d/0").values())
    assert all(value > 10.0 for value in shown.scalars("sqnr/stem/conv2d/0").values())


def test_the_scalars_equal_recomputed_ones(shown: Shown) -> None:
    batch = next(iter(loader(1, shuffle=False)))
    # What was logged last saw the same weights on the same batch.
    for row in linger.quant_error(shown.model, batch):
        for tag, value in (
            ("sqnr", row.sqnr),
            ("sqnr_isolated", row.isolated_sqnr),
            ("cosine", row.cosine),
            ("saturation", row.saturation),
            ("exponent", row.exponent),
        ):
            assert shown.scalars(f"{tag}/{row.site}")[9] == np.float32(value), (tag, row.site)
    for row in linger.divergence(shown.model, batch):
        assert shown.scalars(f"integer_sqnr/{row.site}")[9] == np.float32(row.sqnr)
        assert shown.scalars(f"integer_sqnr_isolated/{row.site}")[9] == np.float32(
            row.isolated_sqnr
        )


@torch.no_grad()
def test_the_isolated_error_is_that_of_the_layer_alone(shown: Shown) -> None:
    # The first layer gets the images themselves, on the grid of its input.
    images = next(iter(loader(1, shuffle=False)))[0]
    rows = {row.site: row for row in linger.quant_error(shown.model, images)}
    assert rows["fc/linear/0"].isolated_sqnr > rows["fc/linear/0"].sqnr
    integers = {row.site: row for row in linger.divergence(shown.model, images)}
    for site in SITES:
        assert rows[site].isolated_sqnr == pytest.approx(integers[site].isolated_sqnr, rel=1e-6)


@torch.no_grad()
def test_the_output_is_judged_by_its_decisions(shown: Shown) -> None:
    images = next(iter(loader(1, shuffle=False)))[0]
    fake = shown.model(images)
    with number_system(shown.model, "float"):
        reference = shown.model(images)
    changed = (fake.argmax(1) != reference.argmax(1)).double().mean().item()
    assert shown.errors.latest_output is not None
    assert shown.errors.latest_output.decisions == len(images)
    assert shown.errors.latest_output.changed == changed
    assert shown.errors.latest_output.differing == (fake != reference).double().mean().item()
    assert shown.integers.latest_output is not None
    assert shown.integers.latest_output.differing == 0.0
    assert shown.integers.latest_output.sqnr == 150.0


def test_the_layout_holds_a_section_per_group_of_layers(shown: Shown) -> None:
    (event,) = shown.events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    titles = [section.title for section in layout.category]
    assert titles[:2] == ["Overview", "All layers"]
    groups = layout.category[2:]
    assert all(section.title.startswith("Layers: ") for section in groups)
    tags = shown.events.Tags()["scalars"]
    drawn: dict[str, set[str]] = {}
    for section in groups:
        assert [chart.title for chart in section.chart] == [
            "SQNR accumulated [dB]",
            "SQNR isolated [dB]",
            "cosine",
            "saturated share",
            "step exponent (log2)",
            "width of weights [bits]",
            "width of results [bits]",
            "mismatch rate (integers against fake-quant)",
        ]
        for chart in section.chart:
            for pattern in chart.multiline.tag:
                found = [tag for tag in tags if re.match(pattern, tag)]
                assert len(found) <= 1, pattern
                drawn.setdefault(chart.title, set()).update(found)
    assert drawn["cosine"] == {f"cosine/{site}" for site in SITES}
    for section in layout.category[:2]:
        for chart in section.chart:
            assert any(re.match(p, tag) for p in chart.multiline.tag for tag in tags), chart.title


def test_stages_and_the_metric_of_each_are_scalars(shown: Shown) -> None:
    assert shown.scalars("stage/fuse_bn") == {3: 1.0, 6: 1.0, 9: 1.0}
    assert shown.scalars("stage/quantize") == {3: 0.0, 6: 1.0, 9: 1.0}
    accuracy = list(shown.scalars("val_accuracy").values())
    assert list(shown.scalars("metric/constrained").values()) == accuracy[:1]
    assert list(shown.scalars("metric/QAT").values()) == accuracy[1:]


def test_the_run_is_a_row_of_hparams(shown: Shown) -> None:
    content = shown.events.summary_metadata
    start = metadata.parse_session_start_info_plugin_data(
        content[metadata.SESSION_START_INFO_TAG].plugin_data.content
    )
    assert start.hparams["platform"].string_value == "venusa"
    assert start.hparams["planned bits (weight/input/output)"].string_value == "8/8/8"
    assert start.hparams["stages"].string_value == "fuse_bn, normalize, quantize"
    experiment = metadata.parse_experiment_plugin_data(
        content[metadata.EXPERIMENT_TAG].plugin_data.content
    )
    names = [metric.name.tag for metric in experiment.metric_infos]
    assert names[:4] == ["metric/float", "metric/constrained", "metric/QAT", "metric/integer"]
    # Integers are those of the last epoch, and so is their accuracy.
    (integer,) = shown.scalars("metric/integer").values()
    assert integer == list(shown.scalars("metric/QAT").values())[-1]


@pytest.fixture(scope="module")
def narrowed(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A run with other widths in its last epoch, and an own width for one layer."""
    folder = tmp_path_factory.mktemp("narrowed")
    logger = TensorBoardLogger(folder, name="", version="run")
    errors, integers = QuantErrorCallback(), IntegerValidatorCallback()
    stages = [
        FuseBNCallback(),
        QuantizeCallback(at_epoch=1, overrides={"stem": {"weight_bits": 6}}),
        ProgressiveBitsCallback({2: {"weight_bits": 4, "output_bits": 7}}),
    ]
    pl.seed_everything(3, verbose=False)
    model = Classifier(dropout=0.0)
    run = trainer(folder, [*stages, errors, integers], epochs=3, logger=logger)
    run.fit(model, loader(), loader(1, shuffle=False))
    events = read_events(Path(logger.log_dir))
    return Shown(Path(logger.log_dir), model.eval(), errors, integers, events)


def test_charts_show_the_widths_in_force(narrowed: Shown) -> None:
    assert narrowed.scalars("weight_bits/conv/conv2d/0") == {6: 8, 9: 4}
    assert narrowed.scalars("weight_bits/stem/conv2d/0") == {6: 6, 9: 6}
    assert narrowed.scalars("output_bits/stem/conv2d/0") == {6: 8, 9: 7}
    sizes = {"stem": 8 * 9, "conv": 8 * 8 * 9, "fc": 8 * 4}
    late = (6 * sizes["stem"] + 4 * sizes["conv"] + 4 * sizes["fc"]) / sum(sizes.values())
    assert narrowed.scalars("bits/per_weight")[9] == pytest.approx(late)
    experiment = metadata.parse_experiment_plugin_data(
        narrowed.events.summary_metadata[metadata.EXPERIMENT_TAG].plugin_data.content
    )
    assert "bits/per_weight" in [metric.name.tag for metric in experiment.metric_infos]
    graph = GraphDef.FromString(narrowed.events.Graph().SerializeToString())
    (fc,) = (node for node in graph.node if node.name == "fc/linear")
    assert fc.attr["bits (weight/input/output)"].s == b"4/8/7"


def test_the_run_log_holds_the_widths_in_force(narrowed: Shown) -> None:
    record = read_run(narrowed.folder)
    assert [(switch.epoch, switch.step) for switch in record.widths] == [(0, 0), (2, 6)]
    assert record.widths_of("conv/conv2d/0") == [(0, "8/8/8"), (6, "4/8/7")]
    assert record.layer("stem/conv2d/0").bits == "6/8/7"
    assert record.layer("conv/conv2d/0").output_bits == 7
    spans = [(span.start, span.end, span.label) for span in labelled_spans(record, "quantize")]
    assert spans == [(3, 6, "6-8/8/8"), (6, 9, "4-6/8/7-8")]


def test_widths_that_are_only_tried_out_are_not_shown(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    callbacks = [QuantizeCallback(), SensitivityCallback(at_epoch=1), QuantErrorCallback()]
    run = trainer(tmp_path, callbacks, epochs=2, logger=logger)
    run.fit(Classifier(), loader(), loader(1, shuffle=False))
    assert len(read_run(Path(logger.log_dir)).widths) == 1


def test_a_resumed_run_shows_its_widths(tmp_path: Path) -> None:
    def fit(version: str, epochs: int) -> Path:
        schedule = ProgressiveBitsCallback({0: 8, 1: 4})
        logger = CSVLogger(tmp_path, name="", version=version)
        callbacks = [QuantizeCallback(), schedule, QuantErrorCallback()]
        run = trainer(tmp_path, callbacks, epochs=epochs, logger=logger)
        ckpt = str(tmp_path / "stopped.ckpt") if version == "resumed" else None
        run.fit(Classifier(), loader(), loader(1, shuffle=False), ckpt_path=ckpt)
        if version == "stopped":
            run.save_checkpoint(tmp_path / "stopped.ckpt")
        return Path(logger.log_dir)

    fit("stopped", 2)
    record = read_run(fit("resumed", 3))
    assert record.layer("conv/conv2d/0").bits == "4/4/4"
    assert [switch.step for switch in record.widths] == [6]


def test_the_worst_layers_are_a_table_with_advice(shown: Shown) -> None:
    texts = shown.events.Tensors("worst_layers/text_summary")
    assert texts[-1].step == 9
    text = texts[-1].tensor_proto.string_val[0].decode()
    assert "of the decisions" in text
    worst = sorted(shown.errors.latest, key=lambda row: row.isolated_sqnr)[:3]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [row.site for row in worst]


def test_the_graph_is_the_quantized_model(shown: Shown) -> None:
    graph = GraphDef.FromString(shown.events.Graph().SerializeToString())
    nodes = {node.name: node for node in graph.node}
    assert {"stem/conv2d", "conv/conv2d", "add", "mean", "fc/linear"} <= set(nodes)
    assert nodes["fc/linear"].attr["bits (weight/input/output)"].s == b"8/8/8"
    assert list(nodes["stem/conv2d"].input) == ["input"]
    assert all(name in nodes for node in graph.node for name in node.input)
    add = nodes["add"]
    assert "conv/conv2d" in add.input
    assert len(add.input) == 2


@needs_matplotlib
def test_the_pictures_are_drawn_at_the_end(shown: Shown) -> None:
    from PIL import Image

    maps = ("heat_map/error", "heat_map/error_isolated", "heat_map/mismatch")
    tags = (*maps, "stages/timeline", "values/worst_layers")
    assert set(shown.events.Tags()["images"]) == set(tags)
    for tag in tags:
        images = shown.events.Images(tag)
        assert images[0].step == QUANTIZED[0]
        assert images[-1].step == QUANTIZED[-1]
        picture = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)))
        assert picture.shape[0] > 150
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20, "more than a blank page"


def test_the_run_log_holds_the_same_values(shown: Shown) -> None:
    record = read_run(shown.folder)
    assert record.name == f"{shown.folder.parent.name}/run"
    assert record.platform == "venusa"
    assert record.exact
    assert [epoch.step for epoch in record.epochs] == EPOCH_ENDS
    assert [epoch.stage for epoch in record.epochs] == ["constrained", "QAT", "QAT"]
    assert [(s.step, s.stages) for s in record.switches] == [
        (0, ("fuse_bn", "normalize")),
        (3, ("fuse_bn", "normalize", "quantize")),
    ]
    last = {error.site: error for error in record.epochs[-1].layers}
    for row in shown.integers.latest:
        assert last[row.site].sqnr == row.sqnr
        assert last[row.site].isolated_sqnr == row.isolated_sqnr
    for row in shown.errors.latest:
        assert last[row.site].saturation == row.saturation
        assert last[row.site].exponent == row.exponent
    assert set(record.histograms) == set(SITES)
    inputs = {layer.site: set(layer.inputs) for layer in record.layers}
    assert inputs["/mean/0"] == {"/relu/1"}
    assert inputs["/relu/1"] == {"/add/0"}
    assert inputs["/add/0"] == {"/relu/0", "conv/conv2d/0"}


@torch.no_grad()
def test_histograms_count_the_values_of_the_last_validation(shown: Shown) -> None:
    images = next(iter(loader(1, shuffle=False)))[0]
    logits = shown.model(images)
    histogram = read_run(shown.folder).histograms["fc/linear/0"]
    edges = torch.tensor(histogram.edges, dtype=torch.float64)
    counts = torch.histogram(logits.double().flatten(), edges).hist
    assert histogram.quantized == tuple(int(n) for n in counts)
    assert sum(histogram.reference) == logits.numel()
    step = 2.0 ** shown.scalars("exponent/fc/linear/0")[9]
    assert (histogram.low, histogram.high) == (-128 * step, 127 * step)


def test_tensorboard_shows_all_of_it_in_a_browser(shown: Shown) -> None:
    with tensorboard(shown.folder.parent) as address, chromium() as browser:
        browser.get(f"{address}#custom_scalars")
        wait_for_text(browser, "Overview", "All layers", "Layers: stem", "the metric, by stage")
        assert wait_for_elements(browser, "tf-custom-scalar-multi-line-chart-card", 12) >= 12
        # At least one drawn line per site.
        wait_for_elements(browser, 'path.line[d^="M"]', len(SITES))
        for tab, texts in (
            ("images", ("heat_map/error", "heat_map/mismatch")),
            ("text", ("worst_layers", "of the decisions", "fc/linear/0")),
            ("graphs", ("stem", "fc", "mean")),
            ("hparams", ("metric/QAT", "venusa", "8/8/8")),
        ):
            browser.get("about:blank")
            browser.get(f"{address}#{tab}")
            wait_for_text(browser, *texts)
            if tab == "images":
                assert wait_for_elements(browser, "img", 3) >= 3


def test_no_bit_changes_because_the_run_is_watched(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    plain = fitted(tmp_path, [FuseBNCallback(), QuantizeCallback(at_epoch=1)])
    watching = [QuantErrorCallback(batches=2), IntegerValidatorCallback(batches=2)]
    watched = fitted(
        tmp_path, [FuseBNCallback(), QuantizeCallback(at_epoch=1), *watching], logger=logger
    )
    assert torch.equal(torch.stack(plain.losses), torch.stack(watched.losses))
    for (name, left), right in zip(
        plain.state_dict().items(), watched.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), name


def test_without_matplotlib_there_are_charts_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboards, "matplotlib_is_installed", lambda: False)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    run = trainer(tmp_path, [QuantizeCallback(), QuantErrorCallback()], epochs=1, logger=logger)
    with pytest.warns(QuantizationWarning, match=r"lightning-linger\[plots\]"):
        run.fit(Classifier(), loader(), loader(1, shuffle=False))
    tags = read_events(Path(logger.log_dir)).Tags()
    assert tags["images"] == []
    assert "worst_layers/text_summary" in tags["tensors"]
    assert "sqnr/fc/linear/0" in tags["scalars"]


@pytest.mark.parametrize("callback", [QuantErrorCallback, IntegerValidatorCallback])
def test_each_callback_shows_what_it_has_alone(tmp_path: Path, callback: Any) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    run = trainer(tmp_path, [QuantizeCallback(), callback()], epochs=1, logger=logger)
    run.fit(Classifier(), loader(), loader(1, shuffle=False))
    record = read_run(Path(logger.log_dir))
    (epoch,) = record.measured
    assert {error.site for error in epoch.layers} == {*SITES, "bn/batch_norm/0"}
    error = epoch.layers[0]
    alone = callback is QuantErrorCallback
    assert (error.mismatch_rate is None) == alone
    assert (error.saturation is None) != alone
    assert (epoch.outputs.decisions_changed is None) != alone


def test_epochs_that_are_left_out_show_no_old_errors(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    callbacks = [QuantizeCallback(), QuantErrorCallback(every_n_epochs=2)]
    trainer(tmp_path, callbacks, epochs=3, logger=logger).fit(
        Classifier(), loader(), loader(1, shuffle=False)
    )
    record = read_run(Path(logger.log_dir))
    assert [bool(epoch.layers) for epoch in record.epochs] == [True, False, True]


class Remote(Logger):
    """A logger as those of services are: scalars, and one folder for all runs."""

    def __init__(self, folder: Path | None, version: str) -> None:
        super().__init__()
        self.folder = folder
        self.run = version
        self.metrics: dict[str, dict[int | None, float]] = {}

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str:
        return self.run

    @property
    def save_dir(self) -> str | None:
        return None if self.folder is None else str(self.folder)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Keep nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, {})[step] = value


def test_a_logger_of_another_kind_gets_the_scalars_and_a_folder_per_run(tmp_path: Path) -> None:
    for version in ("one", "two"):
        logger = Remote(tmp_path, version)
        callbacks = [QuantizeCallback(at_epoch=1), QuantErrorCallback(), IntegerValidatorCallback()]
        trainer(tmp_path, callbacks, epochs=2, logger=logger).fit(
            Classifier(), loader(), loader(1, shuffle=False)
        )
        assert list(logger.metrics["sqnr/fc/linear/0"]) == [6]
        assert list(logger.metrics["mismatch/fc/linear/0"]) == [6]
        assert logger.metrics["stage/quantize"] == {3: 0.0, 6: 1.0}
        assert list(logger.metrics["metric/QAT"]) == [6]
    for version in ("one", "two"):
        assert read_run(tmp_path / "project" / version).measured


def test_a_logger_without_a_folder_gets_the_scalars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = Remote(None, "one")
    run = trainer(tmp_path, [QuantizeCallback(), QuantErrorCallback()], epochs=1, logger=logger)
    run.fit(Classifier(), loader(), loader(1, shuffle=False))
    assert "sqnr/fc/linear/0" in logger.metrics
    assert not list(tmp_path.rglob(FILE_NAME))


def test_a_run_without_a_logger_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path, [QuantizeCallback(), QuantErrorCallback()], epochs=1)
    run.fit(Classifier(), loader(), loader(1, shuffle=False))
    assert not list(tmp_path.rglob(FILE_NAME))


def test_a_resumed_run_goes_on_in_its_file(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")

    def fit(epochs: int, checkpoint: Path | None) -> pl.Trainer:
        callbacks = [QuantizeCallback(at_epoch=1), QuantErrorCallback()]
        run = trainer(tmp_path, callbacks, epochs=epochs, logger=logger)
        run.fit(Classifier(), loader(), loader(1, shuffle=False), ckpt_path=checkpoint)
        return run

    fit(2, None).save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    fit(4, tmp_path / "last.ckpt")
    record = read_run(Path(logger.log_dir))
    assert [epoch.epoch for epoch in record.epochs] == [0, 1, 2, 3]
    assert [bool(epoch.layers) for epoch in record.epochs] == [False, True, True, True]


def test_the_budget_lets_a_share_of_the_time_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(dashboards.time, "monotonic", lambda: now[0])
    budget = Budget(0.01)
    assert budget.allows()
    with budget.spending():
        now[0] += 1.0
    assert not budget.allows()
    now[0] += 98.0
    assert not budget.allows()
    now[0] += 2.0
    assert budget.allows()


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["train_loss", "val_loss", "val_accuracy"], "val_accuracy"),
        (["train_acc", "val_f1", "val_acc"], "val_acc"),
        (["train_loss", "val_loss"], "val_loss"),
        ([], None),
    ],
)
def test_the_metric_that_stands_for_a_run(names: list[str], chosen: str | None) -> None:
    assert primary_metric(dict.fromkeys(names, 0.0)) == chosen


@pytest.mark.parametrize("worst", [0, -1, 1.5])
def test_a_wrong_number_of_layers_is_refused(worst: Any) -> None:
    with pytest.raises(ConfigError, match="`worst`"):
        QuantErrorCallback(worst=worst)


def test_logged_values_equal_recomputed_ones(tmp_path: Path) -> None:
    callback = QuantErrorCallback()
    model = Classifier(dropout=0.0)
    run = trainer(tmp_path, [QuantizeCallback(), callback], epochs=1)
    data = loader(1, shuffle=False)
    run.fit(model, loader(), data)
    model.eval()
    again = linger.quant_error(model, next(iter(data)))
    assert [row.site for row in again] == [row.site for row in callback.latest]
    for row, logged in zip(again, callback.latest, strict=True):
        assert row.sqnr == pytest.approx(logged.sqnr)
        assert row.saturation == pytest.approx(logged.saturation)


def test_aggregates_can_be_monitored_and_other_loggers_get_the_values(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    callbacks = [QuantizeCallback(), IntegerValidatorCallback(), QuantErrorCallback()]
    run = trainer(tmp_path, callbacks, epochs=1, logger=logger)
    run.fit(Classifier(), loader(), loader(2))
    assert run.callback_metrics["integer/mismatches"] == 0
    assert run.callback_metrics["integer/mismatch_rate"] == 0
    assert run.callback_metrics["quant_error/worst_sqnr"] > 0
    logger.save()
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "sqnr/fc/linear/0" in header
    assert "mismatch/fc/linear/0" in header


def test_the_closing_table_goes_to_the_log_and_nothing_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightning_linger")
    run = trainer(tmp_path, [QuantizeCallback(), IntegerValidatorCallback(rows=2)], epochs=1)
    capsys.readouterr()
    run.fit(Classifier(), loader(), loader(2))
    printed = capsys.readouterr()
    assert "Integer model" not in printed.out + printed.err
    (table,) = [text for text in caplog.messages if "Integer model" in text]
    assert table.startswith("Integer model: 0 of")
    assert len(table.splitlines()) == 2 + 2


def test_tensorboard_has_the_closing_table(shown: Shown) -> None:
    (text,) = shown.events.Tensors("integer_model/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines[0].startswith("    Integer model: 0 of")
    assert text.step == EPOCH_ENDS[-1]


class Counting(Classifier):
    """Logs in every way that Lightning knows, and at the end of the epoch too."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.seen: list[torch.Tensor] = []
        self.later = torchmetrics.Accuracy("multiclass", num_classes=4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.seen.append(logits)
        self.accuracy(logits, y)
        self.later.update(logits, y)
        self.log("val_accuracy", self.accuracy)
        self.log_dict({"val_loss": self.criterion(logits, y)})

    def on_validation_epoch_end(self) -> None:
        self.log("val_later", self.later.compute())
        self.later.reset()


def test_the_integer_model_is_measured_as_the_user_measures(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    # Free scales: the integer model is another one.
    callbacks = [
        QuantizeCallback(platform="onnxruntime", weight_bits=3, output_bits=3),
        IntegerValidatorCallback(),
    ]
    pl.seed_everything(2, verbose=False)
    model, data = Counting(), loader(3, batch_size=5, shuffle=False)
    run = trainer(tmp_path, callbacks, epochs=2, logger=logger)
    run.fit(model, loader(), data)
    seen, later = len(model.seen), model.later.update_count
    model.eval()
    _, labels = data.dataset.tensors
    with torch.no_grad(), linger.integer(model):
        logits = torch.cat([model(x) for x, _ in data])
    expected = (logits.argmax(1) == labels).float().mean().item()
    metrics = read_run(Path(logger.log_dir)).metrics_by_stage()["integer"]
    assert metrics["val_accuracy"] == pytest.approx(expected)
    assert metrics["val_later"] == pytest.approx(expected)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert metrics["val_loss"] == pytest.approx(loss, rel=1e-5)
    # The user's own lists and metrics know nothing of it.
    assert (seen, later) == (2 * 3 + 2, 0)


def test_the_integer_metric_can_be_left_out(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    callbacks = [QuantizeCallback(), IntegerValidatorCallback(final_metric=False)]
    trainer(tmp_path, callbacks, epochs=1, logger=logger).fit(
        Classifier(), loader(), loader(1, shuffle=False)
    )
    assert "integer" not in read_run(Path(logger.log_dir)).metrics_by_stage()


def test_validation_is_not_repeated(tmp_path: Path) -> None:
    class Steps(Classifier):
        steps = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.steps += 1
            return super().validation_step(batch, batch_idx)

    pl.seed_everything(0, verbose=False)
    model = Steps()
    watching = [IntegerValidatorCallback(final_metric=False), QuantErrorCallback()]
    callbacks = [QuantizeCallback(), *watching]
    run = trainer(tmp_path, callbacks, epochs=1, num_sanity_val_steps=0)
    run.fit(model, loader(), loader(2))
    assert model.steps == 2
