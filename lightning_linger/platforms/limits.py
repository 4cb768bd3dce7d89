"""What is known about deploying on each platform, as data."""

from __future__ import annotations

from lightning_linger.platforms.luna_limits import LUNA_LIMITS
from lightning_linger.platforms.rules import (
    RESULT_SIZE,
    AtMost,
    Limits,
    Never,
    Rule,
    other_platform,
    setting_rules,
)
from lightning_linger.platforms.tflite_limits import TFLITE_LIMITS

_ONNXRUNTIME = (
    Rule(
        "float_op",
        ("float",),
        "why",
        Never(),
        "everything between input and output runs in integers; a float op is computed by another "
        "library, and equal to rounding only",
        "quantize it, or accept float there",
        severity="warning",
        evidence="export",
    ),
    Rule(
        "accumulator",
        ("conv", "conv1d", "deconv", "linear"),
        "accumulator",
        AtMost(2**24 - 1),
        "where a layer has no integer kernel (16-bit operands, transposed convolutions) its sums "
        "stay at {allowed} or below, the whole numbers of float32; the bound assumes the largest "
        "codes, the export looks at the real weights",
        "use fewer weight_bits or activation_bits, or fewer channels",
        severity="warning",
        evidence="export",
    ),
    Rule(
        "sums",
        ("avg_pool",),
        "sums",
        AtMost(2**24 - 1),
        "the sum of the codes in one window stays at {allowed} or below",
        "use fewer activation_bits, or average in two steps",
        evidence="export",
    ),
    Rule(
        "packed_sequence",
        ("lstm", "gru", "rnn_tanh", "rnn_relu"),
        "op",
        Never(),
        "a recurrent layer runs over a whole sequence that is not packed",
        "use it on a padded sequence",
        when=("packed",),
        evidence="export",
    ),
    RESULT_SIZE,
    *setting_rules("onnxruntime", None, "half_even"),
)

LIMITS: dict[str, Limits] = {
    limits.platform: limits
    for limits in (
        *LUNA_LIMITS,
        Limits(
            "onnxruntime",
            _ONNXRUNTIME,
            about="CPUs, through the `qdq` dialect. Only what the export cannot write, or not "
            "exactly, is a rule.",
        ),
        Limits(
            "mlu",
            (other_platform("mlu"),),
            about="Cambricon's MLU. Layers run in integers and all else in float; nothing was "
            "measured for it.",
        ),
        *TFLITE_LIMITS,
    )
}


def limits_of(platform: str) -> Limits:
    """Return the limits of a platform; one that nobody described has none."""
    return LIMITS.get(platform, Limits(platform, ()))
