"""Targets as data: what each does differently."""

from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.core.platform import Platform, register_platform
from lightning_linger.platforms.tflite import VARIANTS

_NO_CLIP = "a ReLU, and a range limit on the layer before it"
_NO_3D = "the two-dimensional layer on a reshaped input"
_NO_CURVE = "a ReLU, or an activation made of what the engine has"
_NO_FUNCTION = "a float function behind the model"
_NO_SIGMOID = "a softmax over the value and a zero"
_NO_LOGARITHM = "the values themselves: the largest has the largest logarithm"
_LAYER_NORM = "a layer norm over the last axis"
_NEGATED = "the maximum behind a layer with negated weights"
_DIFFERENCE = "a ReLU of the difference"
_ONLY_LSTM = "`nn.LSTM` on whole sequences, one at a time, which starts from zeros"
_ONE_LENGTH = "padded sequences of one length"
_LUNA_UNSUPPORTED = {
    "sub": "an addition with the weights of one side negated",
    "div": "a product with a constant, or a float division behind the model",
    "interpolate_linear": "mode='nearest', or a transposed convolution",
    "relu6": _NO_CLIP,
    "hardtanh": _NO_CLIP,
    "clamp": _NO_CLIP,
    "clamp_max": _NO_CLIP,
    "conv3d": _NO_3D,
    "conv_transpose3d": _NO_3D,
    "avg_pool3d": _NO_3D,
    "max_pool3d": _NO_3D,
    "adaptive_avg_pool3d": _NO_3D,
    "gelu": "x * sigmoid(1.7 * x)",
    "silu": "x * sigmoid(x)",
    **dict.fromkeys(
        (
            *("mish", "hardswish", "hardsigmoid", "elu", "selu", "celu"),
            *("softplus", "softsign", "logsigmoid", "tanhshrink", "softshrink", "hardshrink"),
            "threshold",
        ),
        _NO_CURVE,
    ),
    **dict.fromkeys(
        (
            *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt"),
            *("reciprocal", "erf", "sin", "cos"),
            *("logsumexp", "cumsum", "var", "std", "argmin", "topk", "sort"),
            *("normalize", "normalize with a large eps"),
        ),
        _NO_FUNCTION,
    ),
    "softmin": "a softmax behind a layer with negated weights",
    **dict.fromkeys(("rms_norm", "group_norm", "instance_norm"), _LAYER_NORM),
    "sum": "a mean",
    **dict.fromkeys(("amin", "min"), _NEGATED),
    **dict.fromkeys(("maximum", "minimum"), _DIFFERENCE),
    **dict.fromkeys(
        (
            *("gru", "rnn_tanh", "rnn_relu"),
            *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        ),
        _ONLY_LSTM,
    ),
    **dict.fromkeys(("pack_padded_sequence", "pad_packed_sequence", "pad_sequence"), _ONE_LENGTH),
}


def _luna(name: str, engine_name: str, curves: str, **unsupported: str) -> Platform:
    """One of LISTENAI's LUNA engines: power-of-two scales, half-up right shifts, saturation."""
    return Platform(
        name=name,
        scale="power_of_two",
        granularity="tensor",
        rounding="half_up",
        narrow_weights=False,
        rescale="shift",
        add="round_operands",
        dialect="linger",
        engine_name=engine_name,
        curves=curves,
        unsupported={**_LUNA_UNSUPPORTED, **unsupported},
    )


PLATFORMS: dict[str, Platform] = {
    platform.name: register_platform(platform)
    for platform in (
        # The packers refuse what the executors of these ops read, or the executors are wrong.
        _luna(
            *("venusa", "venusA", "venusa"),
            sigmoid=_NO_SIGMOID,
            tanh=_NO_SIGMOID,
            gelu=_NO_CURVE,
            silu=_NO_CURVE,
            log_softmax=_NO_LOGARITHM,
        ),
        _luna("arcs", "arcs", "arcs", tanh="a sigmoid", log_softmax=_NO_LOGARITHM),
        _luna("venus", "venus", "venus", layer_norm="a batch norm"),
        _luna("mars", "mars", "arcs", tanh="a sigmoid", log_softmax=_NO_LOGARITHM),
        Platform(
            name="onnxruntime",
            scale="free",
            granularity="channel",
            rounding="half_even",
            narrow_weights=True,
            rescale="multiply",
            add="round_sum",
            dialect="qdq",
            engine_name="onnxruntime",
            zero_point=128,
        ),
        *VARIANTS,
        # Cambricon's MLU: where it rounds ties to is said nowhere; this is torch's rule.
        Platform(
            name="mlu",
            scale="free",
            granularity="tensor",
            rounding="half_even",
            narrow_weights=False,
            rescale="multiply",
            add="round_sum",
            dialect="qdq",
            engine_name="mlu",
            layers_only=True,
            channel_scale="free",
            exclusive_powers=True,
            unseen_step=1.0,
            unsupported={
                f"conv_transpose{dims}d": "an upsampling, and a convolution" for dims in (1, 2, 3)
            },
        ),
    )
}


def platform_of(name: str) -> Platform:
    """Return a platform by name.

    Raises:
        ConfigError: If there is no such platform; names the similar ones.
    """
    if name not in PLATFORMS:
        msg = (
            f"unknown platform {name!r}. Allowed: {sorted(PLATFORMS)}. Similar: "
            f"{near_matches(name, PLATFORMS)}."
        )
        raise ConfigError(msg)
    return PLATFORMS[name]
