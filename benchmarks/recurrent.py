"""Recurrent layers in training and evaluation, however they step, against the float layer."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lightning_linger as linger
from benchmarks.measure import Call, Effort, Row, compare, meter
from benchmarks.training import evaluation, integer_evaluation
from lightning_linger.core.config import RNNFusion


@dataclass(frozen=True)
class Workload:
    """One layer on sequences, ``batch`` of them at a time."""

    kind: str
    steps: int
    size: int
    batch: int = 32

    def create(self) -> tuple[nn.Module, Tensor]:
        """Return the layer and a batch, the same at each call."""
        torch.manual_seed(0)
        layer: type[nn.Module] = getattr(nn, self.kind)
        x = torch.randn(self.batch, self.steps, self.size)
        return layer(self.size, self.size, batch_first=True), x


WORKLOADS = {
    "lstm": Workload("LSTM", steps=50, size=64),
    "gru": Workload("GRU", steps=50, size=64),
    "lstm_wide": Workload("LSTM", steps=50, size=256),
}


def quantized(
    model: nn.Module, x: Tensor, platform: str = "venusa", fused: RNNFusion = True
) -> nn.Module:
    """Return a quantized copy."""
    ours = linger.prepare(copy.deepcopy(model), (x,))
    return linger.quantize(ours, linger.QuantConfig(platform=platform, fused_rnn=fused))


def constrained(model: nn.Module, x: Tensor, fused: bool = True) -> nn.Module:
    """Return a copy with range limits; step by step where asked."""
    ours = linger.normalize(linger.prepare(copy.deepcopy(model), (x,)))
    return ours if fused else StepByStep(ours)


class StepByStep(nn.Module):
    """Runs a model without fusing its recurrent layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> object:
        """Run the model."""
        with linger.fused_rnn(False):
            return self.model(x)


def compiled(call: Call) -> Call:
    """Return a call that compiles the steps of recurrent layers."""

    def run() -> object:
        with linger.fused_rnn("compiled"):
            return call()

    return run


def training_step(model: nn.Module, x: Tensor) -> Call:
    """Return a whole training step on the mean square of the outputs."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()

    return step


def measure_workload(name: str, effort: Effort) -> list[Row]:
    """Compare stages, platforms and the fused switch on one layer."""
    model, x = WORKLOADS[name].create()
    models = {
        "float": copy.deepcopy(model),
        "constrained": constrained(model, x),
        "constrained, step by step": constrained(model, x, fused=False),
        "QAT venusa": quantized(model, x),
        "QAT venusa, step by step": quantized(model, x, fused=False),
        "QAT venusa, compiled": quantized(model, x, fused="compiled"),
        "QAT onnxruntime": quantized(model, x, "onnxruntime"),
        "QAT onnxruntime, step by step": quantized(model, x, "onnxruntime", fused=False),
    }
    baseline = meter(training_step(model, x))
    steps = {label: meter(training_step(ours, x)) for label, ours in models.items()}
    rows = compare(f"{name} training step / float", baseline, steps, effort.rounds)

    forwards = {label: meter(evaluation(ours, x)) for label, ours in models.items()}
    for platform in ("venusa", "onnxruntime"):
        label = f"integer {platform}"
        ours = models[f"QAT {platform}"]
        forwards[label] = meter(integer_evaluation(ours, x))
        stepwise = models[f"QAT {platform}, step by step"]
        forwards[f"{label}, step by step"] = meter(integer_evaluation(stepwise, x))
        forwards[f"{label}, compiled"] = meter(compiled(integer_evaluation(ours, x)))
    forward = meter(evaluation(model, x))
    return rows + compare(f"{name} evaluation / float", forward, forwards, effort.rounds)


def measure(effort: Effort) -> list[Row]:
    """Compare on every workload; the wide one only where time allows."""
    names = [name for name in WORKLOADS if not (effort.quick and name.endswith("wide"))]
    return [row for name in names for row in measure_workload(name, effort)]
