"""The digits CNN by other libraries, with the data, epochs, optimizer and schedule of ours.

torchao quantizes an exported graph (PT2E), brevitas asks for a network of its own layers. Both are
optional: ``pip install torchao brevitas``.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.recipes import OUTER_BITS, Recipe
from benchmarks.accuracy.tasks import BATCH, Labelled, Task
from benchmarks.accuracy.training import Score, fit, score

# Of `aten.batch_norm`.
TRAINING_ARGUMENT = 5


class Exported(nn.Module):
    """A graph of PT2E, whose modes are switched by functions instead of `train` and `eval`."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)

    def train(self, mode: bool = True) -> Exported:
        from torchao.quantization.pt2e import (
            move_exported_model_to_eval,
            move_exported_model_to_train,
        )

        self.training = mode
        (move_exported_model_to_train if mode else move_exported_model_to_eval)(self.graph)
        return self


def pt2e_config(bits: int) -> Any:
    """Return XNNPACK's settings at a width: asymmetric activations, narrow weights per channel."""
    from torchao.testing.pt2e._xnnpack_quantizer import get_symmetric_quantization_config

    top = 2 ** (bits - 1) - 1
    return get_symmetric_quantization_config(
        is_per_channel=True,
        is_qat=True,
        act_qmin=-top - 1,
        act_qmax=top,
        weight_qmin=-top,
        weight_qmax=top,
    )


def widen_ends(graph: torch.fx.GraphModule, task: Task) -> None:
    """Annotate the input, the weights of the first and last layer and the logits with 8 bits.

    XNNPACK's own settings by module name leave a convolution in float whose batch norm is not in
    the module of that name, and widen what the last layer reads.
    """
    from torchao.testing.pt2e._xnnpack_quantizer import get_module_name_filter

    outer = pt2e_config(OUTER_BITS)
    for name in filter(None, (task.first, task.last)):
        belongs = get_module_name_filter(name)
        for node in graph.graph.nodes:
            annotation = node.meta.get("quantization_annotation")
            if annotation is None or not belongs(node):
                continue
            for operand, spec in annotation.input_qspec_map.items():
                if operand.op == "get_attr" and spec is not None:
                    annotation.input_qspec_map[operand] = outer.weight
                if operand.op == "placeholder":
                    annotation.input_qspec_map[operand] = outer.input_activation
            if name == task.last and annotation.output_qspec is not None:
                annotation.output_qspec = outer.output_activation


class Freeze(pl.Callback):
    """Lets the statistics of a graph's batch norms and its ranges stand still from an epoch on."""

    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from torchao.quantization.pt2e import disable_observer

        if trainer.current_epoch != self.epoch:
            return
        graph = pl_module.network.graph
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.batch_norm.default:
                node.update_arg(TRAINING_ARGUMENT, False)
        graph.recompile()
        graph.apply(disable_observer)


@functools.cache
def prepared_graph(task: Task, bits: int) -> nn.Module:
    """Return the graph of a task's network with PT2E's fake quantizers, placed by XNNPACK's."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer

    class Quantizer(XNNPACKQuantizer):
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            widen_ends(super().annotate(model), task)
            return model

    examples = task.data(0)[0][0][:BATCH]
    shapes = ({0: torch.export.Dim("batch", min=2, max=4096)},)
    exported = torch.export.export(task.network().train(), (examples,), dynamic_shapes=shapes)
    return prepare_qat_pt2e(exported.module(), Quantizer().set_global(pt2e_config(bits)))


def torchao(
    recipe: Recipe, task: Task, network: nn.Module, data: tuple[Labelled, Labelled], seed: int
) -> Score:
    """Fine-tune by PT2E QAT, and measure with the ranges that training ended with."""
    from torchao.quantization.pt2e import disable_observer

    graph = copy.deepcopy(prepared_graph(task, recipe.bits))
    graph.load_state_dict(network.state_dict(), strict=False)
    freeze = Freeze(recipe.statistics_frozen_from(task))
    learner = fit(Exported(graph), data, seed, task.tuning_epochs, task.tuning_rate, [freeze])
    graph.apply(disable_observer)
    return score(learner, data[1])


def brevitas_digits(bits: int, steps_per_epoch: int) -> nn.Module:
    """Return the digits CNN in brevitas' layers, with the layer names of the float network."""
    import brevitas.nn as qnn
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import (
        Int8ActPerTensorFloat,
        Int8WeightPerChannelFloat,
        Uint8ActPerTensorFloat,
    )

    class Weight(Int8WeightPerChannelFloat):
        scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS

    class Signed(Int8ActPerTensorFloat):
        collect_stats_steps = steps_per_epoch

    class Unsigned(Uint8ActPerTensorFloat):
        collect_stats_steps = steps_per_epoch

    def conv(*shape: int, width: int = bits, **arguments: Any) -> nn.Module:
        return qnn.QuantConv2d(*shape, weight_quant=Weight, weight_bit_width=width, **arguments)

    def relu() -> nn.Module:
        return qnn.QuantReLU(act_quant=Unsigned, bit_width=bits)

    def identity(width: int = bits) -> nn.Module:
        return qnn.QuantIdentity(act_quant=Signed, bit_width=width)

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv1 = conv(channels, channels, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.relu1 = relu()
            self.conv2 = conv(channels, channels, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.branch = identity()
            self.relu2 = relu()

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu1(self.bn1(self.conv1(x)))
            return self.relu2(x + self.branch(self.bn2(self.conv2(y))))

    class Digits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input = identity(OUTER_BITS)
            self.stem = conv(1, 16, 3, width=OUTER_BITS, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(16)
            self.relu = relu()
            self.block1 = Block(16)
            self.down = conv(16, 32, 3, stride=2, padding=1, bias=False)
            self.bn_down = nn.BatchNorm2d(32)
            self.relu_down = relu()
            self.block2 = Block(32)
            self.wide = conv(32, 16, 1)
            self.relu_wide = relu()
            self.pooled = identity()
            self.fc = qnn.QuantLinear(
                48, 10, bias=True, weight_quant=Weight, weight_bit_width=OUTER_BITS
            )
            self.logits = identity(OUTER_BITS)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.bn(self.stem(self.input(x))))
            x = self.block1(x)
            x = self.relu_down(self.bn_down(self.down(x)))
            x = self.block2(x)
            x = torch.cat([x, self.relu_wide(self.wide(x))], dim=1)
            return self.logits(self.fc(self.pooled(F.adaptive_avg_pool2d(x, 1).flatten(1))))

    return Digits()


def brevitas(
    recipe: Recipe, task: Task, network: nn.Module, data: tuple[Labelled, Labelled], seed: int
) -> Score:
    """Fine-tune by brevitas: every scale learned from its first statistics, unsigned ReLUs."""
    if task.name != "digits":
        msg = f"there is no network of brevitas' layers for {task.name!r}."
        raise ValueError(msg)
    quantized = brevitas_digits(recipe.bits, steps_per_epoch=len(data[0][1]) // BATCH)
    quantized.load_state_dict(network.state_dict(), strict=False)
    learner = fit(quantized, data, seed, task.tuning_epochs, task.tuning_rate)
    return score(learner, data[1])


Peer = Callable[[Recipe, Task, nn.Module, tuple[Labelled, Labelled], int], Score]
PEER_RUNS: dict[str, Peer] = {"torchao": torchao, "brevitas": brevitas}


def why_missing(name: str) -> str | None:
    """Return why a library cannot be used, None where it can."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return str(error)
    return None
