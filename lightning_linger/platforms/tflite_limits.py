"""What is known about deploying on TFLite."""

from __future__ import annotations

from lightning_linger.platforms.rules import (
    CONVOLUTIONS,
    Limits,
    Never,
    OneOf,
    Rule,
    setting_rules,
)
from lightning_linger.platforms.tflite import VARIANTS

_RULES = (
    Rule(
        "weight_bits",
        (*CONVOLUTIONS, "linear"),
        "weight_bits",
        OneOf((8,)),
        "weights have up to {allowed} bits",
        "use weight_bits=8",
        evidence="sources",
    ),
    Rule(
        "unsupported_op",
        ("unsupported",),
        "op",
        Never(),
        "the engine has no 8-bit kernel for this op; what is simulated is this library's own",
        "write it with ops that the engine has",
        evidence="sources",
    ),
    Rule(
        "float_op",
        ("float",),
        "why",
        Never(),
        "everything between input and output runs in integers; a float op needs a float kernel "
        "between two conversions",
        "quantize it, or accept float there",
        severity="warning",
        evidence="sources",
    ),
)

TFLITE_LIMITS = tuple(
    Limits(
        platform.name,
        (*_RULES, *setting_rules(platform.name, None, platform.rounding)),
        about="TFLite's int8 reference kernels. Which ops they have is known from their sources, "
        "and no converter was run.",
    )
    for platform in VARIANTS
)
