"""Trying plans out on a model that keeps its own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.stages.quantize import plan_quantize


@contextlib.contextmanager
def kept_plan(model: nn.Module) -> Iterator[None]:
    """Let a prepared model be planned anew; on leaving it has the quantizers it had, as they were.

    What planning makes is dropped, and no quantizer of the model is touched: planning replaces
    quantizers and never changes one.
    """
    instrumentation = instrumentation_of(model)
    modules: list[nn.Module] = [instrumentation, *instrumentation.sites]
    before = [_contents(module) for module in modules]
    switches = copy.copy(instrumentation.switches.__dict__)
    try:
        yield
    finally:
        instrumentation.switches.__dict__.update(switches)
        for module, contents in zip(modules, before, strict=True):
            _put_back(module, contents)
        instrumentation.thaw()


def plan_again(model: nn.Module) -> nn.Module:
    """Plan the quantize stage as it is planned: with new quantizers, which have seen no range.

    Args:
        model: A model with a plan of the quantize stage.
    """
    settings = dict(instrumentation_of(model).plans["quantize"])
    chosen = [settings.pop(name, None) for name in ("types", "modules", "overrides")]
    return plan_quantize(model, QuantConfig().override(settings), *chosen)


_CONTAINERS = (dict, set, list)

_Contents = tuple[dict[str, Any], dict[str, Any]]


def _contents(module: nn.Module) -> _Contents:
    """Return the attributes of a module, and copies of those that are changed in place."""
    attributes = dict(module.__dict__)
    copies = {
        name: copy.copy(value) for name, value in attributes.items() if type(value) in _CONTAINERS
    }
    return attributes, copies


def _put_back(module: nn.Module, contents: _Contents) -> None:
    attributes, copies = contents
    for name, value in copies.items():
        kept = attributes[name]
        if isinstance(kept, list):
            kept[:] = value
        elif isinstance(kept, dict | set):
            kept.clear()
            kept.update(value)
    module.__dict__.clear()
    module.__dict__.update(attributes)
