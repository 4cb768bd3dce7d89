"""Discovery: what `prepare` refuses, and that it leaves no trace."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from tests.models import Chain, Lambda, ResNet, images, keys


def _state(model: nn.Module) -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        [m.training for name, m in model.named_modules() if not name.startswith("_linger")],
        {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("_linger")},
    ]


class Stateful(nn.Module):
    """Draws random numbers of every kind and writes into buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet(dropout=0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("memory", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.memory.add_(torch.rand(3))
        shift = random.random() + float(np.random.rand())
        return self.net(x + shift)


@pytest.mark.parametrize("training", [True, False])
def test_no_trace(training: bool) -> None:
    model = Stateful().train(training)
    model.net.layers[0].eval()
    model.net.layers[1].bn1.requires_grad_(False)
    x = images()
    before = _state(model)
    linger.prepare(model, (x,))
    after = _state(model)
    for a, b in zip(before[:4], after[:4], strict=True):
        assert a == b
    assert list(before[4]) == list(after[4])
    assert all(torch.equal(before[4][key], after[4][key]) for key in before[4])
    assert model.memory.abs().sum() == 0
    assert all(p.grad is None for p in model.parameters())
    assert not torch.overrides._get_current_function_mode_stack()
    assert not model.net.layers[1].bn1.weight.requires_grad


def test_no_result_changes() -> None:
    model = ResNet().eval()
    x = images()
    expected = model(x)
    linger.prepare(model, (x,))
    assert torch.equal(model(x), expected)


def test_hooks_of_the_user_are_called_and_survive() -> None:
    model = ResNet()
    calls: list[str] = []
    model.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    model.fc.register_forward_hook(lambda m, a, o: calls.append("fc"))
    model.fc.register_forward_hook(lambda m, a, o: o * 0.0)
    model.stem.register_full_backward_hook(lambda m, i, o: calls.append("backward"))
    x = images()
    linger.prepare(model, (x,))
    model.register_forward_hook(lambda m, a, o: calls.append("post"))
    linger.quantize(model)
    calls.clear()
    y = model(x)
    assert not y.any()
    y.sum().backward()
    assert calls == ["pre", "fc", "post", "backward"]
    linger.strip(model)
    calls.clear()
    assert not model(x).any()
    assert calls == ["pre", "fc", "post"]


def test_a_bare_tensor_is_refused() -> None:
    with pytest.raises(linger.ConfigError, match=r"tuple.*Tensor.*\(x,\)"):
        linger.prepare(ResNet(), images())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poisoned_examples_are_refused(value: float) -> None:
    x = images()
    x[0, 0, 0, 0] = value
    with pytest.raises(linger.NonFiniteError, match="NaN or infinity"):
        linger.prepare(ResNet(), (x,))


def test_empty_examples_are_refused() -> None:
    with pytest.raises(linger.ConfigError, match="empty"):
        linger.prepare(ResNet(), (images(0),))


def test_preparing_twice_is_refused() -> None:
    model = linger.prepare(ResNet(), (images(),))
    with pytest.raises(linger.ConfigError, match=r"prepared already.*linger\.strip"):
        linger.prepare(model, (images(),))
    linger.prepare(linger.strip(model), (images(),))


def test_a_model_without_sites_is_refused_and_left_clean() -> None:
    model = Chain(nn.Flatten(), nn.Identity())
    with pytest.raises(linger.UnsupportedError, match="Chain calls no op that can be quantized"):
        linger.prepare(model, (torch.randn(2, 3),))
    assert not model._forward_hooks
    assert not model.net._forward_pre_hooks
    assert not hasattr(model, "_linger")


def test_a_failing_forward_leaves_the_model_clean() -> None:
    model = ResNet(dropout=0.5).eval()
    x = torch.randn(2, 7, 12, 12)
    before = _state(model)
    with pytest.raises(RuntimeError):
        linger.prepare(model, (x,))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not hasattr(model, "_linger")
    assert not torch.overrides._get_current_function_mode_stack()
    assert _state(model)[:4] == before[:4]


def test_one_sample_is_enough_for_batch_norms() -> None:
    model = linger.prepare(Chain(nn.Linear(3, 4), nn.BatchNorm1d(4)), (torch.randn(1, 3),))
    assert len(keys(model)) == 2


def test_models_in_double_and_without_parameters() -> None:
    model = linger.prepare(ResNet().double(), (images().double(),))
    assert len(keys(model)) == 20
    model = linger.prepare(
        Lambda(lambda self, x, w: torch.conv2d(x, w)), (images(), torch.rand(2, 3, 1, 1))
    )
    assert keys(model) == ["/conv2d/0"]


def test_discovery_under_inference_mode_and_no_grad() -> None:
    with torch.no_grad():
        model = linger.prepare(ResNet(), (images(),))
    linger.quantize(model)
    model(images()).sum().backward()
    assert model.fc.weight.grad is not None
