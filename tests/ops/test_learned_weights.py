"""Weights of every kind of layer learn their ranges, and their integers stay exact."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import Lambda, assert_integer_exact, first_tensor


def attention(separate: bool = False) -> nn.Module:
    sizes = {"kdim": 6, "vdim": 5} if separate else {}
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
    return Lambda(lambda self, *x: self.layer(*x, need_weights=False)[0], layer=layer)


def recurrent(layer: nn.Module) -> nn.Module:
    return Lambda(lambda self, x: self.layer(x)[0], layer=layer)


def sequence(width: int) -> Tensor:
    return torch.randn(3, 5, width)


# The model, its inputs, and how many ranges of weights it has.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], int]] = {
    "attention": (attention, lambda: (sequence(8),) * 3, 4),
    "attention-separate": (
        lambda: attention(separate=True),
        lambda: (sequence(8), sequence(6), sequence(5)),
        4,
    ),
    "lstm": (
        lambda: recurrent(nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)),
        lambda: (sequence(4),),
        8,
    ),
    "projected": (
        lambda: recurrent(nn.LSTM(4, 6, proj_size=3, batch_first=True)),
        lambda: (sequence(4),),
        3,
    ),
    "gru": (lambda: recurrent(nn.GRU(4, 3, batch_first=True)), lambda: (sequence(4),), 2),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)),
        lambda: (torch.randint(0, 9, (4, 6)),),
        2,
    ),
    "layer-norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)),
        lambda: (sequence(4),),
        2,
    ),
    "group-norm": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 1), nn.GroupNorm(2, 6)),
        lambda: (sequence(5).transpose(1, 2)[:, :4].contiguous(),),
        2,
    ),
    "prelu": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Flatten()),
        lambda: (torch.randn(8, 4),),
        2,
    ),
}


def quantized(name: str, **fields: Any) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    torch.manual_seed(0)
    build, make_inputs, count = CASES[name]
    model, inputs = build(), make_inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    linger.prepare(model, inputs)
    linger.quantize(model, QuantConfig(**fields))
    weights = {n: p for n, p in linger.learned_ranges(model).items() if ".weights." in n}
    assert len(weights) == count
    return model, inputs, weights


def step(model: nn.Module, inputs: tuple[Tensor, ...], optimizer: Any) -> None:
    optimizer.zero_grad()
    first_tensor(model(*inputs)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("granularity", "kind"), [("tensor", "lsq"), ("tensor", "tqt"), ("channel", "lsq")]
)
@pytest.mark.parametrize("name", CASES)
def test_every_weight_learns_and_integers_are_exact(name: str, granularity: str, kind: str) -> None:
    model, inputs, weights = quantized(
        name, weight_range=kind, granularity=granularity, weight_bits=4
    )
    optimizer = torch.optim.SGD(linger.parameter_groups(model), lr=0.05)
    step(model, inputs, optimizer)
    before = {n: p.detach().clone() for n, p in weights.items()}
    for _ in range(2):
        step(model, inputs, optimizer)
    still = [n for n, p in weights.items() if torch.equal(p, before[n])]
    assert still == []
    if granularity == "channel" and name in ("attention", "gru", "lstm"):
        assert all(p.dim() == 1 for p in weights.values())
    model.eval()
    assert_integer_exact(model, *inputs)


@pytest.mark.parametrize(
    ("granularity", "kind"), [("tensor", "lsq"), ("tensor", "tqt"), ("channel", "lsq")]
)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("name", CASES)
def test_the_step_in_use_is_the_learned_one(
    name: str, bits: int, strict: bool, granularity: str, kind: str
) -> None:
    model, inputs, _ = quantized(
        name,
        weight_range=kind,
        granularity=granularity,
        weight_bits=bits,
        strict_maximum=strict,
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "bias" in path:
                parameter.zero_()
    model(*inputs)
    compared = 0
    for site in instrumentation_of(model).sites:
        learned = {"weight": site.weights.learned, **dict(site.weights.learned_parts.items())}
        for part, scale in learned.items():
            if scale is not None:
                assert torch.equal(site.weights.step_in_use(part), scale.step())
                compared += 1
    assert compared == CASES[name][2]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("kind", ["absmax", "lsq", "tqt"])
def test_a_large_bias_fits_its_codes(kind: str, bits: int, granularity: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e-4)
        model[0].bias.copy_(torch.tensor([1.99, -1.7, 1.01]))
    x = torch.randn(6, 4)
    linger.prepare(model, (x,))
    config = QuantConfig(
        weight_range=kind, weight_bits=bits, bias_bits=16, output_bits=16, granularity=granularity
    )
    linger.quantize(model, config)
    model(x).sum().backward()
    model.eval()
    assert torch.allclose(model(x), model[0].bias.expand(6, 3), atol=1e-3)


@pytest.mark.parametrize("name", ["attention", "gru", "layer-norm", "embedding", "prelu"])
def test_a_learned_range_is_used(name: str) -> None:
    model, inputs, weights = quantized(name, weight_range="tqt", weight_bits=4)
    optimizer = torch.optim.SGD(linger.parameter_groups(model), lr=0.0)
    step(model, inputs, optimizer)
    model.eval()
    with torch.no_grad():
        before = first_tensor(model(*inputs)).clone()
        for parameter in weights.values():
            parameter.sub_(2.0)  # a quarter of the threshold: weights saturate
        assert not torch.equal(first_tensor(model(*inputs)), before)
    assert_integer_exact(model, *inputs)


@pytest.mark.parametrize("name", ["attention", "lstm", "layer-norm"])
def test_frozen_saved_and_loaded(name: str) -> None:
    model, inputs, weights = quantized(name, weight_range="lsq")
    optimizer = torch.optim.SGD(linger.parameter_groups(model), lr=0.1)
    step(model, inputs, optimizer)
    linger.freeze_ranges(model, parts=["weights"])
    before = {n: p.detach().clone() for n, p in weights.items()}
    step(model, inputs, optimizer)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in weights.items())
    other, _, _ = quantized(name, weight_range="lsq")
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        found, expected = (first_tensor(m.eval()(*inputs)) for m in (other, model))
    assert torch.equal(found, expected)


def test_free_scales() -> None:
    for name in ("attention", "gru", "layer-norm", "embedding", "prelu"):
        model, inputs, weights = quantized(name, weight_range="lsq", platform="onnxruntime")
        optimizer = torch.optim.SGD(linger.parameter_groups(model), lr=0.05)
        for _ in range(2):
            step(model, inputs, optimizer)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in weights.values())


FACTORS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch-norm": (lambda: nn.BatchNorm1d(6), (8, 6)),
    "layer-norm": (lambda: nn.LayerNorm(6), (8, 6)),
    "group-norm": (lambda: nn.GroupNorm(2, 6), (8, 6, 5)),
    "instance-norm": (lambda: nn.InstanceNorm1d(6, affine=True), (8, 6, 5)),
    "rms-norm": (lambda: nn.RMSNorm(6), (8, 6)),
    "prelu": (lambda: nn.PReLU(6), (8, 6)),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_have_the_range_that_was_asked_for(name: str) -> None:
    make, shape = FACTORS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def result(weight_range: str | float) -> Tensor:
        layer = make().eval()
        with torch.no_grad():
            # All but one are within half of the largest.
            dict(layer.named_parameters())["weight"].copy_(torch.linspace(0.1, 0.4, 6))
            dict(layer.named_parameters())["weight"][0] = 1.3
        linger.prepare(layer, (x,))
        linger.quantize(layer, QuantConfig(weight_bits=5, weight_range=weight_range))
        linger.calibrate(layer, [x])
        assert_integer_exact(layer, x)
        return layer(x)

    largest = result("absmax")
    assert not torch.equal(result(12.0), largest), "a wide range has a coarse step"
    assert not torch.equal(result("80%"), largest), "a narrow range clips"
    torch.testing.assert_close(result(1.3), largest)
