"""TFLite's int8 scheme and its variants, as data.

Activations are int8 with a scale and a zero point per tensor, weights int8 in [-127, 127] with a
scale per output channel, biases int32 at the product of both, and results are brought to their
scale by a 32-bit multiplier and a shift.
"""

from __future__ import annotations

import dataclasses

from lightning_linger.core.platform import Platform

_RECURRENT = "its recurrent kernels have an arithmetic of their own, which is not simulated"
_ATTENTION = "there is no kernel of attention; write it as matrix products and a softmax"
_SELECTION = "a value chosen by a mask is not simulated; add a mask, or use a minimum"
_MIRRORED = "a mirrored range is not simulated; multiply by -1, or use a maximum"
_PIECES = "there is no kernel for the pieces of a packed sequence; pad to one length"

_STAYS_FLOAT = {
    **dict.fromkeys(
        (
            *("lstm", "gru", "rnn_tanh", "rnn_relu"),
            *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        ),
        _RECURRENT,
    ),
    **dict.fromkeys(("scaled_dot_product_attention", "multi_head_attention_forward"), _ATTENTION),
    **dict.fromkeys(("where", "masked_fill"), _SELECTION),
    **dict.fromkeys(("neg", "abs"), _MIRRORED),
    **dict.fromkeys(
        ("pack_padded_sequence", "pad_packed_sequence", "pad_sequence"),
        _PIECES,
    ),
    "softmin": "there is no kernel; use a softmax behind a layer with negated weights",
    "glu": "there is no kernel; multiply by a sigmoid",
}

_GENERIC = "its parts, or accept a kernel that only this library has"
_UNSUPPORTED = dict.fromkeys(
    (
        *("layer_norm", "group_norm", "instance_norm", "rms_norm"),
        *("logsumexp", "var", "std", "div", "cumsum", "reciprocal", "sqrt", "sin", "cos", "pow"),
        *("sort", "tril", "triu", "silu", "hardsigmoid"),
        *("mish", "celu", "selu", "softplus", "softsign", "logsigmoid", "tanhshrink"),
        *(
            "softshrink",
            "hardshrink",
            "threshold",
            "erf",
            "expm1",
            "exp2",
            "log2",
            "log10",
            "log1p",
        ),
        *("conv3d", "conv_transpose3d", "avg_pool3d", "max_pool3d", "adaptive_avg_pool3d"),
        "adaptive_max_pool3d",
    ),
    _GENERIC,
) | {"normalize with a large eps": "eps=1e-12: the engine divides by the norm itself"}

TFLITE = Platform(
    name="tflite",
    scale="free",
    granularity="channel",
    rounding="half_away",
    narrow_weights=True,
    rescale="fixed_point",
    add="left_shift",
    dialect="",
    engine_name="tflite",
    curves="tflite",
    unsupported=_UNSUPPORTED,
    symmetry="affine",
    stays_float=_STAYS_FLOAT,
)

# By name: what a build of TFLite does otherwise.
VARIANTS = (
    TFLITE,
    dataclasses.replace(TFLITE, name="tflite_single_rounding", multiplier_rounding="single"),
    dataclasses.replace(TFLITE, name="tflite_float_tables", curves="tflite_float"),
    dataclasses.replace(TFLITE, name="tflite_divided_mean", averaging="divided"),
)
