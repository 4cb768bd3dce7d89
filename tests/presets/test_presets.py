"""Presets are configurations of a few lines, and train what their source trains."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig
from lightning_linger.callbacks import QuantizeCallback
from lightning_linger.presets import PRESETS
from lightning_linger.presets.nics_fix import STATISTICS, RangeMethod
from tests.models import Chain, assert_integer_exact, site_of

SCREEN = 80


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_readable_in_one_screen(name: str) -> None:
    module = inspect.getmodule(PRESETS[name])
    assert module is not None
    assert len(inspect.getsource(module).splitlines()) <= SCREEN


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, QuantConfig(scale="power_of_two")),
        (
            {"data_bits": 16, "parameter_bits": 4, "out_bits": None, "platform": "arcs"},
            QuantConfig(
                "arcs", weight_bits=4, activation_bits=16, output_bits=None, scale="power_of_two"
            ),
        ),
        (
            {"mode": "MaxValue"},
            QuantConfig("onnxruntime", scale="free", granularity="tensor"),
        ),
    ],
    ids=["QValue", "QValue-bits", "MaxValue"],
)
def test_linger_fields(arguments: dict[str, Any], expected: QuantConfig) -> None:
    assert linger.preset("linger", **arguments) == expected


@pytest.mark.parametrize("mode", ["QValue", "MaxValue"])
def test_the_scale_of_a_mode(mode: str) -> None:
    model = Chain(nn.Linear(4, 3))
    x = torch.tensor([[0.7, -3.3, 0.1, 0.0], [0.5, 0.2, 0.3, 0.1]])
    linger.prepare(model, (x,))
    linger.quantize(model, linger.preset("linger", mode=mode))
    model(x)
    step = float(site_of(model, "net.0/linear/0").inputs["0"].step())
    assert step == (2.0**-5 if mode == "QValue" else float(torch.tensor(3.3) / 127))


def test_layers_have_settings_of_their_own_and_switches_per_op() -> None:
    model = Chain(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.Tanh())
    x = torch.randn(8, 4)
    linger.prepare(model, (x,))
    linger.quantize(
        model,
        linger.preset("linger"),
        overrides={
            "net.0": {"weight_bits": 4},
            "net.2": {"output_bits": None},
            "type:sigmoid": None,
        },
    )
    model(x)
    widths = {s.node.owner: s.weights.bits for s in model._linger.sites if s.has_parameters}
    assert widths == {"net.0": 4, "net.2": 8}
    assert site_of(model, "net.1/sigmoid/0").config is None
    assert site_of(model, "net.2/linear/0").output is None
    model.eval()
    assert_integer_exact(model, x)


def test_row01_four_range_methods_by_number() -> None:
    assert [(method.name, int(method)) for method in RangeMethod] == [
        ("RANGE_MAX", 0),
        ("RANGE_3SIGMA", 1),
        ("RANGE_MAX_TENPERCENT", 2),
        ("RANGE_SWEEP", 3),
    ]
    assert set(STATISTICS) == set(RangeMethod)


@pytest.mark.parametrize(
    ("method", "expected"),
    [(0, 4.0), (1, 4.0), (2, 1.0), (3, 4.0)],
    ids=["max", "3sigma", "tenpercent", "sweep"],
)
def test_row04_a_range_method_acts_on_activations_and_weights(method: int, expected: float) -> None:
    values = torch.cat([torch.full((90,), 0.2), torch.linspace(0.6, 4.0, 10)])
    model = Chain(nn.Linear(100, 1, bias=False))
    linger.prepare(model, (values[None],))
    linger.quantize(model, linger.preset("nics_fix", range_method=method))
    with torch.no_grad():
        model.net[0].weight.copy_(values[None])
    model(values[None])
    found = site_of(model, "net.0/linear/0")
    assert float(found.inputs["0"].step()) * 128 == expected
    reach = float(found.weights.reach(values[None])[0])
    assert found.weights.grid is not None
    assert found.weights.grid.step_value(reach) * 128 == expected


@pytest.mark.parametrize("method", RangeMethod)
def test_row18_a_range_method_acts_on_gradients(method: RangeMethod) -> None:
    """With a closed grid the vectors of NICS-fix are reproduced to the last code."""
    values = torch.cat([torch.full((90,), 0.2), torch.linspace(0.6, 4.0, 10)])
    config = linger.preset("nics_fix", range_method=int(method), gradient_bits=8, range=1.0)
    assert config.gradient_range == f"last_{STATISTICS[method]}"
    model = Chain(nn.Linear(1, 100, bias=False))
    linger.prepare(model, (torch.ones(1, 1),))
    linger.quantize(model, config, overrides={"net.0": {"output_bits": None}})
    model(torch.full((1, 1), 0.5)).backward(values[None] * 2)
    top = 1.0 if method == RangeMethod.RANGE_MAX_TENPERCENT else 4.0
    assert model.net[0].weight.grad.max() == top


def test_nics_fix_fields() -> None:
    config = linger.preset("nics_fix", bitwidth=4, stochastic=True, gradient_bits=16)
    assert config == QuantConfig(
        weight_bits=4,
        activation_bits=4,
        output_bits=4,
        range="last_absmax",
        weight_range="absmax",
        gradient_bits=16,
        gradient_range="last_absmax",
        rounding="stochastic",
        ahead_conv_relu=False,
        ahead_bn_relu=False,
        ahead_linear_relu=False,
    )
    free = linger.preset("nics_fix", float_scale=True)
    assert (free.platform, free.granularity) == ("onnxruntime", "tensor")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("nics", {}, "unknown preset 'nics'.*Similar: 'nics_fix'"),
        ("linger", {"mode": "QMax"}, "`mode` must be one of.*QValue.*Found: 'QMax'"),
        ("linger", {"weight_bit": 4}, "no field 'weight_bit'. Similar: 'weight_bits'"),
        ("tflite", {"int16_activations": "yes"}, "`int16_activations` is True or False"),
        ("tflite", {"variant": "xnnpack"}, "`variant` must be one of.*Found: 'xnnpack'"),
        ("nics_fix", {"range_method": 4}, "`range_method` must be one of.*Found: 4"),
        ("nics_fix", {"range_method": True}, "`range_method` must be one of.*Found: True"),
        ("nics_fix", {"bitwidth": 1}, "`bitwidth` must be an integer from 2 to 16. Found: 1"),
        ("nics_fix", {"bitwidth": 17}, "`bitwidth` must be an integer from 2 to 16. Found: 17"),
        ("nics_fix", {"float_scale": "no"}, "`float_scale` must be True or False. Found: 'no'"),
        ("nics_fix", {"stochastic": 1}, "`stochastic` must be True or False. Found: 1"),
    ],
)
def test_wrong_presets(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        linger.preset(name, **fields)


def test_a_callback_takes_a_preset() -> None:
    assert QuantizeCallback(preset="nics_fix").config == linger.preset("nics_fix")
    callback = QuantizeCallback(at_epoch=2, preset={"name": "linger", "parameter_bits": 4})
    assert callback.config == linger.preset("linger", parameter_bits=4)
    with pytest.raises(ConfigError, match=r"in the place of \['weight_bits'\].*'weight_bits': 4"):
        QuantizeCallback(weight_bits=4, preset="linger")
    with pytest.raises(ConfigError, match="a mapping with a `name`"):
        QuantizeCallback(preset={"bitwidth": 4})
