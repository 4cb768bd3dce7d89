"""Range limits of the constrained float stage."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_linger as linger
from tests.models import Chain, ResNet, assert_integer_exact, bits_of, images, keys, site_of, train


def _prepared(*layers: nn.Module, x: torch.Tensor) -> nn.Module:
    return linger.prepare(Chain(*layers), (x,))


def _linear() -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(16, 5)
    layer = nn.Linear(5, 4)
    with torch.no_grad():
        layer.weight.mul_(3)
        layer.bias.mul_(3)
    return _prepared(layer, x=x), x


def test_static_limits() -> None:
    model, x = _linear()
    linger.normalize(model, weight=0.5, bias=0.25, output=0.75)
    w, b = model.net[0].weight.clamp(-0.5, 0.5), model.net[0].bias.clamp(-0.25, 0.25)
    expected = F.linear(x, w, b).clamp(-0.75, 0.75)
    assert torch.equal(model(x), expected)
    assert torch.equal(model.eval()(x), expected)
    assert (model.net[0].weight.abs() > 0.5).any()  # the parameter itself is left alone


def test_mean_limits() -> None:
    model, x = _linear()
    linger.normalize(model, weight="1.2*mean", bias="1.1*mean", output=None)
    w, b = model.net[0].weight, model.net[0].bias
    w_bound, b_bound = w.abs().mean() * 1.2, b.abs().mean() * 1.1
    assert w.abs().max() > w_bound
    expected = F.linear(x, w.clamp(-w_bound, w_bound), b.clamp(-b_bound, b_bound))
    torch.testing.assert_close(model(x), expected)


def test_percentile_limits() -> None:
    model, x = _linear()
    linger.normalize(model, weight="50%", bias=None, output=None)
    bound = model.net[0].weight.abs().flatten().kthvalue(10).values
    expected = F.linear(x, model.net[0].weight.clamp(-bound, bound), model.net[0].bias)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(("spec", "factor"), [("1.5*mean", 1.5), ("80%", None)])
def test_a_dynamic_output_limit_averages_in_training_and_then_stays(
    spec: str, factor: float | None
) -> None:
    model, x = _linear()
    linger.normalize(model, weight=None, bias=None, output=spec)
    raw = F.linear(x, model.net[0].weight, model.net[0].bias).detach()

    def bound(y: torch.Tensor) -> torch.Tensor:
        if factor is not None:
            return y.abs().mean() * factor
        return y.abs().flatten().kthvalue(round(y.numel() * 0.8)).values

    first = bound(raw)
    torch.testing.assert_close(model(x), raw.clamp(-first, first))
    double = F.linear(x * 2, model.net[0].weight, model.net[0].bias).detach()
    moved = first + 0.1 * (bound(double) - first)
    torch.testing.assert_close(model(x * 2), double.clamp(-moved, moved))
    model.eval()
    for _ in range(2):
        torch.testing.assert_close(model(x * 2), double.clamp(-moved, moved))


def test_a_dynamic_output_limit_that_saw_nothing_does_nothing() -> None:
    model, x = _linear()
    linger.normalize(model, weight=None, bias=None, output="1*mean")
    expected = F.linear(x, model.net[0].weight, model.net[0].bias)
    assert torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize("gradient", ["zero", "pull"])
def test_gradients(gradient: str) -> None:
    model, x = _linear()
    linger.normalize(model, weight=0.5, bias=None, output=None, gradient=gradient)
    model(x).sum().backward()
    weight = model.net[0].weight
    outside = weight.detach().abs() > 0.5
    expected = x.sum(0).expand(4, 5).clone()
    pull = 0.01 * weight.detach().sign()
    expected[outside] = pull[outside] if gradient == "pull" else 0.0
    torch.testing.assert_close(weight.grad, expected)


def test_overrides_and_marks() -> None:
    model = linger.prepare(ResNet(), (images(),))
    linger.disable_normalize(model.layers[0])
    linger.normalize_module(model.stem, weight=1.0)
    linger.normalize(
        model,
        weight=2.0,
        bias=None,
        output=None,
        overrides={"fc": {"weight": 3.0, "output": "9*mean"}, "layers.1.conv2": None},
    )

    def weight(key: str) -> object:
        limits = site_of(model, key).limits
        return limits and limits.weight and limits.weight.value

    assert weight("stem/conv2d/0") == 1.0
    assert weight("layers.0.conv1/conv2d/0") is None
    assert weight("layers.1.conv1/conv2d/0") == 2.0
    assert weight("layers.1.conv2/conv2d/0") is None
    assert weight("fc/linear/0") == 3.0
    assert site_of(model, "fc/linear/0").limits.output == linger.Limit("mean", 9.0)
    assert site_of(model, "layers.0/add/0").limits is None


def test_types_and_modules() -> None:
    model = linger.prepare(ResNet(), (images(),))
    linger.normalize(model, types=[nn.Linear])
    assert [key for key in keys(model) if site_of(model, key).limits] == ["fc/linear/0"]
    linger.normalize(model, modules=["stem"])
    assert [key for key in keys(model) if site_of(model, key).limits] == ["stem/conv2d/0"]


@pytest.mark.parametrize("gradient", ["zero", "pull"])
def test_training_and_evaluation_are_one_function(gradient: str) -> None:
    x = torch.randn(8, 3, 6, 6)
    model = _prepared(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), x=x)
    linger.normalize(model, 0.1, 0.05, 0.3, gradient)
    assert torch.equal(model(x), model.eval()(x))


def test_limits_act_on_folded_weights() -> None:
    x = torch.randn(8, 3, 6, 6)
    model = _prepared(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), x=x)
    with torch.no_grad():
        model.net[1].weight.copy_(torch.tensor([0.1, 1.0, 10.0, -10.0]))
        model.net[1].running_var.fill_(4.0)
        model.net[1].running_mean.normal_()
    linger.fuse_bn(model)
    linger.normalize(model, weight=0.2, bias=0.1, output=None)
    conv, bn = model.net
    factor = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
    weight = (conv.weight * factor.view(-1, 1, 1, 1)).clamp(-0.2, 0.2)
    bias = (bn.bias + (conv.bias - bn.running_mean) * factor).clamp(-0.1, 0.1)
    torch.testing.assert_close(model.eval()(x), F.conv2d(x, weight, bias))


def test_limits_on_a_batch_norm_of_its_own() -> None:
    x = torch.randn(8, 3, 6, 6) * 3
    model = _prepared(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), x=x)
    with torch.no_grad():
        model.net[0].weight.fill_(5.0)
    linger.normalize(model, weight=0.5, bias=None, output=1.0, types=["batch_norm"])
    assert torch.equal(
        model.eval()(x), F.conv2d((x * 0.5).clamp(-1, 1), model.net[1].weight, model.net[1].bias)
    )


def test_limits_stay_on_under_quantization() -> None:
    x = torch.randn(8, 3, 6, 6)
    model = _prepared(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), x=x)
    linger.normalize(model, weight=0.125, bias=0.125, output=0.25)
    linger.quantize(model)
    train(model, (x,), 3, 0.0)
    model.eval()
    first = site_of(model, "net.0/conv2d/0")
    assert first.output.step() == 2.0**-9  # a range of 0.25 in eight bits
    y = model.net[0](x)
    codes = bits_of(y, 2.0**-9)
    assert codes.max() == 127
    assert codes.min() == -128
    prepared = first.prepared["weights"]
    assert prepared.codes.abs().max() * prepared.steps[0] <= 0.125
    assert (model.net[0].weight.abs() > 0.125).any()
    assert_integer_exact(model, x)


def test_a_dynamic_limit_under_quantization_is_exact() -> None:
    x = images()
    model = linger.prepare(ResNet(), (x,))
    linger.quantize(linger.normalize(linger.fuse_bn(model), "3*mean", "95%", "90%"))
    train(model, (x,), 4, 0.05)
    assert_integer_exact(model.eval(), x)


def test_no_limit_at_all_changes_no_bit() -> None:
    model, x = _linear()
    expected = model(x)
    linger.normalize(model, weight=None, bias=None, output=None)
    assert torch.equal(model(x), expected)


def test_wide_limits_change_no_bit() -> None:
    x = images()
    model = linger.prepare(ResNet(), (x,)).eval()
    expected = model(x)
    linger.normalize(model, weight=100.0, bias=100.0, output=1000.0, types=["conv2d", "linear"])
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("output_bits", [8, 16, 32, None])
@pytest.mark.parametrize("output", [0.5, "1.5*mean"], ids=str)
def test_a_limited_output_of_any_width_is_exact(
    output: float | str, output_bits: int | None
) -> None:
    model, x = _linear()
    linger.normalize(model, weight=None, bias=None, output=output)
    linger.quantize(model, linger.QuantConfig(output_bits=output_bits))
    train(model, (x,), 2, 0.0)
    model.eval()
    assert_integer_exact(model, x)
    # A quantizer's limit cuts its range. Where the accumulator's step is coarser than 16 bits of
    # that range, as here, the codes reach beyond it.
    if output == 0.5 and output_bits != 16:
        assert model(x).abs().max() <= 0.5
