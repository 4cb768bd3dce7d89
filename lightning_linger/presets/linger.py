"""linger's quantization: ``linger.init(model, mode=..., parameter_bits=...)``."""

from typing import Any

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import ConfigError

# A scale of any value needs an engine that multiplies: LUNA shifts.
MODES: dict[str, dict[str, Any]] = {
    "QValue": {"platform": "venusa", "scale": "power_of_two"},
    "MaxValue": {"platform": "onnxruntime", "scale": "free", "granularity": "tensor"},
}


def linger_config(
    mode: str = "QValue",
    data_bits: int = 8,
    parameter_bits: int = 8,
    out_bits: int | None = 8,
    **fields: Any,
) -> QuantConfig:
    """Return linger's configuration.

    Args:
        mode: ``QValue`` (scales are powers of two, for LUNA) or ``MaxValue`` (127 stands for the
            largest value, one scale per tensor).
        data_bits: Width of inputs of layers.
        parameter_bits: Width of weights.
        out_bits: Width of results; None gives float results.
        **fields: Of :class:`QuantConfig`, e.g. ``platform="arcs"``.
    """
    if mode not in MODES:
        msg = f"`mode` must be one of {tuple(MODES)}. Found: {mode!r}."
        raise ConfigError(msg)
    bits = {"activation_bits": data_bits, "weight_bits": parameter_bits, "output_bits": out_bits}
    return QuantConfig().override({**MODES[mode], **bits, **fields})
