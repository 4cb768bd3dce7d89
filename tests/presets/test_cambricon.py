"""Cambricon's scheme under its own names, and what of it is refused."""

from typing import Any

import pytest
import torch
from torch import nn

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig
from lightning_linger.presets import calibration_of
from tests.models import site_of
from tests.stages.test_mlu import WIDE, OwnConv, data, net, own_layers, run

DEFAULT = QuantConfig("mlu", output_bits=None, range="minmax", granularity="tensor")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, {}, id="row34-int8"),
        pytest.param({"dtype": "int16"}, WIDE, id="row34-int16"),
        pytest.param({"use_avg": True}, {"range": "mean_minmax"}, id="row35-use-avg"),
        pytest.param({"use_avg": "catch"}, {"range": "catch_minmax"}, id="row35-compatible"),
        pytest.param({"data_scale": 1.25}, {"data_scale": 1.25}, id="row36-data-scale"),
        pytest.param({"per_channel": True}, {"granularity": "channel"}, id="row38-per-channel"),
        pytest.param({"method": "minmax"}, {}, id="row39-method"),
        pytest.param({"scale": "power_of_two"}, {"scale": "power_of_two"}, id="row48-position"),
    ],
)
def test_the_preset(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert linger.preset("cambricon", **fields) == DEFAULT.override(expected)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dtype": "int4"}, r"`dtype` must be one of \('int8', 'int16'\). Found: 'int4'"),
        ({"dtype": 8}, "`dtype`"),
        ({"method": "kl"}, r"`method` must be one of \('minmax',\). Found: 'kl'"),
        ({"use_avg": 1}, "`use_avg`"),
        ({"per_channel": "yes"}, "`per_channel`"),
        ({"data_scale": 0}, "`data_scale`"),
        ({"use_ave": True}, "no field 'use_ave'"),
        ({"asymettry": True}, "no field 'asymettry'"),
    ],
)
def test_row39_wrong_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        linger.preset("cambricon", **fields)


# --- the arguments of quantize_dynamic_mlu ------------------------------------------------------


def test_row39_dtype_counts_without_a_spec() -> None:
    arguments = calibration_of(dtype="int16")
    assert arguments["config"] == DEFAULT.override(WIDE)
    assert {name: value for name, value in arguments.items() if name != "config"} == {
        "batches": None,
        "firstconv": None,
        "overrides": None,
        "types": None,
    }


def test_every_key() -> None:
    arguments = calibration_of(
        {
            "iteration": 2,
            "use_avg": True,
            "data_scale": 1.5,
            "firstconv": True,
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.3, 0.4],
            "per_channel": True,
            "method": "minmax",
        },
        mixed_layer={"late, fc": "int16"},
    )
    assert arguments == {
        "config": DEFAULT.override(
            {"range": "mean_minmax", "data_scale": 1.5, "granularity": "channel"}
        ),
        "batches": 2,
        "firstconv": linger.FirstConv([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]),
        "overrides": {"late": WIDE, "fc": WIDE},
        "types": None,
    }
    model = linger.calibrate(net(), data(), **arguments)
    widths = [site_of(model, key).weights.bits for key in ("early/conv2d/0", "fc/linear/0")]
    assert widths == [8, 16]
    run(model, torch.zeros(1, 3, 9, 9, dtype=torch.uint8))


def test_row34_layers_that_are_left_in_float() -> None:
    model = linger.calibrate(net(), data(), **calibration_of(mixed_layer={"fc": "float16"}))
    (row,) = linger.skipped_layers(model)
    assert (row.layer, row.chosen) == ("fc/linear/0", True)


@pytest.mark.parametrize(
    "mapping", [{OwnConv: "MLUConv2d"}, [OwnConv], ["OwnConv"]], ids=["dict", "list", "names"]
)
def test_row42_a_mapping(mapping: Any) -> None:
    model = linger.calibrate(own_layers(), data(1), **calibration_of(mapping=mapping))
    assert [row.system for row in linger.summary(model)] == ["float", "fake", "float"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"qconfig_spec": {"use_ave": True}}, "no key 'use_ave'. Similar: 'use_avg'"),
        ({"qconfig_spec": {1: True}}, "no key 1"),
        ({"qconfig_spec": [("use_avg", True)]}, "`qconfig_spec` is a dictionary"),
        ({"qconfig_spec": nn.Linear}, "`qconfig_spec` is a dictionary"),
        ({"qconfig_spec": {"firstconv": 1}}, "`firstconv` must be one of"),
        ({"qconfig_spec": {"firstconv": True}}, "mean is a list of numbers. Found: None"),
        ({"qconfig_spec": {"firstconv": True, "mean": [0.5]}}, "std is a list of numbers"),
        ({"qconfig_spec": {"mean": [0.5]}}, "`mean` and `std` are for `firstconv`"),
        ({"qconfig_spec": {"method": "kl"}}, "`method`"),
        ({"qconfig_spec": {"dtype": "int8"}}, "no key 'dtype'"),
        ({"dtype": "qint8"}, "`dtype`"),
        ({"mapping": 3}, "`mapping` is a list of types"),
        ({"mapping": "Conv2d"}, "`mapping` is a list of types"),
        ({"mixed_layer": ["fc"]}, "`mixed_layer` is a dictionary"),
        ({"mixed_layer": {"fc": "int4"}}, "`mixed_layer` must be one of .*'float16'"),
    ],
)
def test_row39_row40_wrong_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        calibration_of(**arguments)


@pytest.mark.parametrize("iteration", [0, -1, "2"])
def test_row39_iteration_is_checked_by_calibrate(iteration: Any) -> None:
    with pytest.raises(ConfigError, match="`batches` must be a positive integer"):
        linger.calibrate(net(), data(1), **calibration_of({"iteration": iteration}))
