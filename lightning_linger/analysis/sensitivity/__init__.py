"""How much a model loses by quantizing one layer, measured layer by layer and width by width."""

from lightning_linger.analysis.sensitivity.measure import Metric, measure_sensitivity, sensitivity
from lightning_linger.analysis.sensitivity.scores import output_score
from lightning_linger.analysis.sensitivity.table import (
    PARTS,
    Part,
    Sensitivities,
    SensitivityRow,
    read_sensitivities,
)
from lightning_linger.analysis.sensitivity.trials import MODES, Mode, check_trials
from lightning_linger.analysis.sensitivity.units import Unit, measured_layers, units_of, widths_for

__all__ = [
    "MODES",
    "PARTS",
    "Metric",
    "Mode",
    "Part",
    "Sensitivities",
    "SensitivityRow",
    "Unit",
    "check_trials",
    "measure_sensitivity",
    "measured_layers",
    "output_score",
    "read_sensitivities",
    "sensitivity",
    "units_of",
    "widths_for",
]
