"""An explicit quantization point."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from lightning_linger.core.config import QuantConfig
from lightning_linger.ops.point import quantization_point
from lightning_linger.stages.selection import quant_module


class FakeQuantize(nn.Module):
    """Rounds what passes through, and its gradient, where the model is quantized.

    In a float model it does nothing. Once the model is quantized, its call is a site like any
    other: it has a line in the summary, runs in integers, and its state is part of the model's
    quantization state. Its settings are those of the model where it says nothing else.

    ``FakeQuantize(output_bits=4, range="tqt")`` rounds activations to 4 bits;
    ``FakeQuantize(gradient_bits=8)`` rounds the gradient that goes back through it as well.

    Args:
        config: All its settings; None takes those of the model.
        fields: Single fields of :class:`QuantConfig` that replace them.

    Raises:
        ConfigError: If a field does not exist or cannot have its value.
    """

    # A step may call it directly, outside the model's forward (`POINT_MARK`).
    _linger_point = True

    def __init__(self, config: QuantConfig | None = None, **fields: Any) -> None:
        super().__init__()
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
