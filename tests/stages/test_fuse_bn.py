"""Folding: the folded model trains and evaluates as the unfolded one."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from tests.models import (
    Chain,
    Lambda,
    ResNet,
    assert_integer_exact,
    images,
    site_of,
    train,
    trained,
)

SHAPES = {1: (9,), 2: (6, 5), 3: (4, 3, 4)}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
TIGHT = {"rtol": 1e-8, "atol": 1e-9}


def _layer(kind: str, dims: int, groups: int, bias: bool) -> nn.Module:
    layer = getattr(nn, f"{kind}{dims}d")
    return layer(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias)


LAYERS = [
    pytest.param(
        kind, dims, groups, bias, id=f"{kind}{dims}d-groups{groups}-{'bias' if bias else 'plain'}"
    )
    for kind in ("Conv", "ConvTranspose")
    for dims in (1, 2, 3)
    for groups in (1, 2)
    for bias in (True, False)
]


def _compare(
    plain: nn.Module, batches: list[Tensor], mode: str = "running", lr: float = 0.1
) -> nn.Module:
    """Train both side by side in float64 and compare everything there is."""
    folded = copy.deepcopy(plain)
    linger.fuse_bn(linger.prepare(folded, (batches[0],)), mode=mode)
    assert any(site.fold is not None for site in folded._linger.sites)
    for x in batches:
        results = []
        for model in (plain, folded):
            model.zero_grad()
            inputs = x.clone().requires_grad_()
            y = model(inputs)
            (
                y.square() * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
            ).mean().backward()
            results.append((y, inputs.grad, model))
        (y, dx, _), (z, dz, _) = results
        torch.testing.assert_close(z, y, **TIGHT)
        torch.testing.assert_close(dz, dx, **TIGHT)
        for (name, p), (_, q) in zip(
            plain.named_parameters(), folded.named_parameters(), strict=True
        ):
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            found = torch.zeros_like(q) if q.grad is None else q.grad
            torch.testing.assert_close(found, expected, **TIGHT, msg=lambda m, n=name: f"{n}: {m}")
            with torch.no_grad():
                p -= lr * expected
                q -= lr * found
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(folded.get_buffer(name), buffer, **TIGHT)
    plain.eval()
    folded.eval()
    torch.testing.assert_close(folded(batches[0]), plain(batches[0]), **TIGHT)
    return folded


def _batches(dims: int, count: int = 3) -> list[Tensor]:
    return [torch.randn(3, 4, *SHAPES[dims]).double() * 2 + 0.5 for _ in range(count)]


@pytest.mark.parametrize("mode", ["running", "batch"])
@pytest.mark.parametrize(("kind", "dims", "groups", "bias"), LAYERS)
def test_row27_layers(kind: str, dims: int, groups: int, bias: bool, mode: str) -> None:
    plain = Chain(_layer(kind, dims, groups, bias), NORMS[dims](6)).double()
    _compare(plain, _batches(dims), mode)


@pytest.mark.parametrize("mode", ["running", "batch"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool, mode: str) -> None:
    plain = Chain(nn.Linear(5, 7, bias=bias), nn.BatchNorm1d(7)).double()
    _compare(plain, [torch.randn(6, 5).double() for _ in range(3)], mode)


@pytest.mark.parametrize("mode", ["running", "batch"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.37},
        {"momentum": 1.0},
        {"momentum": 0.0},
        {"eps": 0.3},
        {"eps": 1e-12},
        {"affine": False},
        {"affine": False, "momentum": None},
    ],
    ids=str,
)
def test_batch_norm_options(options: dict[str, Any], mode: str) -> None:
    plain = Chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, **options), nn.ReLU()).double()
    folded = _compare(plain, _batches(2), mode)
    assert folded.net[1].num_batches_tracked == 3


@pytest.mark.parametrize("mode", ["running", "batch"])
@pytest.mark.parametrize(
    "gamma",
    [
        [0.0] * 6,
        [-1.5] * 6,
        [0.0, -0.5, 1e-9, -1e-9, 1e-5, 1.0],
        [1e-30, -1e-30, 1e-20, 0.0, 2.0, -2.0],
    ],
    ids=["zero", "negative", "mixed", "vanishing"],
)
def test_any_gamma_trains(gamma: list[float], mode: str) -> None:
    plain = Chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)).double()
    with torch.no_grad():
        plain.net[1].weight.copy_(torch.tensor(gamma))
        plain.net[1].bias.normal_()
    _compare(plain, _batches(2, 5), mode, lr=0.2)


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_running_statistics_far_from_the_batch(mode: str) -> None:
    """Statistics of the first steps are far off: no factor of them may reach the result."""
    plain = Chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).double()
    with torch.no_grad():
        plain.net[1].running_var.copy_(torch.tensor([1e-8, 1e-3, 1.0, 1e3, 1e6, 0.0]))
        plain.net[1].running_mean.normal_(std=100)
    _compare(plain, _batches(2), mode)


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_constant_channels(mode: str) -> None:
    """A channel without variance normalizes to beta, without NaN."""
    plain = Chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).double()
    with torch.no_grad():
        plain.net[0].weight[2] = 0.0
    _compare(plain, _batches(2), mode, lr=0.0)  # a step there would amplify rounding by 1 / eps


@pytest.mark.parametrize("mode", ["running", "batch", "frozen"])
def test_a_batch_norm_frozen_by_the_user(mode: str) -> None:
    plain = Chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).double()
    plain.net[1].running_mean.normal_()
    plain.net[1].running_var.uniform_(0.5, 2.0)
    plain.net[1].eval()
    _compare(plain, _batches(2), mode)


def test_frozen_mode_trains_with_running_statistics_that_stay() -> None:
    plain = Chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).double()
    folded = copy.deepcopy(plain)
    for model in (plain, folded):
        model.net[1].running_mean.fill_(0.3)
        model.net[1].running_var.fill_(1.7)
    (x,) = _batches(2, 1)
    linger.fuse_bn(linger.prepare(folded, (x,)), mode="frozen")
    folded.train()
    plain.eval()  # what frozen statistics mean
    for model in (plain, folded):
        model(x).square().mean().backward()
    torch.testing.assert_close(folded(x), plain(x), **TIGHT)
    for p, q in zip(plain.parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, **TIGHT)
    assert (folded.net[1].running_mean == 0.3).all()
    assert (folded.net[1].running_var == 1.7).all()


def test_a_whole_network() -> None:
    _compare(ResNet().double(), [images().double() for _ in range(4)])


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("mode", ["running", "batch"])
def test_every_parameter_takes_part(mode: str, quantized: bool) -> None:
    """A bias that batch statistics cancel still has a (zero) gradient, which DDP waits for."""
    model = Chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    x = torch.randn(3, 4, 5, 5)
    linger.fuse_bn(linger.prepare(model, (x,)), mode=mode)
    if quantized:
        linger.quantize(model)
    model(x).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not model.net[0].bias.grad.any()


def test_float32_stays_within_rounding() -> None:
    plain = ResNet()
    folded = copy.deepcopy(plain)
    x = images(8)
    linger.fuse_bn(linger.prepare(folded, (x,)))
    for model in (plain, folded):
        torch.manual_seed(1)
        train(model, (x,), 5, 0.05)
        model.eval()
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-3, atol=1e-4)


def _folds(model: nn.Module) -> set[str]:
    return {site.key for site in model._linger.sites if site.fold is not None}


def test_no_running_statistics_stay_unfolded() -> None:
    plain = Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    x = torch.randn(2, 3, 6, 6)
    model = linger.fuse_bn(linger.prepare(copy.deepcopy(plain), (x,)))
    assert not _folds(model)
    assert torch.equal(model(x), plain(x))
    linger.quantize(model)
    assert "running statistics" in str(site_of(model, "net.1/batch_norm/0").why_float)


def test_only_a_sole_consumer_is_folded() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) + y

    layers = {"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4)}
    plain = Lambda(forward, **layers)
    x = torch.randn(2, 3, 6, 6)
    model = linger.fuse_bn(linger.prepare(copy.deepcopy(plain), (x,)))
    assert not _folds(model)
    assert torch.equal(model(x), plain(x))


def test_a_returned_value_is_not_folded_away() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y), y

    model = Lambda(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    linger.fuse_bn(linger.prepare(model, (torch.randn(2, 3, 6, 6),)))
    assert not _folds(model)


def test_something_between_is_not_folded() -> None:
    model = Chain(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    linger.fuse_bn(linger.prepare(model, (torch.randn(2, 3, 6, 6),)))
    assert not _folds(model)


def test_a_batch_norm_first_is_not_folded() -> None:
    model = Chain(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    linger.fuse_bn(linger.prepare(model, (torch.randn(2, 3, 6, 6),)))
    assert not _folds(model)


def test_a_linear_on_sequences_is_not_folded() -> None:
    plain = Chain(nn.Linear(5, 4), nn.BatchNorm1d(3))
    x = torch.randn(2, 3, 5)
    model = linger.fuse_bn(linger.prepare(copy.deepcopy(plain), (x,)))
    assert not _folds(model)
    assert torch.equal(model(x), plain(x))


def test_a_module_called_twice_is_folded_twice() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.bn2(self.conv(self.bn1(self.conv(x))))

    layers = {
        "conv": nn.Conv2d(4, 4, 3, padding=1),
        "bn1": nn.BatchNorm2d(4),
        "bn2": nn.BatchNorm2d(4),
    }
    folded = _compare(Lambda(forward, **layers).double(), _batches(2))
    assert _folds(folded) == {"conv/conv2d/0", "conv@1/conv2d/0"}


def test_modules_narrows() -> None:
    model = linger.prepare(ResNet(), (images(),))
    linger.fuse_bn(model, modules=["layers.*.conv1"])
    assert _folds(model) == {"layers.0.conv1/conv2d/0", "layers.1.conv1/conv2d/0"}
    linger.fuse_bn(model, modules=["layers.1"])
    assert _folds(model) == {"layers.1.conv1/conv2d/0", "layers.1.conv2/conv2d/0"}
    linger.fuse_bn(model)
    assert len(_folds(model)) == 5


def test_one_value_per_channel_is_an_error_as_in_torch() -> None:
    model = linger.prepare(Chain(nn.Linear(3, 4), nn.BatchNorm1d(4)), (torch.randn(2, 3),))
    linger.fuse_bn(model)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3))
    model.eval()(torch.randn(1, 3))


# --- under quantization-aware training --------------------------------------------------------


@pytest.mark.parametrize("mode", ["running", "batch", "frozen"])
def test_quantized_evaluation_is_close_and_exact(mode: str) -> None:
    x = images(8)
    model = trained(
        ResNet(),
        x,
        config=linger.QuantConfig(weight_bits=12, activation_bits=12, output_bits=12),
        fold=mode,
        steps=5,
        lr=0.02,
    )
    assert_integer_exact(model, x)
    fake = model(x)
    linger.strip(model)
    torch.testing.assert_close(fake, model(x), rtol=0.02, atol=0.02)


def test_a_silent_channel_keeps_the_unfolded_gradients() -> None:
    """gamma == 0 makes a zero weight, which no quantizer brings back: the gradient must."""
    torch.manual_seed(2)
    plain = Chain(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))
    with torch.no_grad():
        plain.net[1].weight[1] = 0.0
        plain.net[1].weight[4] = 0.0
        plain.net[1].bias.normal_()
    model = copy.deepcopy(plain)
    x = torch.randn(8, 4, 6, 6)
    config = linger.QuantConfig(weight_bits=8, activation_bits=8, output_bits=8)
    linger.quantize(linger.fuse_bn(linger.prepare(model, (x,))), config)
    target = torch.randn(8, 6, 4, 4)
    for net in (plain, model):
        (net(x) * target).mean().backward()
    silent = [1, 4]
    bn, reference = model.net[1], plain.net[1]
    expected = reference.weight.grad[silent]
    assert (expected != 0).all()
    torch.testing.assert_close(bn.weight.grad[silent], expected, rtol=0.1, atol=1e-4)
    torch.testing.assert_close(
        bn.bias.grad[silent], reference.bias.grad[silent], rtol=0.05, atol=1e-4
    )
    # Their output is beta, on the output grid.
    output = model(x)[:, silent]
    assert (output == output[:1, :, :1, :1]).all()


def test_a_channel_whose_codes_vanish_is_silent_in_training_too() -> None:
    """Evaluation has only its zero weight; what training normalizes there must not get through."""
    torch.manual_seed(3)
    model = Chain(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))
    with torch.no_grad():
        model.net[1].weight.copy_(torch.tensor([1.0, 2e-3, 1.0, -2e-3, 1.0, 1.0]))
        model.net[1].bias.copy_(torch.tensor([0.0, 0.5, 0.0, -0.5, 0.0, 0.0]))
    x = torch.randn(8, 4, 6, 6)
    config = linger.QuantConfig(weight_bits=4, output_bits=16)
    linger.quantize(linger.fuse_bn(linger.prepare(model, (x,))), config)
    y = model(x)
    assert torch.equal(y[:, 1], torch.full_like(y[:, 1], 0.5))
    assert torch.equal(y[:, 3], torch.full_like(y[:, 3], -0.5))
    y[:, [1, 3]].square().mean().backward()
    assert (model.net[1].weight.grad[[1, 3]] != 0).all()
    model.eval()
    assert torch.equal(model(x)[:, [1, 3]], y[:, [1, 3]])


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime", "tflite"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_training_on_statistics_of_the_batch_has_the_bits_of_evaluation_on_the_same(
    platform: str, bits: int, bias: bool
) -> None:
    """Few bits make coarse accumulators, which round biases and take the sums to ties."""
    torch.manual_seed(bits)
    # A large epsilon keeps the codes of the weights from moving with the variance they lead to.
    norms = [nn.BatchNorm2d(8, eps=1e4, momentum=1.0) for _ in range(2)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 50.0, 150.0)
        nn.init.normal_(norm.bias)
    model = Chain(
        nn.Conv2d(3, 8, 3, bias=bias),
        norms[0],
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=bias),
        norms[1],
        nn.ReLU(),
    )
    x = torch.randn(32, 3, 10, 10)
    config = linger.QuantConfig(
        platform=platform, weight_bits=bits, activation_bits=bits, output_bits=bits
    )
    linger.quantize(linger.fuse_bn(linger.prepare(model, (x,))), config)
    with torch.no_grad():
        model(x)
        linger.freeze_ranges(model)
        for _ in range(3):
            trained_on = model(x)
        assert torch.equal(model.eval()(x), trained_on)
    assert trained_on.unique().numel() > 1
    assert_integer_exact(model, x)


def test_training_feels_what_rounding_takes_off_the_folded_bias() -> None:
    torch.manual_seed(7)
    norm = nn.BatchNorm2d(6, momentum=0.0)
    model = Chain(nn.Conv2d(64, 6, 1), norm)
    nn.init.normal_(norm.running_mean)
    nn.init.normal_(norm.bias)
    x = torch.randn(16, 64, 24, 24)
    config = linger.QuantConfig(weight_bits=2, activation_bits=3, output_bits=16)
    linger.quantize(linger.fuse_bn(linger.prepare(model, (x,))), config)
    with torch.no_grad():
        model(x)
        found = model(x).mean(dim=(0, 2, 3))
    site = site_of(model, "net.0/conv2d/0")
    product = float(next(iter(site.inputs.values())).step()) * float(
        site.weights.latest_steps["weight"]
    )
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    bias = norm.bias + (model.net[0].bias - norm.running_mean) * factor
    lost = (bias / product + 0.5).floor() * product - bias
    assert lost.abs().max() > 0.25 * product
    assert (found - norm.bias - lost).abs().max() < 0.1 * product


def test_the_gradient_passes_the_rounding_of_the_accumulator() -> None:
    torch.manual_seed(6)
    plain = Chain(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))
    model = copy.deepcopy(plain)
    x = torch.randn(8, 4, 6, 6)
    config = linger.QuantConfig(weight_bits=3, activation_bits=8, output_bits=16)
    linger.quantize(linger.fuse_bn(linger.prepare(model, (x,))), config)
    target = torch.randn(8, 6, 4, 4)
    for net in (plain, model):
        (net(x) * target).sum().backward()
    torch.testing.assert_close(model.net[1].bias.grad, plain.net[1].bias.grad)
    for layer, reference in zip(model.net, plain.net, strict=True):
        found, expected = layer.weight.grad.flatten(), reference.weight.grad.flatten()
        assert torch.cosine_similarity(found, expected, dim=0) > 0.9


def test_a_silent_channel_has_no_mean_but_the_bias_of_its_layer() -> None:
    """What evaluation adds to codes that are all zero is then beta, as in training."""
    torch.manual_seed(3)
    model = Chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=1.0))
    with torch.no_grad():
        model.net[1].weight[1] = 2e-3
        model.net[1].bias[1] = 0.5
    x = torch.randn(8, 4, 6, 6) + 1.0
    config = linger.QuantConfig(weight_bits=4, output_bits=16)
    linger.quantize(linger.fuse_bn(linger.prepare(model, (x,))), config)
    model(x)
    assert model.net[1].running_mean[1] == model.net[0].bias[1]
    assert (model.net[1].running_mean[0] - model.net[0].bias[0]).abs() > 0.01
    assert model.net[1].running_var[1] > 0.01
    y = model.eval()(x)
    assert torch.equal(y[:, 1], torch.full_like(y[:, 1], 0.5))


def test_a_constant_channel_without_epsilon() -> None:
    model = Chain(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, eps=0.0))
    with torch.no_grad():
        model.net[0].weight[2] = 0.0
        model.net[1].bias.fill_(0.25)
    x = torch.randn(8, 4, 6, 6)
    linger.fuse_bn(linger.prepare(model, (x,)))
    y = model(x)
    assert y.isfinite().all()
    assert torch.equal(y[:, 2], torch.full_like(y[:, 2], 0.25))


def test_a_silent_channel_comes_back() -> None:
    x = torch.randn(16, 4, 6, 6)
    model = Chain(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))
    nn.init.zeros_(model.net[1].weight)
    teacher = Chain(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)).train()
    model.net[0].load_state_dict(teacher.net[0].state_dict())
    target = teacher(x).detach()
    linger.quantize(linger.fuse_bn(linger.prepare(model, (x,))))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert (model.net[1].weight.abs() > 0.5).all()


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_quantized_training_moves_the_statistics_of_the_unquantized_convolution(mode: str) -> None:
    plain = Chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    model = copy.deepcopy(plain)
    x = torch.randn(8, 4, 6, 6)
    config = linger.QuantConfig(weight_bits=16, activation_bits=16, output_bits=16)
    linger.quantize(linger.fuse_bn(linger.prepare(model, (x,)), mode=mode), config)
    for _ in range(3):
        plain(x)
        model(x)
    torch.testing.assert_close(
        model.net[1].running_mean, plain.net[1].running_mean, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        model.net[1].running_var, plain.net[1].running_var, rtol=1e-3, atol=1e-3
    )


def test_folding_can_be_switched_off_again() -> None:
    from lightning_linger.stages.fuse_bn import switch_fuse_bn

    x = images()
    model = linger.prepare(ResNet(), (x,))
    expected = model(x)
    linger.fuse_bn(model)
    switch_fuse_bn(model, on=False)
    assert torch.equal(model(x), expected)


def test_only_statistics_that_stand_still_train_what_is_left_of_a_clipped_channel() -> None:
    """Normalizing by the batch gives back what a range takes off; evaluation does not."""
    x = torch.randn(32, 4, 6, 6)
    model = Chain(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))
    linger.quantize(linger.fuse_bn(linger.prepare(model, (x,))))
    with torch.no_grad():
        model(x)
        linger.freeze_ranges(model)
        model.net[1].weight[2] = 20.0
        for _ in range(100):
            by_batch = model(x)
        linger.fuse_bn(model, mode="frozen")
        standing_still = model(x)
        evaluated = model.eval()(x)
    assert torch.equal(standing_still, evaluated)
    assert not torch.equal(by_batch, evaluated)
    # Of weights alone, for inputs without correlation.
    deviation = model.net[0].weight[2].square().sum().sqrt()
    measured = model.net[1].running_var[2].sqrt()
    assert measured < 0.7 * deviation, (
        "it seems to be smaller, and the next folded weight is larger"
    )
