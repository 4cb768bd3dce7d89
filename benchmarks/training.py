"""Training steps, evaluation forwards and saved bytes of each stage against the float model."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_linger as linger
from benchmarks.measure import Call, Effort, Row, compare, meter
from benchmarks.models import DSCNN, MobileNetV2, ResNet20


@dataclass(frozen=True)
class Workload:
    """A model, the number of its classes and the shape of the batch it trains on."""

    model: Callable[[], nn.Module]
    classes: int
    shape: tuple[int, ...]

    def create(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Return the model, a batch and its targets, the same at each call."""
        torch.manual_seed(0)
        x = torch.randn(self.shape)
        return self.model(), x, torch.randint(self.classes, self.shape[:1])


WORKLOADS = {
    "resnet20": Workload(ResNet20, 10, (64, 3, 32, 32)),
    "ds_cnn": Workload(DSCNN, 12, (100, 1, 49, 10)),
    "mobilenet_v2": Workload(MobileNetV2, 10, (16, 3, 96, 96)),
}

Stage = Callable[[nn.Module, Tensor], None]


def leave_float(model: nn.Module, x: Tensor) -> None:
    """Change nothing: the noise floor."""


def prepare(model: nn.Module, x: Tensor) -> None:
    """Find the sites; every stage stays off."""
    linger.prepare(model, (x,))


def fold(model: nn.Module, x: Tensor) -> None:
    """Fold the batch norms."""
    prepare(model, x)
    linger.fuse_bn(model)


def constrain(model: nn.Module, x: Tensor) -> None:
    """Fold the batch norms and constrain weights, biases and outputs."""
    fold(model, x)
    linger.normalize(model, weight=8.0, bias=8.0, output=8.0)


def quantize(model: nn.Module, x: Tensor) -> None:
    """Fold the batch norms and quantize."""
    fold(model, x)
    linger.quantize(model, linger.QuantConfig(platform="venusa"))


STAGES: dict[str, Stage] = {
    "float": leave_float,
    "stages off": prepare,
    "BN folded": fold,
    "constrained": constrain,
    "QAT": quantize,
}


def staged(model: nn.Module, x: Tensor, stage: Stage) -> nn.Module:
    """Return a copy of ``model`` in a stage."""
    ours = copy.deepcopy(model)
    stage(ours, x)
    return ours


def training_step(model: nn.Module, x: Tensor, target: Tensor) -> Call:
    """Return a whole training step of ``model``."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def evaluation(model: nn.Module, x: Tensor) -> Call:
    """Return an evaluation forward of ``model``."""
    model.eval()

    def forward() -> None:
        with torch.no_grad():
            model(x)

    return forward


def integer_evaluation(model: nn.Module, x: Tensor) -> Call:
    """Return an evaluation forward in integers, entering integer mode included."""
    forward = evaluation(model, x)

    def integer_forward() -> None:
        with linger.integer(model):
            forward()

    return integer_forward


def saved_bytes(model: nn.Module, x: Tensor, target: Tensor) -> int:
    """Return the bytes autograd keeps for one training forward, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The loss keeps the graph alive: no storage is freed and its address reused meanwhile.
        loss = F.cross_entropy(model(x), target)
    del loss
    return sum(storages.values())


def measure(name: str, effort: Effort) -> list[Row]:
    """Compare the stages of one workload, first in training, then in evaluation."""
    model, x, target = WORKLOADS[name].create()
    baseline = staged(model, x, leave_float)
    models = {label: staged(model, x, stage) for label, stage in STAGES.items()}

    step = meter(training_step(baseline, x, target))
    steps = {label: meter(training_step(ours, x, target)) for label, ours in models.items()}
    # The steps of the warm-up are behind us: every range is known and every stage really on.
    kept = {label: saved_bytes(ours, x, target) for label, ours in models.items()}
    notes = {
        label: f"keeps {count / 2**20:.1f} MiB for backward, {count / kept['float']:.2f}x"
        for label, count in kept.items()
    }
    rows = compare(f"{name} training step / float", step, steps, effort.rounds, notes)

    forwards = {
        "float": meter(evaluation(models["float"], x)),
        "QAT": meter(evaluation(models["QAT"], x)),
        "integer": meter(integer_evaluation(models["QAT"], x)),
    }
    forward = meter(evaluation(baseline, x))
    return rows + compare(f"{name} evaluation / float", forward, forwards, effort.rounds)


def measure_compiled(name: str, effort: Effort) -> list[Row]:
    """Compare QAT with float where both are compiled."""
    model, x, target = WORKLOADS[name].create()

    def compiled(stage: Stage) -> nn.Module:
        return cast(nn.Module, torch.compile(staged(model, x, stage)))

    baseline = compiled(leave_float)
    models = {"float": compiled(leave_float), "QAT": compiled(quantize)}
    step = meter(training_step(baseline, x, target))
    steps = {label: meter(training_step(ours, x, target)) for label, ours in models.items()}
    rows = compare(f"{name} compiled training step / compiled float", step, steps, effort.rounds)

    forward = meter(evaluation(baseline, x))
    forwards = {label: meter(evaluation(ours, x)) for label, ours in models.items()}
    group = f"{name} compiled evaluation / compiled float"
    return rows + compare(group, forward, forwards, effort.rounds)
