"""TFLite's int8 scheme (Jacob et al. 2018, https://arxiv.org/abs/1712.05877)."""

from typing import Any

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import ConfigError

# What a build of TFLite does otherwise, and the platform that does it.
VARIANTS: dict[str, str] = {
    "reference": "tflite",
    "single_rounding": "tflite_single_rounding",
    "float_tables": "tflite_float_tables",
    "divided_mean": "tflite_divided_mean",
}


def tflite_config(
    variant: str = "reference", int16_activations: bool = False, **fields: Any
) -> QuantConfig:
    """Return TFLite's configuration.

    Activations are int8 with a zero point, by the moving average of both ends of their range;
    weights lie in [-127, 127] with a scale per output channel; biases are int32.

    Args:
        variant: A name of :data:`VARIANTS`.
        int16_activations: Whether activations are int16, without a zero point.
        **fields: Of :class:`QuantConfig`.
    """
    if variant not in VARIANTS:
        msg = f"`variant` must be one of {tuple(VARIANTS)}. Found: {variant!r}."
        raise ConfigError(msg)
    if not isinstance(int16_activations, bool):
        msg = f"`int16_activations` is True or False. Found: {int16_activations!r}."
        raise ConfigError(msg)
    bits = 16 if int16_activations else 8
    scheme = {"platform": VARIANTS[variant], "activation_bits": bits, "output_bits": bits}
    return QuantConfig().override({**scheme, **fields})
