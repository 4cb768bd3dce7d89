"""Batch norm statistics estimated anew, under the weights that the chip has."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import Chain, ResNet, assert_integer_exact, float_state, images, site_of


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(6)


def net() -> nn.Module:
    return Chain(
        *(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=None), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(6 * 4, 3)),
    )


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "running_" in k}


def expected(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """PyTorch's own cumulative average, over batches in training mode without dropout."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return statistics(model)


@pytest.mark.parametrize("fold", [None, "running", "batch", "frozen"])
def test_a_float_model_gets_the_cumulative_average(fold: str | None) -> None:
    batches = [torch.randn(8, 2, 6, 6) * 3 + 1 for _ in range(3)]
    model = net().eval().double()
    batches = [batch.double() for batch in batches]
    wanted = expected(copy.deepcopy(model), batches)
    linger.prepare(model, (batches[0],))
    if fold is not None:
        linger.fuse_bn(model, mode=fold)
    assert linger.reestimate_bn(model, batches) is model
    found = statistics(model)
    assert all(torch.allclose(found[key], wanted[key]) for key in wanted)


def test_nothing_else_changes() -> None:
    x = images(8)
    model = ResNet(dropout=0.5)
    linger.prepare(model, (x,))
    linger.normalize(model, output="99%")
    linger.fuse_bn(model, mode="frozen")
    linger.calibrate(model, [x])
    model.train()
    model.layers[0].eval()
    state = copy.deepcopy(model.state_dict())
    modes = {name: m.training for name, m in model.named_modules()}
    momenta = {name: getattr(m, "momentum", None) for name, m in model.named_modules()}
    linger.reestimate_bn(model, [x, x * 2])
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert {k for k in changed if "running_" not in k} == {"_linger._extra_state"}
    assert any("running_mean" in k for k in changed)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {n: getattr(m, "momentum", None) for n, m in model.named_modules()} == momenta
    switches = instrumentation_of(model).switches
    assert switches.observing
    assert switches.fuse_mode == "frozen"


def quantized(x: Tensor, **config: Any) -> nn.Module:
    model = net()
    with torch.no_grad():
        for _ in range(60):
            model.train()(x)
    linger.fuse_bn(linger.prepare(model.eval(), (x,)))
    return linger.calibrate(model, [x], linger.QuantConfig(output_bits=None, **config))


def spread(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the second batch norm's results, by channel."""
    results: list[Tensor] = []
    instrumentation = instrumentation_of(model)
    instrumentation.tap = lambda event: (
        results.append(event.result) if event.site.key == "net.5/batch_norm/0" else None
    )
    with torch.no_grad():
        model(x)
    instrumentation.tap = None
    y = results[0]
    return y.mean((0, 2, 3)), y.std((0, 2, 3))


def codes(model: nn.Module, key: str) -> Tensor:
    return site_of(model, key).prepared["weights"].codes


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
def test_quantized_results_have_the_statistics_of_the_float_ones(platform: str) -> None:
    """Batch norms of a trained float model give `beta` on average, with deviation `gamma`."""
    x = torch.rand(64, 2, 6, 6)
    model = quantized(x, platform=platform, weight_bits=2)
    mean, std = spread(model, x)
    before = codes(model, "net.4/conv2d/0")
    linger.reestimate_bn(model, [x])
    better, scale = spread(model, x)
    assert better.abs().max() < 0.05 * mean.abs().max()
    assert torch.equal(codes(model, "net.4/conv2d/0"), before)
    if platform == "onnxruntime":
        # A variance only scales the step of its channel, so it is estimated too.
        assert (scale - 1).abs().max() < 0.25 * (std - 1).abs().max()
    assert_integer_exact(model, x) if platform == "venusa" else None


def test_variances_that_change_codes_are_kept_unless_asked_for() -> None:
    x = torch.rand(64, 2, 6, 6)
    model = quantized(x, weight_bits=3)
    twin = copy.deepcopy(model)
    state = statistics(model)
    linger.reestimate_bn(model, [x])
    after = statistics(model)
    assert all(torch.equal(after[k], v) == ("var" in k) for k, v in state.items())
    linger.reestimate_bn(twin, [x], keep_codes=False)
    after = statistics(twin)
    assert not any(torch.equal(after[k], v) for k, v in state.items())
    mean, _ = spread(twin, x)
    assert mean.abs().max() < 0.1, "the means are those under the new codes"
    frozen = quantized(x, platform="onnxruntime", weight_bits=3)
    linger.freeze_ranges(frozen, parts=["weights"])
    state = statistics(frozen)
    linger.reestimate_bn(frozen, [x])
    assert all(torch.equal(statistics(frozen)[k], v) == ("var" in k) for k, v in state.items())


def test_every_batch_counts_alike_under_the_same_weights() -> None:
    """Folded weights do not follow the statistics of the batches before."""
    batches = [torch.rand(32, 2, 6, 6), torch.rand(32, 2, 6, 6) * 3]
    model = quantized(batches[0], weight_bits=3)
    twins = [copy.deepcopy(model) for _ in batches]
    linger.reestimate_bn(model, batches)
    singles = []
    for twin, batch in zip(twins, batches, strict=True):
        singles.append(statistics(linger.reestimate_bn(twin, [batch])))
    for key, value in statistics(model).items():
        assert torch.allclose(value, (singles[0][key] + singles[1][key]) / 2), key


def test_a_batch_whose_statistics_are_those_of_the_model_counts() -> None:
    batches = [torch.randn(8, 2, 6, 6), torch.randn(8, 2, 6, 6) * 3]
    model = linger.prepare(net(), (batches[0],))
    twin = copy.deepcopy(model)
    wanted = statistics(linger.reestimate_bn(model, batches))
    linger.reestimate_bn(twin, batches[:1])
    found = statistics(linger.reestimate_bn(twin, batches))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("fold", [False, True])
def test_every_call_of_a_batch_norm_counts(fold: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.conv(x)))
            return self.norm(self.conv(x + 1))

    batches = [torch.randn(8, 2, 6, 6).double() * 3 + 1 for _ in range(2)]
    model = Twice().eval().double()
    wanted = expected(copy.deepcopy(model), batches)
    linger.prepare(model, (batches[0],))
    if fold:
        linger.fuse_bn(model)
    found = statistics(linger.reestimate_bn(model, batches))
    assert all(torch.allclose(found[key], wanted[key]) for key in wanted)


def test_a_forward_that_fails_leaves_the_statistics() -> None:
    x = torch.randn(8, 2, 6, 6)
    model = linger.prepare(net(), (x,))
    before = copy.deepcopy(float_state(model))
    with pytest.raises(RuntimeError, match="channels"):
        linger.reestimate_bn(model, [x, torch.randn(8, 3, 6, 6)])
    assert all(torch.equal(v, float_state(model)[k]) for k, v in before.items())
    assert model.net[1].momentum == 0.1


def test_modules_choose_batch_norms() -> None:
    x = torch.randn(8, 2, 6, 6)
    model = linger.prepare(net(), (x,))
    before = statistics(model)
    linger.reestimate_bn(model, [x], modules=["net.5"])
    moved = {k for k, v in statistics(model).items() if not torch.equal(v, before[k])}
    assert moved == {"net.5.running_mean", "net.5.running_var"}
    with pytest.raises(linger.ConfigError, match=r"'net\.4' matches no batch norm.*net\.5"):
        linger.reestimate_bn(model, [x], modules=["net.4"])


def test_what_is_refused() -> None:
    x = torch.randn(8, 5)
    model = linger.prepare(Chain(nn.Linear(5, 5)), (x,))
    with pytest.raises(linger.ConfigError, match="no batch norm"):
        linger.reestimate_bn(model, [x])
    with pytest.raises(linger.ConfigError, match="no batch"):
        linger.reestimate_bn(linger.prepare(net(), (torch.randn(8, 2, 6, 6),)), [])
    with pytest.raises(linger.NotReadyError):
        linger.reestimate_bn(net(), [x])
    flat = linger.prepare(Chain(nn.Linear(5, 5), nn.BatchNorm1d(5)), (x,)).eval()
    with pytest.raises(linger.ConfigError, match="several samples"):
        linger.reestimate_bn(flat, [x[:1]])
