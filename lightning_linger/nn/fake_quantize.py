"""An explicit quantization point."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lightning_linger.core.config import QuantConfig
from lightning_linger.ops.point import quantization_point
from lightning_linger.stages.selection import quant_module

_DEFAULTS: ContextVar[Mapping[str, Any]] = ContextVar(
    "lightning_linger_fake_quantize_defaults", default=MappingProxyType({})
)


@contextlib.contextmanager
def fake_quantize_defaults(**fields: Any) -> Iterator[None]:
    """Give every :class:`FakeQuantize` that is made inside some fields, unless it sets them.

    They hold for this thread or task, and end with the context, after an error too. Contexts nest:
    an inner one adds to the outer one and wins.

    Args:
        **fields: Of :class:`QuantConfig`.

    Raises:
        ConfigError: If a field does not exist or cannot have its value.
    """
    QuantConfig().override(fields)
    token = _DEFAULTS.set({**_DEFAULTS.get(), **fields})
    try:
        yield
    finally:
        _DEFAULTS.reset(token)


class FakeQuantize(nn.Module):
    """Rounds what passes through, and its gradient, where the model is quantized.

    In a float model it does nothing. Once the model is quantized, its call is a site like any
    other: it has a line in the summary, runs in integers, and its state is part of the model's
    quantization state. Its settings are those of the model where it says nothing else.

    ``FakeQuantize(output_bits=4, range="tqt")`` rounds activations to 4 bits;
    ``FakeQuantize(gradient_bits=8)`` rounds the gradient that goes back through it as well.

    Args:
        config: All its settings; None takes those of the model.
        fields: Single fields of :class:`QuantConfig` that replace them, and those of
            :func:`fake_quantize_defaults`.

    Raises:
        ConfigError: If a field does not exist or cannot have its value.
    """

    # A step may call it directly, outside the model's forward (`POINT_MARK`).
    _linger_point = True

    def __init__(self, config: QuantConfig | None = None, **fields: Any) -> None:
        super().__init__()
        if config is None:
            fields = {**_DEFAULTS.get(), **fields}
        checked = (config or QuantConfig()).override(fields)
        whole = {} if config is None else dataclasses.asdict(checked)
        quant_module(self, **{**whole, **fields})
        self.fields = dict(fields)

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``, of any shape."""
        return quantization_point(x)

    def extra_repr(self) -> str:
        """Show what it sets."""
        return ", ".join(f"{name}={value!r}" for name, value in self.fields.items())
