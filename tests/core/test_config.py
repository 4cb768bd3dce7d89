"""Configurations: wrong values and wrong names are errors that say what is allowed."""

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from torch import nn

import lightning_linger as linger
from lightning_linger import ConfigError, FuseConfig, NormalizeConfig, QuantConfig
from tests.models import ResNet, images, keys, site_of

BAD_BITS = [1, 0, -8, 33, 8.5, 8.0, True, "8", [8]]


@pytest.mark.parametrize("field", ["weight_bits", "activation_bits", "output_bits", "bias_bits"])
@pytest.mark.parametrize("bits", BAD_BITS, ids=repr)
def test_bits(field: str, bits: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{field}` must be an integer from") as caught:
        QuantConfig(**{field: bits})
    assert repr(bits) in str(caught.value)


@pytest.mark.parametrize("field", ["weight_bits", "activation_bits"])
def test_operands_have_at_most_16_bits(field: str) -> None:
    QuantConfig(**{field: 16})
    with pytest.raises(ConfigError, match="from 2 to 16"):
        QuantConfig(**{field: 17})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("scale", "log2"), ("granularity", "group"), ("rounding", "nearest"), ("range", "log")),
        *(("range", 0.0), ("range", -1.0), ("range", math.nan), ("range", math.inf)),
        *(("range", True), ("range", None), ("range", [8.0])),
    ],
)
def test_choices(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{field}`"):
        QuantConfig(**{field: value})


@pytest.mark.parametrize("field", ["weight", "bias", "output"])
@pytest.mark.parametrize("value", [0, -8.0, "8*median", "200%"])
def test_limits(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="limit"):
        NormalizeConfig(**{field: value})


def test_limit_gradient_and_fuse_mode() -> None:
    with pytest.raises(ConfigError, match="`gradient`"):
        NormalizeConfig(gradient="clip")
    with pytest.raises(ConfigError, match="`mode`"):
        FuseConfig("eval")


def test_configs_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        QuantConfig().weight_bits = 4


def test_every_config_error_is_a_value_error_of_the_library() -> None:
    assert issubclass(ConfigError, linger.LingerError)
    assert issubclass(ConfigError, ValueError)


def test_override_names_near_matches() -> None:
    with pytest.raises(ConfigError, match=r"no field 'weight_bit'.*'weight_bits'"):
        QuantConfig().override({"weight_bit": 4})
    with pytest.raises(ConfigError, match=r"no field 'outputs'.*'output'"):
        NormalizeConfig().override({"outputs": 4})
    assert QuantConfig().override({"weight_bits": 4}).weight_bits == 4


@pytest.fixture
def model() -> nn.Module:
    return linger.prepare(ResNet(), (images(),))


def test_unknown_platform_names_the_known_ones(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"'venusb'.*Allowed.*'venusa'"):
        linger.quantize(model, QuantConfig(platform="venusb"))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"overrides": {"fcc": None}}, r"'fcc' matches no module.*'fc'"),
        ({"modules": ["layer.*"]}, r"'layer\.\*' matches no module.*'layers"),
        ({"overrides": {"type:Linnear": None}}, r"type:Linnear.*'Linear'"),
        ({"types": ["conv_2d"]}, r"conv_2d.*'conv2d'"),
        ({"overrides": {"fc": {"weight_bit": 4}}}, r"'weight_bit'.*'weight_bits'"),
        ({"overrides": {"fc": {"weight_bits": 40}}}, r"`weight_bits`.*40"),
        ({"overrides": {"fc": {"platform": "venusx"}}}, r"venusx.*'venusa'"),
    ],
)
def test_selection_errors(model: nn.Module, selection: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        linger.quantize(model, **selection)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"overrides": {"fcc": None}}, r"'fcc' matches no module.*'fc'"),
        ({"overrides": {"fc": {"weights": 4}}}, r"'weights'.*'weight'"),
        ({"types": ["Conv22d"]}, r"Conv22d.*'Conv2d'"),
    ],
)
def test_normalize_selection_errors(
    model: nn.Module, selection: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        linger.normalize(model, **selection)


def test_fuse_selection_errors(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"'stemm' matches no layer.*'stem'"):
        linger.fuse_bn(model, modules=["stemm"])


def _bits(model: nn.Module, key: str) -> int | None:
    site = site_of(model, key)
    return site.config.weight_bits if site.config else None


def test_a_name_beats_a_mark_beats_a_type_beats_the_global_fields(model: nn.Module) -> None:
    linger.quant_module(model.fc, weight_bits=5)
    linger.quant_module(model.layers, weight_bits=6)
    linger.quantize(
        model,
        QuantConfig(weight_bits=7),
        overrides={
            "type:Conv2d": {"weight_bits": 4},
            "layers.0.conv1": {"weight_bits": 3},
            "type:Linear": {"weight_bits": 2},
        },
    )
    assert _bits(model, "layers.0.conv1/conv2d/0") == 3  # its name
    assert _bits(model, "layers.0.conv2/conv2d/0") == 6  # a mark on an ancestor
    assert _bits(model, "fc/linear/0") == 5  # a mark
    assert _bits(model, "stem/conv2d/0") == 4  # its type
    assert _bits(model, "bn/batch_norm/0") == 7  # nothing special


def test_the_longest_name_wins(model: nn.Module) -> None:
    linger.quantize(
        model,
        overrides={"layers.*": None, "layers.0.conv1": {"weight_bits": 3}},
    )
    assert _bits(model, "layers.0.conv1/conv2d/0") == 3
    assert _bits(model, "layers.0.conv2/conv2d/0") is None
    assert _bits(model, "stem/conv2d/0") == 8


def test_a_nearer_mark_beats_a_farther_one(model: nn.Module) -> None:
    linger.disable_quant(model.layers)
    linger.quant_module(model.layers[1], weight_bits=4)
    linger.quantize(model)
    assert _bits(model, "layers.0.conv1/conv2d/0") is None
    assert _bits(model, "layers.1.conv1/conv2d/0") == 4
    assert site_of(model, "layers.0.conv1/conv2d/0").why_float == "marked on the module"


@pytest.mark.parametrize(
    ("types", "chosen"),
    [
        ([nn.Linear], {"fc/linear/0"}),
        (["Linear"], {"fc/linear/0"}),
        (["linear"], {"fc/linear/0"}),
        ([nn.Linear, "add"], {"fc/linear/0"}),  # an addition of floats stays float
    ],
    ids=["class", "class-name", "op", "several"],
)
def test_types(model: nn.Module, types: list[Any], chosen: set[str]) -> None:
    linger.quantize(model, types=types)
    assert {key for key in keys(model) if site_of(model, key).quantized} == chosen


def test_modules(model: nn.Module) -> None:
    linger.quantize(model, modules=["layers.1"])
    chosen = {key for key in keys(model) if site_of(model, key).quantized}
    assert chosen
    assert all(key.startswith("layers.1") for key in chosen)


def test_choosing_nothing_is_an_error(model: nn.Module) -> None:
    with pytest.raises(linger.UnsupportedError, match="no site of ResNet would be quantized"):
        linger.quantize(model, overrides={"*": None})


@pytest.mark.parametrize(
    "call", [linger.quantize, linger.normalize, linger.fuse_bn], ids=lambda f: f.__name__
)
def test_stages_need_a_prepared_model(call: Any) -> None:
    with pytest.raises(linger.NotReadyError, match=r"ResNet is not prepared.*linger\.prepare"):
        call(ResNet())


def test_a_shifting_platform_refuses_free_scales(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"stem.*venusa.*power_of_two"):
        linger.quantize(model, QuantConfig(scale="free"))


def test_output_bits_between_16_and_32(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"`stem/conv2d/0`: output_bits above 16 must be 32"):
        linger.quantize(model, QuantConfig(output_bits=24))
