"""What a layer is given in the quantized model, and what it should give."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.instrumentation import Instrumentation
from lightning_linger.core.quantizer import Window
from lightning_linger.core.sites import Site
from lightning_linger.ops.activation import ClampOp, has_tensor_bounds, window_of
from lightning_linger.stages.forwards import (
    Forward,
    call_of,
    float_result,
    quantized_input,
)


@dataclass(frozen=True)
class LayerData:
    """What a layer is given and what it should give, batch by batch.

    Args:
        call: A bound call of the layer.
        inputs: On the grid.
        targets: In float, as the follower lets them through.
        step_x: Step of the inputs.
        window: What the follower lets through.
    """

    call: Any
    inputs: list[Tensor]
    targets: list[Tensor]
    step_x: Scalar
    window: Window

    @staticmethod
    def collect(
        instrumentation: Instrumentation,
        site: Site,
        forwards: Sequence[Forward],
        originals: dict[Tensor, Tensor],
    ) -> LayerData | None:
        """Run the float model, with its original weights, and the quantized one up to a layer."""
        window = _window_behind(instrumentation, site)
        inputs: list[Tensor] = []
        targets: list[Tensor] = []
        last: Any = None
        step_x: Scalar = 0.0
        for forward in forwards:
            with parameter_values(originals):
                real = call_of(instrumentation, site, forward, "float")
            call = call_of(instrumentation, site, forward, "fake")
            given = None if call is None else quantized_input(site, call)
            if real is None or given is None:
                continue
            targets.append(float_result(site, real).clamp(window.low, window.high))
            last, (x, step_x) = call, given
            inputs.append(x)
        return None if last is None else LayerData(last, inputs, targets, step_x, window)

    def __len__(self) -> int:
        return len(self.inputs)

    def power(self) -> float:
        """Return the mean square of the targets."""
        return self.mean([float(y.double().square().sum()) for y in self.targets])

    def mean(self, sums: list[float]) -> float:
        """Return the mean over all targets of what was summed up batch by batch."""
        return sum(sums) / max(sum(tensor.numel() for tensor in self.targets), 1)


@contextlib.contextmanager
def parameter_values(values: dict[Tensor, Tensor]) -> Iterator[None]:
    """Give parameters other values for a while."""
    kept = {parameter: parameter.clone() for parameter in values}
    for parameter, value in values.items():
        parameter.copy_(value)
    try:
        yield
    finally:
        for parameter, value in kept.items():
            parameter.copy_(value)


def _window_behind(instrumentation: Instrumentation, site: Site) -> Window:
    """Return what the activation lets through that alone reads a layer, or its batch norm."""
    graph = instrumentation.graph
    follower = graph.sole_consumer(site.key)
    if site.active_fold is not None and follower is not None:
        follower = graph.sole_consumer(follower.key)
    if follower is None or follower.key not in instrumentation:
        return Window()
    clamp = instrumentation.find(follower.key)
    if not isinstance(clamp.op, ClampOp) or has_tensor_bounds(clamp.recorded_call):
        return Window()
    return window_of(clamp.recorded_call)
