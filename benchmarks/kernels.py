"""Fake quantization in multiples of a memory copy of the same size."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Call, Effort, Row, compare, meter
from lightning_linger.core.fake_quantize import fake_quantize

STEP = 2.0**-5
LOW, HIGH = -128, 127


def fake_quantize_linger(x: Tensor) -> Tensor:
    """Fake-quantize with the library."""
    return fake_quantize(x, STEP, LOW, HIGH, rounding="half_up")


def fake_quantize_torch(x: Tensor) -> Tensor:
    """Fake-quantize with PyTorch's own kernel."""
    return torch.fake_quantize_per_tensor_affine(x, STEP, 0, LOW, HIGH)


Kernel = Callable[[Tensor], Tensor]
KERNELS: dict[str, Kernel] = {"linger": fake_quantize_linger, "torch": fake_quantize_torch}


def forward_backward(kernel: Kernel, x: Tensor, gradient: Tensor) -> None:
    """Run a kernel and its backward."""
    torch.autograd.grad(kernel(x), x, gradient)


def measure_size(size: int, rounds: int) -> list[Row]:
    """Compare the kernels, alone and with their backward, on ``size`` elements."""
    torch.manual_seed(0)
    source, gradient = torch.randn(size), torch.randn(size)
    x = source.clone().requires_grad_()
    copy = partial(torch.empty_like(source).copy_, source)

    calls: dict[str, Call] = {"copy": copy}
    for name, kernel in KERNELS.items():
        calls[f"{name} forward"] = partial(kernel, source)
        calls[f"{name} forward + backward"] = partial(forward_backward, kernel, x, gradient)
    return compare(
        f"fake quantize of {size:.0e} elements / memory copy",
        meter(copy),
        {name: meter(call) for name, call in calls.items()},
        rounds,
    )


def measure(effort: Effort) -> list[Row]:
    """Compare the kernels in and beyond the caches."""
    sizes = [10**6] if effort.quick else [10**6, 10**7]
    return [row for size in sizes for row in measure_size(size, effort.rounds)]
