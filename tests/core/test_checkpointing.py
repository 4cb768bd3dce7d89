"""Activation checkpointing: same gradients, ranges observed once."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lightning_linger as linger
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import Block, Chained, assert_integer_exact


class Net(nn.Module):
    """A stem, a block that may be checkpointed, a head."""

    def __init__(self, reentrant: bool | None, block: type[nn.Module] = Chained) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = block(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        if self.reentrant is None:
            x = self.block(x)
        else:
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def _ranges(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith("_linger.")}


def _steps(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    gradients = []
    for x in batches:
        model.zero_grad()
        model(x).square().sum().backward()
        gradients += [p.grad.clone() for p in model.parameters()]
    return gradients


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("stages", ["float", "fuse", "quantize", "fuse+quantize"])
def test_gradients_and_ranges_are_those_without(reentrant: bool, stages: str) -> None:
    plain = Net(None)
    checked = copy.deepcopy(plain)
    checked.reentrant = reentrant
    batches = [torch.randn(4, 3, 6, 6) for _ in range(3)]
    for model in (plain, checked):
        linger.prepare(model, (batches[0],))
        # Statistics of batch norms move in the repeated forward too, with and without us.
        model.block.bn1.momentum = model.block.bn2.momentum = 0.0
        if "fuse" in stages:
            linger.fuse_bn(model)
        if "quantize" in stages:
            linger.quantize(model)
    expected, found = _steps(plain, batches), _steps(checked, batches)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    before, after = _ranges(plain), _ranges(checked)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if "quantize" in stages:
        batches_seen = {int(v) for k, v in after.items() if k.endswith("batches")}
        assert batches_seen == {len(batches)}
        assert_integer_exact(checked.eval(), batches[0])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_block_that_calls_its_relu_twice(reentrant: bool) -> None:
    """The usual residual block: all calls of the reused module lie within one checkpoint."""
    plain = Net(None, Block)
    checked = copy.deepcopy(plain)
    checked.reentrant = reentrant
    x = torch.randn(4, 3, 6, 6)
    for model in (plain, checked):
        linger.quantize(linger.prepare(model, (x,)))
        model.block.bn1.momentum = model.block.bn2.momentum = 0.0
    for a, b in zip(_steps(plain, [x, x]), _steps(checked, [x, x]), strict=True):
        assert torch.equal(a, b)
    before, after = _ranges(plain), _ranges(checked)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_sequential_segments() -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(3)))

    class Segments(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.on, self.net = on, build()

        def forward(self, x: Tensor) -> Tensor:
            if not self.on:
                return self.net(x)
            return checkpoint_sequential(self.net, 3, x, use_reentrant=False)

    plain, checked = Segments(False), Segments(True)
    checked.load_state_dict(plain.state_dict())
    x = torch.randn(4, 5)
    for model in (plain, checked):
        linger.quantize(linger.prepare(model, (x,)))
    for a, b in zip(_steps(plain, [x, x]), _steps(checked, [x, x]), strict=True):
        assert torch.equal(a, b)


def _direct(reentrant: bool) -> nn.Module:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            def body(y: Tensor) -> Tensor:
                return torch.nn.functional.linear(y, self.fc.weight).relu()

            return checkpoint(body, self.fc(x), use_reentrant=reentrant)

    return Direct()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_function_with_ops_cannot_be_checkpointed(reentrant: bool) -> None:
    model = _direct(reentrant)
    with pytest.raises(
        linger.UnsupportedError, match=r"`/linear/0` at .*test_checkpointing\.py:\d+"
    ):
        linger.prepare(model, (torch.randn(2, 4),))
    assert not model._forward_hooks
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_reused_module_cannot_be_checkpointed() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.fc, x, use_reentrant=False)
            return checkpoint(self.fc, x, use_reentrant=False)

    with pytest.raises(linger.UnsupportedError, match=r"fc@1/linear/0.*several times"):
        linger.prepare(Reused(), (torch.randn(2, 4),))


def test_a_function_that_calls_modules_is_fine() -> None:
    class Closure(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.on = on
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            def body(y: Tensor) -> Tensor:
                return self.b(self.a(y))

            return checkpoint(body, x, use_reentrant=False) if self.on else body(x)

    plain, checked = Closure(False), Closure(True)
    checked.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4)
    for model in (plain, checked):
        linger.quantize(linger.prepare(model, (x,)))
    for a, b in zip(_steps(plain, [x, x]), _steps(checked, [x, x]), strict=True):
        assert torch.equal(a, b)


def test_dropout_inside_a_checkpoint() -> None:
    class Dropping(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.on = on
            self.body = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.body, x, use_reentrant=False) if self.on else self.body(x)

    plain, checked = Dropping(False), Dropping(True)
    checked.load_state_dict(plain.state_dict())
    x = torch.randn(4, 8)
    gradients = []
    for model in (plain, checked):
        linger.quantize(linger.prepare(model, (x,)))
        torch.manual_seed(3)
        gradients.append(_steps(model, [x, x]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_recomputation_does_not_leave_the_mode_on() -> None:
    model = Net(False)
    x = torch.randn(2, 3, 6, 6)
    linger.quantize(linger.prepare(model, (x,)))
    model(x).sum().backward()
    assert not torch.overrides._get_current_function_mode_stack()
    assert not instrumentation_of(model).stack
    model(x)
    assert not instrumentation_of(model).switches.recomputing
