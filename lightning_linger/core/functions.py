"""One canonical name for the many spellings of a torch function.

``x + y`` arrives in a function mode as ``torch.Tensor.add``, ``torch.add`` or a dunder of
``torch._C.TensorBase``, depending on how it was written and on who traces. The table maps every
function *object* to its op, because names do not survive tracing and a single object per op would
silently lose call sites.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

TorchFunction = Callable[..., Any]


@dataclass(frozen=True)
class Canonical:
    """What a torch function means.

    Args:
        op: Canonical op name, e.g. ``add``; empty for a function the library has no op for.
        inplace: Whether the first operand is overwritten (``add_``, ``+=``).
        swapped: Whether the operands are reversed (``__rsub__``).
        query: Whether it asks a tensor about itself without reading its values.
    """

    op: str
    inplace: bool = False
    swapped: bool = False
    query: bool = False


# canonical op -> the function names under which it is found in the namespaces below
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "conv1d": ("conv1d",),
    "conv2d": ("conv2d",),
    "conv3d": ("conv3d",),
    "conv_transpose1d": ("conv_transpose1d",),
    "conv_transpose2d": ("conv_transpose2d",),
    "conv_transpose3d": ("conv_transpose3d",),
    "linear": ("linear",),
    "batch_norm": ("batch_norm",),
    "relu": ("relu",),
    "relu6": ("relu6",),
    "hardtanh": ("hardtanh",),
    "clamp": ("clamp", "clip"),
    "clamp_min": ("clamp_min",),
    "clamp_max": ("clamp_max",),
    "sigmoid": ("sigmoid",),
    "add": ("add", "__add__"),
    "sub": ("sub", "subtract", "__sub__"),
    "mul": ("mul", "multiply", "__mul__"),
    "cat": ("cat", "concat", "concatenate"),
    "avg_pool1d": ("avg_pool1d",),
    "avg_pool2d": ("avg_pool2d",),
    "avg_pool3d": ("avg_pool3d",),
    "adaptive_avg_pool1d": ("adaptive_avg_pool1d",),
    "adaptive_avg_pool2d": ("adaptive_avg_pool2d",),
    "adaptive_avg_pool3d": ("adaptive_avg_pool3d",),
    "max_pool1d": ("max_pool1d",),
    "max_pool2d": ("max_pool2d",),
    "max_pool3d": ("max_pool3d",),
    "mean": ("mean",),
    "dropout": ("dropout", "dropout1d", "dropout2d", "dropout3d"),
    "pad": ("pad", "constant_pad_nd"),
    "flatten": ("flatten",),
    "unflatten": ("unflatten",),
    "reshape": ("reshape", "reshape_as"),
    "view": ("view", "view_as"),
    "permute": ("permute",),
    "transpose": ("transpose", "swapaxes", "swapdims", "t", "movedim", "moveaxis"),
    "squeeze": ("squeeze",),
    "unsqueeze": ("unsqueeze",),
    "slice": ("__getitem__", "select", "narrow", "index_select"),
    "chunk": ("chunk", "tensor_split"),
    "split": ("split", "split_with_sizes", "unbind"),
    "contiguous": ("contiguous", "clone", "detach"),
}
# Spelled as an attribute rather than a call.
_PROPERTIES: dict[str, tuple[str, ...]] = {"transpose": ("T", "mT", "H", "mH")}

_INPLACE_DUNDERS = {"add": "__iadd__", "sub": "__isub__", "mul": "__imul__"}
_REVERSED_DUNDERS = {"add": "__radd__", "sub": "__rsub__", "mul": "__rmul__"}


def _namespaces() -> Iterator[Any]:
    yield torch
    yield F
    yield torch.Tensor
    yield torch._C.TensorBase
    yield torch._C._nn
    yield torch._C._VariableFunctions


def _find(name: str) -> Iterator[TorchFunction]:
    for namespace in _namespaces():
        function = getattr(namespace, name, None)
        if function is not None:
            yield function


def _build_table() -> dict[TorchFunction, Canonical]:
    table: dict[TorchFunction, Canonical] = {}
    for op, names in _SPELLINGS.items():
        for name in names:
            for function in _find(name):
                table.setdefault(function, Canonical(op))
            if not name.startswith("__"):
                for function in _find(name + "_"):
                    table.setdefault(function, Canonical(op, inplace=True))
    for op, name in _INPLACE_DUNDERS.items():
        for function in _find(name):
            table[function] = Canonical(op, inplace=True)
    for op, name in _REVERSED_DUNDERS.items():
        for function in _find(name):
            table[function] = Canonical(op, swapped=op == "sub")
    # torch.rsub(x, y) is y - x
    for function in _find("rsub"):
        table[function] = Canonical("sub", swapped=True)
    for op, names in _PROPERTIES.items():
        for name in names:
            table[getattr(torch.Tensor, name).__get__] = Canonical(op)
    return table


def _mutating() -> Iterator[TorchFunction]:
    yield torch.Tensor.__setitem__
    for namespace in _namespaces():
        for name in dir(namespace):
            inplace_dunder = name.startswith("__i") and name.endswith("__")
            inplace_method = name.endswith("_") and not name.startswith("_")
            if (inplace_dunder or inplace_method) and name not in _NOT_MUTATING:
                function = getattr(namespace, name)
                if callable(function):
                    yield function


# In-place by name, but they leave the values alone.
_NOT_MUTATING = {"requires_grad_", "detach_", "rename_", "share_memory_", "__init__", "__index__"}


def _queries() -> Iterator[TorchFunction]:
    for name in (
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset"),
        *("is_complex", "is_floating_point", "is_contiguous", "element_size", "get_device"),
        *("__len__", "data_ptr"),
    ):
        yield from _find(name)
    for name in (
        *("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_sparse"),
        *("is_leaf", "requires_grad", "grad_fn", "is_quantized", "is_meta", "is_mps", "is_nested"),
    ):
        yield getattr(torch.Tensor, name).__get__


# A dictionary, because a graph capture looks functions up in dictionaries but not in sets.
CANONICAL: dict[TorchFunction, Canonical] = {
    **{function: Canonical("", inplace=True) for function in _mutating()},
    **{function: Canonical("", query=True) for function in _queries()},
    **_build_table(),
}
