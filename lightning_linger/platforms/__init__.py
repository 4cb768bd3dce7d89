"""Targets as data: what each does differently."""

from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.core.platform import Platform, register_platform

_NO_CLIP = "a ReLU, and a range limit on the layer before it"
_NO_3D = "the two-dimensional layer on a reshaped input"
_LUNA_UNSUPPORTED = {
    "sub": "an addition with the weights of one side negated",
    "relu6": _NO_CLIP,
    "hardtanh": _NO_CLIP,
    "clamp": _NO_CLIP,
    "clamp_max": _NO_CLIP,
    "conv3d": _NO_3D,
    "conv_transpose1d": "a two-dimensional transposed convolution with height 1",
    "conv_transpose3d": _NO_3D,
    "avg_pool3d": _NO_3D,
    "max_pool3d": _NO_3D,
    "adaptive_avg_pool3d": _NO_3D,
}


def _luna(name: str, engine_name: str, curves: str) -> Platform:
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
        unsupported=_LUNA_UNSUPPORTED,
    )


PLATFORMS: dict[str, Platform] = {
    platform.name: register_platform(platform)
    for platform in (
        _luna("venusa", "venusA", curves="venusa"),
        _luna("arcs", "arcs", curves="arcs"),
        _luna("venus", "venus", curves="venus"),
        _luna("mars", "mars", curves="arcs"),
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
