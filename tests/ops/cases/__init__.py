"""The cases of the generic harness, one module per family with a list ``CASES``."""

import importlib
import pkgutil

from tests.ops.cases.case import Case, layer, on_convs, on_linears, randn

__all__ = ["ALL", "Case", "layer", "on_convs", "on_linears", "randn"]

ALL: list[Case] = [
    case
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name)
    if found.name != "case"
    for case in importlib.import_module(f"{__name__}.{found.name}").CASES
]
