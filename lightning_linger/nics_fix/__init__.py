"""NICS-fix's fixed-point training by its own names, on models that are quantized."""

from lightning_linger.nics_fix.configs import (
    FixConfigs,
    LoadReport,
    fix_configs_as,
    get_fix_configs,
    load_fix_configs,
)
from lightning_linger.nics_fix.items import QuantizeMethod
from lightning_linger.nics_fix.methods import set_fix_method
from lightning_linger.nics_fix.state import fix_state_dict
from lightning_linger.nics_fix.table import FixRow, FixTable, fix_table, print_fix_configs
from lightning_linger.presets.nics_fix import RangeMethod

FIX_NONE, FIX_AUTO, FIX_FIXED = QuantizeMethod
RANGE_MAX, RANGE_3SIGMA, RANGE_MAX_TENPERCENT, RANGE_SWEEP = RangeMethod

__all__ = [
    "FIX_AUTO",
    "FIX_FIXED",
    "FIX_NONE",
    "RANGE_3SIGMA",
    "RANGE_MAX",
    "RANGE_MAX_TENPERCENT",
    "RANGE_SWEEP",
    "FixConfigs",
    "FixRow",
    "FixTable",
    "LoadReport",
    "QuantizeMethod",
    "RangeMethod",
    "fix_configs_as",
    "fix_state_dict",
    "fix_table",
    "get_fix_configs",
    "load_fix_configs",
    "print_fix_configs",
    "set_fix_method",
]
