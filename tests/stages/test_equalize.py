"""Cross-layer equalization: the same float function, to the bit, with ranges that suit one step."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lightning_linger as linger
from tests.models import Chain, Lambda, ResNet, assert_integer_exact, float_state, images


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@torch.no_grad()
def spoiled(model: nn.Module, octaves: float = 3.0) -> nn.Module:
    """Scale output channels of all layers at random, by `octaves` powers of two on average."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_var.uniform_(0.5, 2.0)
            module.running_mean.normal_()
            if module.affine:
                module.bias.normal_()
                module.weight.mul_(torch.exp2(octaves * torch.randn(module.num_features)))
        elif isinstance(getattr(module, "_parameters", {}).get("weight"), Tensor):
            weight = module._parameters["weight"]
            scales = torch.exp2(octaves * torch.randn(weight.shape[0]))
            weight.mul_(scales.view(-1, *[1] * (weight.dim() - 1)))
    return model


@torch.no_grad()
def out_of_balance(model: nn.Module) -> nn.Module:
    """Move factors from layer to layer of `mobile`: the function stays, the ranges do not suit."""
    first, depthwise, second = (torch.exp2(2 * torch.randn(c)) for c in (8, 8, 16))
    net = model.net
    for tensor in (net[1].weight, net[1].bias):
        tensor.mul_(first)
    net[3].weight.mul_((depthwise / first).view(-1, 1, 1, 1))
    net[3].bias.mul_(depthwise)
    net[5].weight.div_(depthwise.view(1, -1, 1, 1))
    for tensor in (net[6].weight, net[6].bias):
        tensor.mul_(second)
    net[11].weight.div_(second.repeat_interleave(9))
    return model


def mobile(classes: int = 4) -> nn.Module:
    """Pointwise and depthwise convolutions with batch norms, pools, flattening, a linear layer."""
    return Chain(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(16 * 9, classes),
    )


PAIRS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "linear": ([nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)], (4, 5)),
    "linear in a sequence": ([nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)], (4, 6, 5)),
    "identity": ([nn.Linear(5, 7), nn.Linear(7, 3)], (4, 5)),
    "leaky": ([nn.Linear(5, 7), nn.LeakyReLU(), nn.Linear(7, 3)], (4, 5)),
    "prelu": ([nn.Linear(5, 7), nn.PReLU(7), nn.Linear(7, 3)], (4, 5)),
    "conv1d": ([nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3)], (2, 3, 9)),
    "conv3d": ([nn.Conv3d(2, 4, 2), nn.ReLU(), nn.Conv3d(4, 3, 2)], (2, 2, 5, 5, 5)),
    "groups": ([nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2)], (2, 4, 7, 7)),
    "depthwise": ([nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=6)], (2, 4, 7, 7)),
    "transposed": (
        [
            nn.ConvTranspose2d(4, 6, 3, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2),
        ],
        (2, 4, 5, 5),
    ),
    "average pool": (
        [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d(2, padding=1), nn.Conv2d(6, 4, 1)],
        (2, 3, 8, 8),
    ),
    "flattened": (
        [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(24, 4)],
        (2, 3, 8, 8),
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("layers", "shape"), PAIRS.values(), ids=PAIRS)
def test_the_function_keeps_every_bit(
    layers: list[nn.Module], shape: tuple[int, ...], training: bool
) -> None:
    model = spoiled(Chain(*copy.deepcopy(layers))).train(training)
    x = torch.randn(shape)
    before = model(x)
    linger.prepare(model, (x,))
    pair, end = linger.equalize(model)
    assert pair.why_not == ""
    assert pair.channels > 0
    assert pair.largest_factor >= 2
    assert end.why_not == "its result is read by several calls, or returned"
    assert torch.equal(model(x), before)
    assert torch.equal(linger.strip(model)(x), before)


@pytest.mark.parametrize("fold", [None, "running", "batch"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batch_norms_take_the_factors(fold: str | None, training: bool) -> None:
    model = spoiled(mobile()).train(training)
    model.net[9].p = 0.0
    x = torch.randn(4, 3, 6, 6)
    plain = copy.deepcopy(model)
    linger.prepare(model, (x,))
    if fold is not None:
        linger.fuse_bn(model, mode=fold)
    twin = copy.deepcopy(model)
    rows = linger.equalize(model)
    equalized = [row.site for row in rows if not row.why_not]
    first = "net.0/conv2d/0" if fold else "net.1/batch_norm/0"
    assert first in equalized
    assert len(equalized) == 3
    # Whoever does not equalize the convolution before it says so.
    assert fold or "does not pass" in next(r.why_not for r in rows if r.site == "net.0/conv2d/0")
    moved = {k for k, v in float_state(twin).items() if not torch.equal(v, float_state(model)[k])}
    assert "net.1.weight" in moved
    assert not {"net.0.weight", "net.1.running_var", "net.1.running_mean"} & moved
    before, after = twin(x), model(x)
    assert torch.equal(before, after)
    assert torch.equal(linger.strip(model)(x), plain(x))


def test_channels_are_balanced() -> None:
    """After one pair alone, no channel can move by a factor of two any more."""
    layers, shape = PAIRS["groups"]
    model = spoiled(Chain(*copy.deepcopy(layers)))
    linger.prepare(model, (torch.randn(shape),))
    linger.equalize(model)
    first, second = model.net[0].weight, model.net[2].weight
    r1 = first.abs().amax((1, 2, 3))
    grouped = second.view(2, 2, 3, 3, 3).abs().amax((1, 3, 4)).flatten()
    assert torch.log2(r1 / grouped).abs().max() <= 1.0
    free = linger.equalize(model, factors="free")
    assert free[0].channels == 6
    r1 = model.net[0].weight.abs().amax((1, 2, 3))
    grouped = model.net[2].weight.view(2, 2, 3, 3, 3).abs().amax((1, 3, 4)).flatten()
    assert torch.allclose(r1, grouped, rtol=1e-3)


def test_free_factors_keep_the_function_to_rounding() -> None:
    model = spoiled(mobile()).double().eval()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    before = model(x)
    linger.fuse_bn(linger.prepare(model, (x,)))
    rows = linger.equalize(model, factors="free")
    assert {row.channels for row in rows if not row.why_not} == {8, 16}
    assert torch.allclose(model(x), before, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def error_of(model: nn.Module, x: Tensor, wanted: Tensor, bits: int) -> float:
    config = linger.QuantConfig(weight_bits=bits, activation_bits=8, output_bits=8)
    linger.calibrate(model, [x], config)
    assert_integer_exact(model, x)
    return float((model(x) - wanted).square().mean() / wanted.square().mean())


def test_quantized_models_are_better_for_it() -> None:
    model = out_of_balance(mobile()).eval()
    x = torch.randn(16, 3, 6, 6)
    wanted = model(x).detach()
    linger.fuse_bn(linger.prepare(model, (x,)))
    twin = copy.deepcopy(model)
    rows = linger.equalize(model)
    for row in rows[:3]:
        assert row.precision_after > 1.5 * row.precision_before
    worse, better = error_of(twin, x, wanted, 8), error_of(model, x, wanted, 8)
    assert better < 0.1 * worse


def test_high_biases_are_absorbed() -> None:
    """Where a ReLU cuts nothing the function stays; only the bias before it becomes smaller."""
    model = Chain(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2, dilation=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4, 5),
    ).eval()
    model = spoiled(model, 0.5).double()
    x = torch.randn(32, 3, 8, 8, dtype=torch.float64)
    norms = (model.net[1], model.net[4])
    with torch.no_grad():
        for bn in norms:
            bn.momentum = 1.0
            bn.bias.copy_(8 * bn.weight.abs())
        model.train()(x)
        for bn in norms:
            bn.running_var.mul_(4.0)
    before = model.eval()(x)
    linger.fuse_bn(linger.prepare(model, (x,)))
    rows = linger.equalize(model, absorb_bias=True)
    assert [row.absorbed for row in rows] == [6, 8, 0]
    for bn in norms:
        assert torch.allclose(bn.bias, 3 * bn.weight.abs())
    assert not (model.net[:2](x) < 0).any(), "the ReLU cuts nothing, also after"
    assert torch.allclose(model(x), before, rtol=1e-9, atol=1e-6)


def test_nothing_is_absorbed_across_padding_or_without_a_relu() -> None:
    model = Chain(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)),
        *(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)),
    ).eval()
    model.net[1].bias.data.fill_(9.0)
    model.net[4].bias.data.fill_(9.0)
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    linger.fuse_bn(linger.prepare(model, (x,)))
    assert [row.absorbed for row in linger.equalize(model, absorb_bias=True)] == [0, 0, 0]
    assert torch.equal(linger.strip(model)(x), before)


def _tied(self: Any, x: Tensor) -> Tensor:
    return self.c(torch.relu(self.a(torch.relu(self.a(x)))))


def _branch(self: Any, x: Tensor) -> Tensor:
    y = torch.relu(self.a(x))
    return self.b(y) + y


def _weight_tied(self: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(torch.relu(self.a(x)), self.a.weight.t())


def _between(function: Any) -> Any:
    return lambda self, x: self.b(function(self.a(x)))


def _layers(**more: nn.Module) -> dict[str, nn.Module]:
    return {"a": nn.Linear(5, 5), "b": nn.Linear(5, 5), **more}


REASONS: dict[str, tuple[Any, dict[str, nn.Module], str]] = {
    "called twice": (_tied, _layers(c=nn.Linear(5, 5)), "its weight is read by 2 calls"),
    "a branch": (_branch, _layers(), "read by several calls, or returned"),
    "one weight in two layers": (_weight_tied, _layers(), "its weight is read by 2 calls"),
    "a sigmoid": (_between(torch.sigmoid), _layers(), "`sigmoid` does not pass factors"),
    "a clamp": (_between(lambda y: y.clamp(0, 6)), _layers(), "clamps at bounds"),
    "a sum": (_between(lambda y: y + 1), _layers(), "`add` does not pass factors"),
    "another axis": (
        _between(lambda y: y.mean(1, keepdim=True).expand(-1, 5)),
        _layers(),
        "`mean` does not pass factors",
    ),
    "a mean over channels": (
        lambda self, x: self.b(torch.relu(self.a(x)).mean(1)),
        {"a": nn.Conv1d(5, 4, 1), "b": nn.Linear(5, 5)},
        "`mean` does not pass factors",
    ),
    "positions for channels": (
        lambda self, x: self.b(torch.relu(self.a(x))),
        {"a": nn.Conv1d(5, 4, 1), "b": nn.Linear(5, 5)},
        "does not take the channels",
    ),
    "a batch norm without gamma": (
        lambda self, x: self.b(torch.relu(self.n(self.a(x)))),
        _layers(n=nn.BatchNorm1d(5, affine=False)),
        "no gamma and beta",
    ),
    "a weight that is computed": (
        _between(torch.relu),
        {"a": parametrizations.weight_norm(nn.Linear(5, 5)), "b": nn.Linear(5, 5)},
        "its weight is computed",
    ),
    "a weight by another name": (
        lambda self, x: self.b(torch.relu(nn.functional.linear(x, self.w))),
        {"w": nn.Parameter(torch.randn(5, 5)), "b": nn.Linear(5, 5)},
        "its weight is not the parameter `weight`",
    ),
}


@pytest.mark.parametrize(("forward", "layers", "reason"), REASONS.values(), ids=REASONS)
def test_what_is_left_alone_says_why(
    forward: Any, layers: dict[str, nn.Module], reason: str
) -> None:
    model = spoiled(Lambda(forward, **layers)).eval()
    three = any(isinstance(layer, nn.Conv1d) for layer in layers.values())
    x = torch.randn(4, 5, 5) if three else torch.randn(4, 5)
    state = copy.deepcopy(model.state_dict())
    linger.fuse_bn(linger.prepare(model, (x,)))
    first = linger.equalize(model)[0]
    shown = first.why_not.replace("a/", "").replace("/0", "").replace("/", "")
    assert reason.replace("/", "") in shown, first.why_not
    assert first.channels == 0
    if "second" not in reason:
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_weights_that_two_modules_hold() -> None:
    """Only one of them is called here, the other may be elsewhere."""
    model = spoiled(Lambda(lambda self, x: self.b(torch.relu(self.a(x))), **_layers()))
    model.tail = nn.Linear(5, 5)
    model.tail.weight = model.b.weight
    linger.prepare(model, (torch.randn(2, 5),))
    assert "shared: b.weight, tail.weight" in linger.equalize(model)[0].why_not


def test_limits_that_would_not_scale_along() -> None:
    model = linger.prepare(spoiled(mobile()), (torch.randn(2, 3, 6, 6),))
    linger.normalize(model, overrides={"net.0": None, "net.1": None})
    rows = {row.site: row.why_not for row in linger.equalize(model)}
    assert "range limits of `net.3/conv2d/0`" in rows["net.1/batch_norm/0"]


def test_modules_choose_pairs() -> None:
    model = linger.prepare(spoiled(mobile()), (torch.randn(2, 3, 6, 6),))
    linger.fuse_bn(model)
    rows = linger.equalize(model, modules=["net.0", "net.3"])
    assert [row.why_not == "" for row in rows] == [True, False, False, False]
    assert "`net.5/conv2d/0` is not in `modules`" in rows[1].why_not


def test_channels_that_would_lose_bits_stay() -> None:
    model = Chain(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model.net[0].weight.copy_(torch.tensor([[2.0**20, 2.0**-145], [0.0, 0.0]]))
        model.net[2].weight.copy_(torch.tensor([[2.0**-10, 1.0], [2.0**-20, 1.0]]))
        model.net[0].bias.zero_()
    state = copy.deepcopy(model.state_dict())
    linger.prepare(model, (torch.randn(3, 2),))
    assert linger.equalize(model)[0].channels == 0
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_a_residual_network_is_equalized_inside_its_blocks() -> None:
    x = images()
    model = linger.prepare(spoiled(ResNet()).eval(), (x,))
    linger.fuse_bn(model)
    before = model(x)
    rows = {row.site: row for row in linger.equalize(model)}
    assert rows["layers.0.conv1/conv2d/0"].follower == "layers.0.conv2/conv2d/0"
    assert rows["stem/conv2d/0"].why_not == "its result is read by several calls, or returned"
    assert torch.equal(model(x), before)
    assert "layers.1.conv1/conv2d/0" in str(linger.equalize(model))


def test_twice_is_once() -> None:
    model = linger.prepare(spoiled(mobile()), (torch.randn(2, 3, 6, 6),))
    linger.equalize(model)
    state = copy.deepcopy(float_state(model))
    again = linger.equalize(model)
    assert all(row.channels == 0 for row in again)
    assert all(torch.equal(v, float_state(model)[k]) for k, v in state.items())


def test_a_rebuilt_model_is_equalized_alike() -> None:
    """The dataflow of a checkpoint is as good as one that was just recorded."""
    x = torch.randn(2, 3, 6, 6)
    model = linger.prepare(spoiled(mobile()), (x,))
    linger.fuse_bn(model)
    from lightning_linger.stages.checkpoints import restore

    twin = restore(mobile(), model.state_dict())
    twin.load_state_dict(model.state_dict())
    rows, again = linger.equalize(model), linger.equalize(twin)
    assert str(rows) == str(again)
    assert all(torch.equal(v, float_state(twin)[k]) for k, v in float_state(model).items())


def test_wrong_arguments() -> None:
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(linger.NotReadyError):
        linger.equalize(mobile())
    model = linger.prepare(mobile(), (x,))
    with pytest.raises(linger.ConfigError, match=r"factors.*'free'.*'none'"):
        linger.equalize(model, factors="none")  # type: ignore[arg-type]
    with pytest.raises(linger.ConfigError, match=r"max_sweeps.*positive.*0"):
        linger.equalize(model, max_sweeps=0)
    with pytest.raises(linger.ConfigError, match=r"'nets' matches no"):
        linger.equalize(model, modules=["nets"])
    linger.calibrate(model, [x])
    with pytest.raises(linger.ConfigError, match=r"net\.0/conv2d/0:input0.*has seen a range"):
        linger.equalize(model)


def test_a_row_without_a_pair_has_no_precision() -> None:
    model = linger.prepare(Chain(nn.Linear(3, 2)), (torch.randn(2, 3),))
    (row,) = linger.equalize(model)
    assert math.isnan(row.precision_before)
    assert row.follower == ""
