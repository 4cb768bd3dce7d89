"""Exporting a model in training, at every stage: the file is that stage's, training goes on as if
nothing had been.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.callbacks import (
    FuseBNCallback,
    NormalizeCallback,
    ONNXExportCallback,
    QuantizeCallback,
)
from tests.callbacks.boring import Classifier, loader, trainer
from tests.models import ResNet, images, trained

STAGES: dict[str, Callable[[nn.Module], Any]] = {
    "float": lambda model: model,
    "folded": linger.fuse_bn,
    "constrained": lambda model: linger.normalize(linger.fuse_bn(model), 0.5, 0.5, 1.5),
    "quantized": lambda model: linger.quantize(
        linger.normalize(linger.fuse_bn(model)), linger.QuantConfig(platform="onnxruntime")
    ),
}
each_stage = pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=[pytest.mark.slow] * (s == "folded")) for s in STAGES]
)
each_platform = pytest.mark.parametrize(
    "platform", ["venusa", pytest.param("onnxruntime", marks=pytest.mark.slow)]
)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        # Data come from all three generators, dropout from torch's.
        x = torch.randn(4, 3, 12, 12) * random.uniform(0.5, 1.5) + np.random.normal()
        model(x).square().mean().backward()
        optimizer.step()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights, buffers, gradients, optimizer state and the state of every generator."""
    found = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    for state in optimizer.state_dict()["state"].values():
        found += [torch.as_tensor(value) for value in state.values()]
    found.append(torch.get_rng_state())
    found.append(torch.tensor(random.getstate()[1]))
    found.append(torch.from_numpy(np.random.get_state()[1].astype(np.int64)))
    return [x.detach().clone() for x in found]


def run(stage: str, path: Path | None) -> list[list[Tensor]]:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    model = linger.prepare(ResNet(dropout=0.3), (images(),))
    STAGES[stage](model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    steps(model, optimizer, 2)
    seen = []
    if path is not None:
        state = torch.get_rng_state()
        example = images()
        torch.set_rng_state(state)
        linger.export_onnx(model, (example,), path, "qdq")
        assert all(module.training for module in model.modules())
    seen.append(everything(model, optimizer))
    steps(model, optimizer, 3)
    seen.append(everything(model, optimizer))
    return seen


@each_stage
def test_training_goes_on_with_the_same_bits(stage: str, tmp_path: Path) -> None:
    plain, exported = run(stage, None), run(stage, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").exists()
    for before, after in zip(plain, exported, strict=True):
        assert len(before) == len(after)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@each_stage
def test_the_file_holds_the_mathematics_of_the_stage(stage: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = linger.prepare(ResNet(), (images(),))
    STAGES[stage](model)
    steps(model, torch.optim.SGD(model.parameters(), 0.05), 3)
    x = images()
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq")
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert ("QuantizeLinear" in ops) == (stage == "quantized")
    assert ("Clip" in ops) == (stage == "constrained")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        expected = model.eval()(x).numpy()
    step = 0.0 if stage != "quantized" else float(np.abs(np.diff(np.unique(expected))).min())
    assert np.abs(found - expected).max() <= 1e-5 + 1.01 * step


class Watched(Classifier):
    """Keeps its optimizer's state, which a Trainer has at the end of fit only."""

    def on_train_end(self) -> None:
        state = self.trainer.optimizers[0].state_dict()["state"]
        self.optimizer_state = [torch.as_tensor(v) for s in state.values() for v in s.values()]
        self.rng_state = torch.get_rng_state()


def test_a_trainer_goes_on_with_the_same_bits_through_all_stages(tmp_path: Path) -> None:
    def fit(*more: Any) -> Watched:
        pl.seed_everything(11, verbose=False)
        model = Watched(dropout=0.3)
        stages = [FuseBNCallback(at_epoch=1), NormalizeCallback(at_epoch=2, weight=0.4)]
        callbacks = [*stages, QuantizeCallback(at_epoch=3), *more]
        trainer(tmp_path, callbacks, epochs=5).fit(model, loader())
        return model

    export = ONNXExportCallback(tmp_path / "{epoch}.onnx", at_epoch=[0, 1, 2, 3], verify=False)
    plain, exported = fit(), fit(export)
    assert [path.name for path in export.exported] == [f"{epoch}.onnx" for epoch in range(4)]
    pairs = [
        *zip(plain.state_dict().values(), exported.state_dict().values(), strict=True),
        *zip(plain.optimizer_state, exported.optimizer_state, strict=True),
        *zip(plain.losses, exported.losses, strict=True),
        (plain.rng_state, exported.rng_state),
    ]
    assert all(torch.equal(a, b) for a, b in pairs)


# --- other ways out -----------------------------------------------------------------------------


@each_platform
def test_a_traced_integer_model_is_saved_and_loaded(platform: str, tmp_path: Path) -> None:
    x = images()
    model = trained(ResNet(), x, config=linger.QuantConfig(platform=platform), fold="running")
    with torch.no_grad(), linger.integer(model):
        expected = model(x)
        traced = torch.jit.trace(model, x, check_trace=False)
    torch.jit.save(traced, tmp_path / "m.pt")
    loaded = torch.jit.load(tmp_path / "m.pt")
    assert torch.equal(loaded(x), expected)
    other = images()
    with torch.no_grad(), linger.integer(model):
        assert torch.equal(loaded(other), model(other))


@each_platform
def test_an_exported_integer_program_is_saved_and_loaded(platform: str, tmp_path: Path) -> None:
    x = images()
    model = trained(ResNet(), x, config=linger.QuantConfig(platform=platform), fold="running")
    with torch.no_grad(), linger.integer(model):
        model(x)
        program = torch.export.export(model, (x,), strict=False)
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    other = images()
    with torch.no_grad(), linger.integer(model):
        assert torch.equal(loaded(other), model(other))
