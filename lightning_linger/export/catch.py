"""State dicts of Cambricon's CATCH, from calibrated models and into them.

CATCH keeps the float weights of a layer, and beside them, at the layer's path:

============================ =====================================================================
``scale``                    float32 ``[2]``: ``qmax / absmax`` of the input and of the weight; the
                             latter is 0 where each channel has its own
``quantized_mode``           int32 ``[1]``: 1 for int8, 2 for int16
``use_symmetry``             int64 ``[1]``: 1
``quantized_by_channel``     int64 ``[1]``: 1, with
``scale_weight_per_channel`` float32 ``[C_out]``
``input_mean, input_std``    float32 ``[1, C, 1, 1]``, times 255, where raw images come in
============================ =====================================================================

Once loaded, CATCH has joined the scales of channels to ``scale``, which then has ``2 + C_out``
entries, and the modes are 3 and 4. Both forms are read, and either is written.

Our `scale` is the step, their reciprocal. A range comes back from its scale within one unit in the
last place of float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.core.grid import Grid
from lightning_linger.core.images import FirstConv
from lightning_linger.core.instrumentation import STATE_PREFIX
from lightning_linger.core.ranges import RangeRule
from lightning_linger.core.rounding import round_value
from lightning_linger.platforms import platform_of
from lightning_linger.stages.checkpoints import recipe_of
from lightning_linger.stages.firstconv import take_raw_images
from lightning_linger.stages.prepare import prepare, strip
from lightning_linger.stages.quantize import quantize

StateDict = dict[str, Any]

PLATFORM = "mlu"
_KINDS = ("conv1d", "conv2d", "conv3d", "linear")
_BITS = {1: 8, 2: 16, 3: 8, 4: 16}
# What a layer has beside its weight and bias.
_NAMES = (
    *("scale", "quantized_mode", "use_symmetry", "quantized_by_channel"),
    *("scale_weight_per_channel", "input_mean", "input_std"),
)
# Scales of one weight, measured here and there.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class CatchLayer:
    """What CATCH knows of one layer.

    Args:
        bits: Width of input and weight, 8 or 16.
        input_scale: ``qmax / absmax`` of the input.
        weight_scales: float32 ``[1]``, or ``[C_out]`` per channel.
        per_channel: Whether each channel has a scale.
        firstconv: How raw images are normalized, None where none come in.
    """

    bits: int
    input_scale: float
    weight_scales: Tensor
    per_channel: bool
    firstconv: FirstConv | None

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields of :class:`QuantConfig` that say the same."""
        granularity = "channel" if self.per_channel else "tensor"
        return {
            "weight_bits": self.bits,
            "activation_bits": self.bits,
            "granularity": granularity,
        }


# --- out ----------------------------------------------------------------------------------------


def to_catch(state: Mapping[str, Any], joined: bool = False) -> StateDict:
    """Return what CATCH loads, from the state dict of a calibrated model.

    Args:
        state: Of a model that was calibrated for platform ``mlu``.
        joined: Write the form that CATCH has after loading: modes 3 and 4.

    Returns:
        The float state, with the scales of its layers.

    Raises:
        ConfigError: If it is not the state of such a model, or a range is not known.
        UnsupportedError: If a layer has no place in CATCH's state dict; names it.
    """
    recipe = recipe_of(state)
    layers = _layers_by_path(recipe)
    result = {key: value for key, value in state.items() if not key.startswith(STATE_PREFIX)}
    plan = recipe["plans"].get("firstconv")
    for path, (key, layer) in layers.items():
        _refuse_unknown(state, path, key, layer)
        written = _layer_state(state, path, key, layer, joined)
        if layer["firstconv"] and plan is not None:
            for name in ("mean", "std"):
                values = torch.tensor(plan[name], dtype=torch.float32) * 255.0
                written[f"input_{name}"] = values.view(1, -1, 1, 1)
        result.update({_join(path, name): value for name, value in written.items()})
    return result


def _layer_state(
    state: Mapping[str, Any], path: str, key: str, layer: Mapping[str, Any], joined: bool
) -> StateDict:
    bits, per_channel = layer["weight_bits"], layer["granularity"] == "channel"
    estimator = _estimator(key)
    if not int(state[estimator + "batches"]):
        msg = f"`{key}` has seen no range yet. Call `linger.calibrate` first."
        raise ConfigError(msg)
    low, high = state[estimator + "range"]
    scale = scale_of(torch.maximum(-low, high).reshape(1), bits)
    weight = state[_join(path, "weight")].detach().float()
    rows = weight.flatten(1) if per_channel else weight.reshape(1, -1)
    scales = scale_of(_weight_reach(rows, key, layer), bits)
    mode = (1 if bits == 8 else 2) + (2 if per_channel and joined else 0)
    written = {
        "use_symmetry": torch.ones(1, dtype=torch.int64),
        "quantized_mode": torch.tensor([mode], dtype=torch.int32),
    }
    if not per_channel:
        return {**written, "scale": torch.cat([scale, scales])}
    return {
        **written,
        "scale": torch.cat([scale, torch.zeros(1), *([scales] if joined else [])]),
        "quantized_by_channel": torch.ones(1, dtype=torch.int64),
        "scale_weight_per_channel": scales,
    }


def _weight_reach(rows: Tensor, key: str, layer: Mapping[str, Any]) -> Tensor:
    rule = RangeRule.parse_weight(layer["weight_range"])
    if rule.learned is not None:
        msg = f"`{key}`: its weight has a learned range, which CATCH has not."
        raise UnsupportedError(msg)
    if rule.fixed is not None:
        return rows.new_full((len(rows),), max(map(abs, rule.fixed)))
    assert rule.statistic is not None  # what is neither learned nor fixed is measured
    return rule.statistic.measure(rows, None, Grid(layer["weight_bits"], "free"))


def scale_of(absmax: Tensor, bits: int) -> Tensor:
    """Return ``qmax / absmax`` in float32, 1 where the range is empty or not finite."""
    qmax = torch.tensor(float(Grid(bits).qmax))
    usable = (absmax > 0) & torch.isfinite(absmax)
    safe = torch.where(usable, absmax.float(), torch.ones(()))
    return torch.where(usable, qmax / safe, torch.ones(()))


def reach_of(scale: float, bits: int) -> float:
    """Return the float32 ``absmax`` of a scale; that of a float32 ``absmax`` is kept exactly."""
    return float(torch.tensor(float(Grid(bits).qmax)) / torch.tensor(scale))


def encode_position(scale: float, bits: int) -> int:
    """Return the exponent of the engine's step, ``floor(log2(absmax)) - (bits - 2)``.

    Args:
        scale: ``qmax / absmax``.
        bits: 8 or 16.
    """
    _, exponent = math.frexp(reach_of(scale, bits))
    return exponent - 1 - (bits - 2)


def encode_channels(scales: Tensor, bits: int) -> tuple[int, Tensor]:
    """Return the position that the channels of a weight share, and the factor of each.

    A code of a channel stands for ``2^position / factor``, which is its ``absmax / qmax``.

    Args:
        scales: float32 ``[C_out]``.
        bits: 8 or 16.

    Returns:
        The position half-way between the smallest and the largest one of the channels, and float64
        ``[C_out]``.
    """
    positions = [encode_position(float(scale), bits) for scale in scales]
    shared = round_value((min(positions) + max(positions)) / 2, "half_away")
    return shared, scales.double() * 2.0**shared


def _layers_by_path(recipe: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for key, layer in recipe.get("layers", {}).items():
        if not platform_of(layer["platform"]).layers_only:
            msg = (
                f"`{key}` is quantized for platform {layer['platform']!r}. Calibrate the model for "
                f"platform {PLATFORM!r}."
            )
            raise ConfigError(msg)
        path = key.partition("/")[0].partition("@")[0]
        if path in found:
            msg = (
                f"`{path}` is called more than once ({found[path][0]}, {key}); CATCH has one input "
                "scale for it. Make a copy of the layer for each call."
            )
            raise UnsupportedError(msg)
        found[path] = key, layer
    if not found:
        msg = "the state holds no quantized layer. Calibrate the model first."
        raise ConfigError(msg)
    return found


def _refuse_unknown(
    state: Mapping[str, Any], path: str, key: str, layer: Mapping[str, Any]
) -> None:
    kind = key.split("/")[1]
    reason = None
    if kind not in _KINDS:
        reason = f"CATCH quantizes {', '.join(_KINDS)}"
    elif _join(path, "weight") not in state:
        reason = "its weight is not the parameter `weight` of a module"
    elif layer["granularity"] not in ("tensor", "channel"):
        reason = f"its weight has scales per {layer['granularity']}"
    elif layer["folded"]:
        reason = "a batch norm is folded into it, which CATCH leaves behind it; do not fold"
    elif layer["weight_bits"] != layer["activation_bits"] or layer["weight_bits"] not in (8, 16):
        reason = (
            "CATCH has int8 or int16 for input and weight together, found "
            f"{layer['activation_bits']} and {layer['weight_bits']} bits"
        )
    if reason is not None:
        msg = f"`{key}` has no place in CATCH's state dict: {reason}."
        raise UnsupportedError(msg)


# --- in -----------------------------------------------------------------------------------------


def read_layers(state: Mapping[str, Any]) -> dict[str, CatchLayer]:
    """Return the quantized layers of a CATCH state dict by their path.

    Raises:
        ConfigError: If an entry does not have the form it should have; names it.
    """
    paths = [
        key.rpartition(".")[0]
        for key in state
        if key.rpartition(".")[2] == "quantized_mode" and isinstance(state[key], Tensor)
    ]
    if not paths:
        msg = "it is no state dict of a model quantized by CATCH: it has no `quantized_mode`."
        raise ConfigError(msg)
    return {path: _read_layer(state, path) for path in paths}


def settings_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``modules`` and ``overrides`` with which a model is quantized as in CATCH."""
    layers = {_pattern(path): layer.fields for path, layer in read_layers(state).items()}
    return {"modules": list(layers), "overrides": layers}


def from_catch(state: Mapping[str, Any], like: Mapping[str, Any]) -> StateDict:
    """Return the state dict of a run model from one of CATCH.

    Args:
        state: What CATCH has saved, or what it holds after loading.
        like: The state dict of the model it is for, quantized for platform ``mlu`` with what
            :func:`settings_of` says; ranges need not be known.

    Raises:
        ConfigError: If the two do not belong together; names the layer.
    """
    layers, recipe = read_layers(state), recipe_of(like)
    own = _layers_by_path(recipe)
    _require_same_names(layers, own)
    result = dict(like)
    for key in [key for key in like if not key.startswith(STATE_PREFIX)]:
        result[key] = _entry(state, key, like[key].shape)
    for path, layer in layers.items():
        key, planned = own[path]
        wanted = {name: planned[name] for name in layer.fields}
        if layer.fields != wanted:
            msg = f"`{path}` is {layer.fields} in CATCH's state dict, and {wanted} here."
            raise ConfigError(msg)
        _require_own_scales(path, result[_join(path, "weight")], layer)
        plan = recipe["plans"].get("firstconv") if planned["firstconv"] else None
        here = None if plan is None else FirstConv.parse(dict(plan))
        if layer.firstconv != here:
            msg = f"`{path}` normalizes by {layer.firstconv} in CATCH's state dict, by {here} here."
            raise ConfigError(msg)
        reach = reach_of(layer.input_scale, layer.bits)
        estimator = _estimator(key)
        result[estimator + "range"] = torch.tensor([-reach, reach])
        result[estimator + "batches"] = torch.ones_like(like[estimator + "batches"])
    known = {_join(path, name) for path in layers for name in _NAMES}
    # CATCH fills in zeros for a bias that a layer has not.
    known |= {key for path in layers if _is_zero(state, key := _join(path, "bias"))}
    left = [key for key in state if key not in result and key not in known]
    if left:
        msg = f"CATCH's state dict holds what the model has not: {left[:5]}."
        raise ConfigError(msg)
    return result


def load_catch(
    model: nn.Module,
    state: Mapping[str, Any],
    example_inputs: tuple[Any, ...],
    example_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a float model the run model of a CATCH state dict.

    Args:
        model: A plain model; prepared and quantized in place.
        state: What CATCH has saved.
        example_inputs: Positional inputs of one forward, images normalized.
        example_kwargs: Keyword inputs.

    Returns:
        The model, in the mode it had.

    Raises:
        ConfigError: If they do not belong together. The model is then as it was.
    """
    layers = read_layers(state)
    prepare(model, example_inputs, example_kwargs)
    try:
        quantize(model, QuantConfig(platform=PLATFORM, output_bits=None), **settings_of(state))
        raw = [layer.firstconv for layer in layers.values() if layer.firstconv is not None]
        if len(raw) > 1:
            msg = "CATCH's state dict has more than one layer with an `input_mean`."
            raise ConfigError(msg)
        for firstconv in raw:
            take_raw_images(model, firstconv)
        model.load_state_dict(from_catch(state, model.state_dict()))
    except BaseException:
        strip(model)
        raise
    return model


def _read_layer(state: Mapping[str, Any], path: str) -> CatchLayer:
    mode = int(_entry(state, _join(path, "quantized_mode"), (1,)))
    if mode not in _BITS:
        msg = f"`{_join(path, 'quantized_mode')}` is 1, 2, 3 or 4. Found: {mode}."
        raise ConfigError(msg)
    symmetric = _join(path, "use_symmetry")
    if symmetric in state and int(state[symmetric]) != 1:
        msg = f"`{symmetric}`: CATCH's engine quantizes symmetrically only. Found: 0."
        raise ConfigError(msg)
    weight = _entry(state, _join(path, "weight"))
    channels = weight.shape[0]
    joined = mode > 2
    by_channel = _join(path, "quantized_by_channel")
    per_channel = joined or (by_channel in state and int(state[by_channel]) == 1)
    scale = _entry(state, _join(path, "scale"), (2 + channels,) if joined else (2,))
    if joined:
        weight_scales = scale[2:]
    elif per_channel:
        weight_scales = _entry(state, _join(path, "scale_weight_per_channel"), (channels,))
    else:
        weight_scales = scale[1:]
    scales = torch.cat([scale[:1], weight_scales])
    if not (torch.isfinite(scales) & (scales > 0)).all():
        msg = f"the scales of `{path}` are positive numbers. Found: {scales.tolist()[:5]}."
        raise ConfigError(msg)
    return CatchLayer(
        bits=_BITS[mode],
        input_scale=float(scale[0]),
        weight_scales=weight_scales.float(),
        per_channel=per_channel,
        firstconv=_read_firstconv(state, path),
    )


def _read_firstconv(state: Mapping[str, Any], path: str) -> FirstConv | None:
    names = [_join(path, name) for name in ("input_mean", "input_std")]
    if not any(name in state for name in names):
        return None
    # Written times 255 in float32: the shortest number that gives it is the one that was meant.
    mean, std = (
        [float(f"{float(value) / 255.0:.7g}") for value in _entry(state, name).flatten()]
        for name in names
    )
    return FirstConv(mean, std)


def _require_same_names(layers: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    differing = [f"`{path}` only there" for path in layers if path not in own]
    differing += [f"`{path}` only here" for path in own if path not in layers]
    if differing:
        msg = (
            "CATCH's state dict and the model quantize different layers: "
            f"{', '.join(differing[:5])}. Quantize with what `settings_of` says."
        )
        raise ConfigError(msg)


def _require_own_scales(path: str, weight: Tensor, layer: CatchLayer) -> None:
    """Check that the scales of a weight are those it asks for, which are measured here."""
    rows = weight.flatten(1) if layer.per_channel else weight.reshape(1, -1)
    measured = scale_of(rows.abs().amax(1), layer.bits)
    if not torch.allclose(measured, layer.weight_scales, rtol=_TOLERANCE, atol=0.0):
        msg = (
            f"the weight scales of `{path}` are not those of its weight: found "
            f"{layer.weight_scales.tolist()[:5]}, measured {measured.tolist()[:5]}. They are of "
            "other weights than those beside them."
        )
        raise ConfigError(msg)


def _entry(state: Mapping[str, Any], key: str, shape: tuple[int, ...] | None = None) -> Tensor:
    found = state.get(key)
    if not isinstance(found, Tensor):
        msg = f"CATCH's state dict has no tensor `{key}`."
        raise ConfigError(msg)
    if shape is not None and tuple(found.shape) != tuple(shape):
        msg = f"`{key}` has the shape {tuple(shape)}. Found: {tuple(found.shape)}."
        raise ConfigError(msg)
    return found


def _is_zero(state: Mapping[str, Any], key: str) -> bool:
    return key in state and not _entry(state, key).any()


def _estimator(key: str) -> str:
    return f"{STATE_PREFIX}site.{key.replace('.', ':')}.inputs.0.estimator."


def _pattern(path: str) -> str:
    # The root module has no path, and its calls have keys such as `/linear/0`.
    return path or "/*"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
