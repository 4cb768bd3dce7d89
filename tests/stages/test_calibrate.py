"""Calibration: ranges from data, and nothing else."""

import pytest
import torch
from torch import nn

import lightning_linger as linger
from tests.models import (
    Chain,
    Lambda,
    ResNet,
    assert_integer_exact,
    float_state,
    images,
    site_of,
)


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: m.training for name, m in model.named_modules() if "_linger" not in name}


@pytest.mark.parametrize("training", [True, False])
def test_only_ranges_move(training: bool) -> None:
    x = images()
    model = linger.prepare(ResNet(dropout=0.5), (x,)).train(training)
    model.layers[0].eval()
    before = {key: value.clone() for key, value in float_state(model).items()}
    modes = _modes(model)
    assert linger.calibrate(model, [x, x * 2]) is model
    after = float_state(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert _modes(model) == modes
    assert_integer_exact(model.eval(), x)


def test_ranges_are_those_of_the_evaluation_model() -> None:
    x = torch.randn(64, 5)
    model = linger.prepare(Chain(nn.Dropout(0.5), nn.Linear(5, 4)), (x,))
    linger.calibrate(model, [x], linger.QuantConfig(range="absmax"))
    estimator = site_of(model, "net.1/linear/0").inputs["0"].estimator
    assert estimator.absmax() == x.abs().max()


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "mapping"])
def test_batches(kind: str) -> None:
    x = torch.randn(4, 5)
    model = Lambda(lambda self, x: self.fc(x), fc=nn.Linear(5, 4))
    linger.prepare(model, (x,))
    batch = {
        "tensor": x,
        "tuple": (x, torch.zeros(4)),
        "list": [x, torch.zeros(4)],
        "mapping": {"x": x},
    }
    linger.calibrate(model, [batch[kind]])
    assert_integer_exact(model.eval(), x)


def test_a_quantized_model_keeps_its_configuration() -> None:
    x = torch.randn(4, 5)
    model = linger.prepare(Chain(nn.Linear(5, 4)), (x,))
    linger.quantize(model, linger.QuantConfig(weight_bits=4))
    linger.calibrate(model, (batch for batch in [x, x * 3]))
    site = site_of(model, "net.0/linear/0")
    assert site.weights.bits == 4
    assert site.output.estimator.batches == 2


def test_frozen_ranges_are_not_calibrated() -> None:
    """Nothing would move, which is not what the caller believes; new quantizers are not frozen."""
    x = torch.randn(4, 5)
    model = linger.prepare(Chain(nn.Linear(5, 4), nn.Linear(4, 3)), (x,))
    linger.calibrate(model, [x])
    linger.freeze_ranges(model)
    with pytest.raises(linger.ConfigError, match=r"are frozen.*freeze_ranges\(model, frozen=False"):
        linger.calibrate(model, [x * 9])
    linger.freeze_ranges(model, frozen=False, parts=["activations"], modules=["net.1"])
    linger.calibrate(model, [x * 9])
    counts = [site_of(model, f"net.{i}/linear/0").output.estimator.batches.item() for i in (0, 1)]
    assert counts == [1, 2]
    linger.freeze_ranges(model)
    linger.quantize(model, linger.QuantConfig(weight_bits=6))
    linger.calibrate(model, [x * 9])
    assert_integer_exact(model.eval(), x)


def test_an_empty_loader() -> None:
    model = linger.prepare(ResNet(), (images(),))
    with pytest.raises(linger.ConfigError, match="no batch"):
        linger.calibrate(model, [])


def test_poisoned_batches_are_refused() -> None:
    model = linger.prepare(ResNet(), (images(),))
    with pytest.raises(linger.NonFiniteError):
        linger.calibrate(model, [images() * float("nan")])


def test_a_plain_model_is_prepared_with_the_first_batch() -> None:
    x = images()
    model = ResNet()
    twin = linger.prepare(ResNet(), (x,))
    twin.load_state_dict(model.state_dict(), strict=False)
    assert linger.calibrate(model, iter([x, x * 2])) is model
    linger.calibrate(twin, [x, x * 2])
    assert torch.equal(model.eval()(x), twin.eval()(x))
    assert_integer_exact(model, x)


def test_a_plain_model_stays_plain_after_an_error() -> None:
    model = ResNet()
    hooks = len(model._forward_hooks)
    with pytest.raises(linger.ConfigError, match="'stm' matches no module"):
        linger.calibrate(model, [images()], overrides={"stm": None})
    assert not hasattr(model, "_linger")
    assert len(model._forward_hooks) == hooks


def test_calibrating_a_folded_model_reaches_the_float_accuracy() -> None:
    x = images(16)
    model = ResNet()
    for _ in range(5):
        model(x)
    linger.prepare(model.eval(), (x,))
    expected = model(x)
    linger.fuse_bn(model)
    linger.calibrate(
        model, [x], linger.QuantConfig(weight_bits=12, activation_bits=12, output_bits=12)
    )
    assert (model(x) - expected).abs().max() < 0.02 * expected.abs().max()
    assert_integer_exact(model, x)
