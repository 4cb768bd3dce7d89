"""What TensorBoard shows besides scalars: the layout of the charts, pictures, tables, the graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_linger.analysis.sensitivity import SensitivityRow
from lightning_linger.callbacks._compat import is_tensorboard
from lightning_linger.dashboard import figures
from lightning_linger.dashboard.advice import advise, markdown
from lightning_linger.dashboard.graph import graph_def
from lightning_linger.dashboard.groups import group_layers
from lightning_linger.dashboard.records import EpochRecord, LayerError, RunRecord
from lightning_linger.dashboard.sensitivity import MeasuredSensitivities

Charts = Mapping[str, list[str]]

_EVERYTHING: dict[str, dict[str, list[str]]] = {
    "Overview": {
        "the metric, by stage": [r"metric/.*"],
        "decisions that quantization changes (share)": [r"quant_error/decisions_changed"],
        "codes that differ between integer and fake-quant": [r"integer/mismatches"],
        "worst layer: SQNR [dB]": [r"quant_error/worst_sqnr", r"integer/worst_sqnr"],
        "worst layer: saturated share": [r"quant_error/worst_saturation"],
        "stages that are on": [r"stage/.*"],
        "bits per weight, mean": [r"bits/per_weight"],
    },
    "All layers": {
        "SQNR accumulated [dB] (fake-quant against float)": [r"sqnr/.*"],
        "SQNR isolated [dB] (the layer alone)": [r"sqnr_isolated/.*"],
        "mismatch rate (integers against fake-quant)": [r"mismatch/.*"],
        "SQNR accumulated [dB] (integers against float)": [r"integer_sqnr/.*"],
        "SQNR isolated [dB] (integers, the layer alone)": [r"integer_sqnr_isolated/.*"],
        "mismatch rate, isolated": [r"mismatch_isolated/.*"],
    },
}
_PER_GROUP = {
    "SQNR accumulated [dB]": "sqnr",
    "SQNR isolated [dB]": "sqnr_isolated",
    "cosine": "cosine",
    "saturated share": "saturation",
    "step exponent (log2)": "exponent",
    "width of weights [bits]": "weight_bits",
    "width of results [bits]": "output_bits",
    "mismatch rate (integers against fake-quant)": "mismatch",
}
_ERROR_MAPS: tuple[tuple[str, str, Callable[[LayerError], float]], ...] = (
    ("heat_map/error", "accumulated: through the whole chain", lambda error: error.sqnr),
    ("heat_map/error_isolated", "isolated: the layer alone", lambda error: error.isolated_sqnr),
)


def writers(trainer: Any) -> list[Any]:
    """Return the summary writers of the TensorBoard loggers."""
    return [logger.experiment for logger in trainer.loggers if is_tensorboard(logger)]


def layout(sites: Sequence[str]) -> dict[str, Charts]:
    """Return the page *Custom scalars*: section to chart to regular expressions of tags."""
    sections: dict[str, Charts] = dict(_EVERYTHING)
    for group in group_layers(sites):
        sections[f"Layers: {group.title}"] = {
            title: [f"{name}/{re.escape(site)}$" for site in group.sites]
            for title, name in _PER_GROUP.items()
        }
    return sections


def show_layout(writer: Any, sites: Sequence[str]) -> None:
    """Put the charts on the page *Custom scalars*."""
    writer.add_custom_scalars(
        {
            section: {title: ["Multiline", tags] for title, tags in charts.items()}
            for section, charts in layout(sites).items()
        }
    )


def show_graph(writer: Any, record: RunRecord, epoch: EpochRecord) -> None:
    """Put the quantized model on the page *Graphs*."""
    from tensorboard.compat.proto.event_pb2 import Event

    graph = graph_def(record.layers, epoch.layers)
    # The writer offers only graphs that it traces itself.
    writer._get_file_writer().add_event(Event(graph_def=graph.SerializeToString()))


def show_settings(writer: Any, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Put a row on the page *HParams*, whose metrics are read from scalars of the same names."""
    from torch.utils.tensorboard.summary import hparams

    write: Any = hparams
    for summary in write(dict(settings), dict.fromkeys(metrics, 0.0)):
        writer._get_file_writer().add_summary(summary)


def show_advice(writer: Any, record: RunRecord, worst: int, step: int) -> None:
    """Put the worst layers, and what to do about them, on the page *Text*."""
    latest = record.latest
    if latest is not None:
        text = markdown(advise(record, worst), latest.outputs)
        writer.add_text("worst_layers", text, step)


def show_text(trainer: Any, tag: str, text: str) -> None:
    """Put lines, as they stand, on the page *Text*."""
    # Markdown takes what is indented by four for code.
    indented = "".join(f"    {line}\n" for line in text.splitlines())
    for writer in writers(trainer):
        writer.add_text(tag, indented, trainer.global_step)


def show_sensitivities(
    trainer: Any, rows: Sequence[SensitivityRow], overrides: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put sensitivities on the pages *Text* and, with matplotlib, *Images*."""
    measured = MeasuredSensitivities(rows, overrides)
    for writer in writers(trainer):
        writer.add_text("sensitivity", measured.markdown(), trainer.global_step)
        if figures.matplotlib_is_installed():
            picture = figures.pixels(figures.sensitivity_bars(measured))
            writer.add_image("sensitivity", picture, trainer.global_step, dataformats="HWC")


def show_pictures(writer: Any, record: RunRecord, worst: int, step: int) -> None:
    """Put every picture there is data for on the page *Images*."""
    pictures = {"stages/timeline": figures.stage_timeline(record)} if record.switches else {}
    if record.measured:
        for name, title, value in _ERROR_MAPS:
            pictures[name] = figures.error_heat_map(record, title, value)
        if any(e.mismatch_rate is not None for epoch in record.measured for e in epoch.layers):
            pictures["heat_map/mismatch"] = figures.mismatch_heat_map(record)
    sites = [item.error.site for item in advise(record, worst)]
    if any(site in record.histograms for site in sites):
        pictures["values/worst_layers"] = figures.value_histograms(record, sites)
    for tag, figure in pictures.items():
        writer.add_image(tag, figures.pixels(figure), step, dataformats="HWC")
