"""One HTML file that holds a run: pictures, advice and a table of its layers."""

from __future__ import annotations

import html
import json
import string
from importlib import resources
from typing import Any

from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.core.progress import with_progress
from lightning_linger.dashboard import charts
from lightning_linger.dashboard.advice import advise, judge_outputs
from lightning_linger.dashboard.records import LayerError, RunRecord
from lightning_linger.dashboard.sensitivity import MeasuredSensitivities

WORST = 6


def report_html(record: RunRecord, sensitivities: MeasuredSensitivities | None = None) -> str:
    """Return a page that needs nothing but itself.

    Args:
        record: The run.
        sensitivities: Of its layers, if they are known.

    Raises:
        UnsupportedError: Without plotly.
        ConfigError: If no epoch of the run was quantized and measured.
    """
    if record.latest is None:
        msg = (
            f"the run {record.name!r} has no measured epoch. Its layers are measured from the "
            "first validation with quantization on."
        )
        raise ConfigError(msg)
    page = resources.files("lightning_linger.dashboard") / "page"
    template = string.Template((page / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(record.name or "run"),
        subtitle=html.escape(_subtitle(record)),
        verdict=html.escape(judge_outputs(record.latest.outputs)),
        style=(page / "report.css").read_text(encoding="utf-8"),
        plotly=_plotly_js(),
        script=(page / "report.js").read_text(encoding="utf-8"),
        data=_embedded(_data(record, sensitivities or MeasuredSensitivities())),
    )


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        msg = 'the report needs plotly: `pip install "lightning-linger[plots]"`.'
        raise UnsupportedError(msg) from error
    return str(get_plotlyjs())


def _embedded(data: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _subtitle(record: RunRecord) -> str:
    scales = "power-of-two scales" if record.exact else "free scales"
    target = f"{record.platform}, {scales}" if record.platform else "no platform"
    return f"{target}; {len(record.measured_layers)} layers, {len(record.epochs)} epochs"


def _data(record: RunRecord, sensitivities: MeasuredSensitivities) -> dict[str, Any]:
    figures = {
        "timeline": charts.stage_timeline(record),
        "accumulated": charts.error_heat_map(
            record, "accumulated: through the whole chain", lambda error: error.sqnr
        ),
        "isolated": charts.error_heat_map(
            record, "isolated: the layer alone", lambda error: error.isolated_sqnr
        ),
    }
    if any(error.mismatch_rate is not None for epoch in record.epochs for error in epoch.layers):
        figures["mismatch"] = charts.mismatch_heat_map(record)
    if sensitivities.rows:
        figures["sensitivity"] = charts.sensitivity_bars(sensitivities)
    return {
        "figures": figures,
        "groups": charts.group_lines(record),
        "layers": _layers(record),
        "worst": [item.error.site for item in advise(record, WORST)],
        "metrics": {
            stage: {name: f"{value:.4f}" for name, value in metrics.items()}
            for stage, metrics in record.metrics_by_stage().items()
        },
        "settings": record.settings,
        "widths": sensitivities.widths,
        "drops": {site: sensitivities.drops(site) for site in sensitivities.suggestion},
        "suggestion": sensitivities.suggestion,
        "reason": sensitivities.reason,
    }


def _layers(record: RunRecord) -> list[dict[str, Any]]:
    advice = {item.error.site: item for item in advise(record)}
    inputs = {layer.site: record.measured_inputs(layer.site) for layer in record.measured_layers}
    rows = []
    layers = with_progress(record.measured_layers, "Writing the report")
    for order, layer in enumerate(layers):
        history = [
            (epoch.epoch, error)
            for epoch in record.measured
            for error in epoch.layers
            if error.site == layer.site
        ]
        latest = history[-1][1]
        item = advice.get(layer.site)
        histogram = record.histograms.get(layer.site)
        rows.append(
            {
                "order": order,
                "site": layer.site,
                "label": layer.label,
                "op": layer.op,
                "bits": layer.bits,
                "widths": record.widths_of(layer.site),
                "noise": latest.noise,
                "own_noise": latest.isolated_noise,
                **_values(latest),
                "rule": item.rule if item else "",
                "advice": item.text if item else "",
                "inputs": inputs[layer.site],
                "outputs": [site for site, before in inputs.items() if layer.site in before],
                "epochs": [epoch for epoch, _ in history],
                "history": [_values(error) for _, error in history],
                "histogram": charts.value_histogram(histogram) if histogram else None,
            }
        )
    return rows


def _values(error: LayerError) -> dict[str, float | None]:
    names = ("sqnr", "isolated_sqnr", "saturation", "exponent", "mismatch_rate", "cosine")
    return {name: charts.rounded(getattr(error, name)) for name in names}
