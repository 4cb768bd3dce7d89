"""Fix configurations as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_linger.core.table import Table
from lightning_linger.nics_fix.configs import Config, get_fix_configs
from lightning_linger.nics_fix.items import QuantizeMethod


@dataclass(frozen=True)
class FixRow:
    """One item.

    Args:
        module: Dotted path of the module.
        item: ``weight``, ``bias``, ``activation`` ...
        bits: Width.
        scale: Half-range, as a power of two or a number; empty where there is none.
        method: ``none``, ``auto`` or ``fixed``.
        grad_bits: Width of the gradient, ``f`` where it is float.
        grad_scale: Its half-range.
        grad_method: Its method.
    """

    module: str
    item: str
    bits: str
    scale: str
    method: str
    grad_bits: str
    grad_scale: str
    grad_method: str


class FixTable(Table[FixRow]):
    """A list of :class:`FixRow` in the order of calls that prints as a table."""

    row_type = FixRow


def fix_table(model: nn.Module) -> FixTable:
    """Return the configurations of a quantized model and of its gradients; prints nothing."""
    data = get_fix_configs(model, data_only=True)
    gradients = get_fix_configs(model, grad=True, data_only=True)
    rows = []
    for module, items in data.items():
        for name, config in items.items():
            gradient = gradients.get(module, {}).get(name)
            rows.append(FixRow(module, name, *_cells(config), *_cells(gradient)))
    return FixTable(rows)


def print_fix_configs(model: nn.Module) -> None:
    """Print :func:`fix_table`, as plain text where the output is no terminal."""
    from rich.console import Console

    console, table = Console(), fix_table(model)
    console.print(table if console.is_terminal else str(table), soft_wrap=not console.is_terminal)


def _cells(config: Config | None) -> tuple[str, str, str]:
    if config is None or config["method"] == QuantizeMethod.FIX_NONE:
        return "f", "", "none"
    method = QuantizeMethod(config["method"]).name.removeprefix("FIX_").lower()
    return str(config["bitwidth"]), _shown(config["scale"]), method


def _shown(scale: Any) -> str:
    if scale is None:
        return ""
    if isinstance(scale, list):
        low, high = min(scale), max(scale)
        return f"{_shown(low)} ... {_shown(high)}"
    mantissa, exponent = math.frexp(scale)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{scale:.4g}"
