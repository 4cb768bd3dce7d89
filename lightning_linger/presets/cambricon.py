"""Cambricon's post-training quantization: ``quantize_dynamic_mlu(model, qconfig_spec, dtype)``."""

from typing import Any

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import ConfigError

BITS = {"int8": 8, "int16": 16}
# How `use_avg` brings batches together; CATCH itself counts the first one twice.
RANGES: dict[bool | str, str] = {False: "minmax", True: "mean_minmax", "catch": "catch_minmax"}


def cambricon_config(
    dtype: str = "int8",
    use_avg: bool | str = False,
    data_scale: float = 1.0,
    per_channel: bool = False,
    method: str = "minmax",
    **fields: Any,
) -> QuantConfig:
    """Return CATCH's configuration: layers in integers, float results, the range of each input.

    Args:
        dtype: ``int8`` or ``int16``, of weights and inputs.
        use_avg: Average the extremes over batches; ``"catch"`` does it as CATCH does.
        data_scale: What ranges of inputs are multiplied with.
        per_channel: One scale per output channel of a weight.
        method: Only ``minmax``.
        **fields: Of :class:`QuantConfig`; ``scale="power_of_two"`` for positions without a factor.
    """
    for name, value, choices in (
        ("use_avg", use_avg, tuple(RANGES)),
        ("per_channel", per_channel, (False, True)),
        ("method", method, ("minmax",)),
    ):
        require_choice(name, value, choices)
    return QuantConfig().override(
        {
            "platform": "mlu",
            **bits_of(dtype),
            "output_bits": None,
            "range": RANGES[use_avg],
            "data_scale": data_scale,
            "granularity": "channel" if per_channel else "tensor",
            **fields,
        }
    )


def bits_of(dtype: str, what: str = "dtype") -> dict[str, int]:
    """Return the widths that a dtype stands for."""
    require_choice(what, dtype, tuple(BITS))
    return {"weight_bits": BITS[dtype], "activation_bits": BITS[dtype]}


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse a value that is not one of the choices; 1 is not True here."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        msg = f"`{name}` must be one of {choices}. Found: {value!r}."
        raise ConfigError(msg)
