"""Frozen ranges: no scale moves while weights train, in any part, and a checkpoint keeps it so."""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig
from lightning_linger.callbacks import FuseBNCallback, QuantizeCallback
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.stages.freeze import is_frozen
from tests.callbacks.boring import Classifier, loader, trainer
from tests.models import Chain, assert_integer_exact


class Net(nn.Module):
    """Layers, a batch norm that is not folded, a layer norm, attention, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.bn = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.slope = nn.PReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(torch.tanh(self.stem(x)))
        y = y + self.attention(y, y, y)[0]
        return self.head(self.slope(self.norm(y)))


def steps_of(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Every step that an evaluation of the model uses, by its tags and weights."""
    found: dict[str, Any] = {}
    model.eval()
    with torch.no_grad():
        model(x)
    for site in instrumentation_of(model).sites:
        for quantizer in site.quantizers():
            if quantizer.known:
                found[quantizer.name] = float(quantizer.step())
            if quantizer.gradient is not None:
                found[quantizer.name + ":gradient"] = quantizer.gradient.estimator.range.tolist()
        for name, value in site.prepared.items():
            codes = getattr(value, "codes", value)
            steps = getattr(codes, "steps", getattr(value, "steps", getattr(value, "step", None)))
            if isinstance(steps, list | float):
                found[f"{site.key}:{name}"] = steps
        for name, node in site.gradients.items():
            found[f"{site.key}:{name}:gradient"] = node.estimator.range.tolist()
    model.train()
    return found


def train(model: nn.Module, x: Tensor, steps: int, lr: float = 0.05) -> None:
    """Train on batches whose size moves every range by much."""
    optimizer = torch.optim.SGD(linger.parameter_groups(model), lr=lr)
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        batch = x * (0.5 + 4 * torch.rand((), generator=generator))
        model(batch).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()


CONFIGS = {
    "power of two": QuantConfig(gradient_bits=8),
    "free": QuantConfig(platform="onnxruntime", gradient_bits=8),
    "per channel": QuantConfig(granularity="channel", weight_range="mse"),
    "learned": QuantConfig(range="lsq", weight_range="lsq"),
    "learned free": QuantConfig(platform="onnxruntime", range="tqt", weight_range="lsq"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_row16_no_scale_moves_in_ten_batches(config: QuantConfig) -> None:
    torch.manual_seed(0)
    model = Net()
    x = torch.randn(6, 4, 6)
    linger.prepare(model, (x,))
    linger.quantize(model, config)
    train(model, x, 3)
    linger.freeze_ranges(model)
    before = steps_of(model, x)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, x, 10)
    assert steps_of(model, x) == before
    learned = linger.learned_ranges(model)
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in learned.items())
    assert not torch.equal(model.head.weight, weights["head.weight"])
    if config.platform == "venusa":
        model.eval()
        assert_integer_exact(model, x)
        model.train()

    linger.freeze_ranges(model, frozen=False)
    train(model, x, 10)
    after = steps_of(model, x)
    assert after.keys() == before.keys()
    # A learned range may move without reaching the next power of two.
    moved = sum(not torch.equal(p, weights[name]) for name, p in learned.items())
    assert moved + sum(after[key] != before[key] for key in before) >= 2
    assert all(p.grad is not None for p in learned.values())


def test_a_checkpoint_stays_frozen() -> None:
    def build() -> tuple[Chain, Tensor]:
        torch.manual_seed(0)
        model = Chain(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        x = torch.randn(5, 6)
        linger.prepare(model, (x,))
        linger.quantize(model, QuantConfig(range="lsq", granularity="channel"))
        return model, x

    model, x = build()
    train(model, x, 2)
    linger.freeze_ranges(model)
    train(model, x, 2)
    state = copy.deepcopy(model.state_dict())
    other, _ = build()
    other.load_state_dict(state)
    assert not any(p.requires_grad for p in linger.learned_ranges(other).values())
    for one in (model, other):
        train(one, x, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert steps_of(model, x) == steps_of(other, x)
    # A state from before freezing lets ranges move again.
    fresh, _ = build()
    train(fresh, x, 1)
    other.load_state_dict(fresh.state_dict())
    assert not any("held" in key for key in other.state_dict())
    assert all(p.requires_grad for p in linger.learned_ranges(other).values())


class Notes(pl.Callback):
    def __init__(self) -> None:
        self.ranges: list[str] = []
        self.frozen: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        own = instrumentation_of(pl_module)
        self.frozen.append(is_frozen(pl_module))
        self.ranges.append(str([b.tolist() for n, b in own.named_buffers() if ".range" in n]))


@pytest.mark.parametrize(
    ("fields", "moving"), [({"freeze_at_epoch": 1}, 3), ({"freeze_at_step": 4}, 4), ({}, 9)]
)
def test_a_run_freezes_at_an_epoch_or_a_step(
    fields: dict[str, int], moving: int, tmp_path: Path
) -> None:
    notes = Notes()
    callbacks = [FuseBNCallback(), QuantizeCallback(**fields), notes]
    trainer(tmp_path, callbacks, 3).fit(Classifier(), loader(), loader(2, shuffle=False))
    assert notes.frozen == [step >= moving for step in range(9)]
    assert len(set(notes.ranges)) == moving


def test_one_start_of_freezing() -> None:
    with pytest.raises(ConfigError, match="one of"):
        QuantizeCallback(freeze_at_epoch=1, freeze_at_step=2)
    with pytest.raises(ConfigError, match="non-negative"):
        QuantizeCallback(freeze_at_epoch=-1)


@pytest.mark.parametrize(
    "fields",
    [
        {"freeze_at_epoch": 1, "at_epoch": 1},
        {"freeze_at_step": 0},
        {"freeze_at_step": 4, "at_step": 4},
    ],
)
def test_ranges_are_not_frozen_before_they_are_seen(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="no range would be seen"):
        QuantizeCallback(**fields)


@pytest.mark.parametrize(
    "fields", [{"freeze_at_step": 3, "at_epoch": 1}, {"freeze_at_epoch": 1, "at_step": 3}]
)
def test_epochs_are_compared_with_steps_once_they_have_a_length(
    fields: dict[str, int], tmp_path: Path
) -> None:
    run = trainer(tmp_path, [QuantizeCallback(**fields)])
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="freeze later"):
        run.fit(Classifier(), loader(), loader(2, shuffle=False))
    assert run.global_step == 0


def kinds(changed: list[str]) -> set[str]:
    """Which parts the names of :func:`steps_of` belong to."""
    return {
        "gradients"
        if name.endswith("gradient")
        else "weights"
        if name.endswith("ights")
        else "acts"
        for name in changed
    }


@pytest.mark.parametrize(
    ("part", "kind"), [("activations", "acts"), ("weights", "weights"), ("gradients", "gradients")]
)
def test_row17_parts_freeze_apart(part: str, kind: str) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(6, 6)
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform="onnxruntime", gradient_bits=8))
    train(model, x, 3)
    linger.freeze_ranges(model, parts=[part])
    assert not is_frozen(model)
    before = steps_of(model, x)
    train(model, x, 6)
    after = steps_of(model, x)
    moved = [name for name in before if before[name] != after[name]]
    assert kinds(moved) == {"acts", "weights", "gradients"} - {kind}


def test_row23_modules_freeze_apart() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    x = torch.randn(6, 6)
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform="onnxruntime", range="lsq", weight_range="lsq"))
    train(model, x, 3)
    linger.freeze_ranges(model, modules=["net.2"])
    before = steps_of(model, x)
    train(model, x, 4)
    after = steps_of(model, x)
    moved = {name for name in before if before[name] != after[name]}
    assert moved
    assert not any("net.2" in name for name in moved)
    still = {name for name, p in linger.learned_ranges(model).items() if not p.requires_grad}
    assert still
    assert all("net:2:0" in name for name in still)
    linger.freeze_ranges(model)
    assert is_frozen(model)
    linger.freeze_ranges(model, frozen=False)
    assert all(p.requires_grad for p in linger.learned_ranges(model).values())


def test_wrong_parts_and_modules() -> None:
    model = Chain(nn.Linear(2, 2))
    linger.prepare(model, (torch.randn(3, 2),))
    linger.quantize(model)
    with pytest.raises(ConfigError, match=r"`parts` must be among.*biases"):
        linger.freeze_ranges(model, parts=["biases"])
    with pytest.raises(ConfigError, match="matches no module"):
        linger.freeze_ranges(model, modules=["ent.0"])
