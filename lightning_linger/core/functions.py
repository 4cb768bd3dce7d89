"""One canonical name for the many spellings of a torch function.

``x + y`` arrives in a function mode as ``torch.Tensor.add``, ``torch.add`` or a dunder of
``torch._C.TensorBase``, depending on how it was written and on who traces. The table maps every
function *object* to its op, because names do not survive tracing and a single object per op would
silently lose call sites.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

P = ParamSpec("P")
R = TypeVar("R")

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


def name_functions(
    op: str,
    spellings: Sequence[str],
    properties: Sequence[str] = (),
    commutative: bool = False,
    swapped: bool = False,
) -> None:
    """Let an op stand for every function that carries one of its names.

    Args:
        op: Canonical op name.
        spellings: Names of functions. ``name_`` is found too, as the call that works in place, and
            with ``__name__`` also ``__iname__`` and ``__rname__``.
        properties: Names of tensor properties that mean the op, e.g. ``T``.
        commutative: Whether the order of the operands does not matter.
        swapped: Whether the functions take the operands in reverse.

    Raises:
        ValueError: If no function of any of the names exists, or another op has one.
    """
    found: dict[TorchFunction, Canonical] = {}
    for name in spellings:
        if name.startswith("__"):
            found |= dict.fromkeys(_find(name), Canonical(op))
            found |= dict.fromkeys(_find(f"__i{name[2:]}"), Canonical(op, inplace=True))
            reverse = Canonical(op, swapped=not commutative)
            found |= dict.fromkeys(_find(f"__r{name[2:]}"), reverse)
        else:
            found |= dict.fromkeys(_find(name), Canonical(op, swapped=swapped))
            found |= dict.fromkeys(_find(f"{name}_"), Canonical(op, inplace=True))
    for name in properties:
        found[getattr(torch.Tensor, name).__get__] = Canonical(op)
    if not found:
        msg = f"torch has no function of the names {list(spellings)} for the op {op!r}."
        raise ValueError(msg)
    name_function_objects(op, found)


def name_function_objects(op: str, found: Mapping[TorchFunction, Canonical]) -> None:
    """Let an op stand for the given functions.

    Raises:
        ValueError: If another op has one of them.
    """
    for function in found:
        taken = canonical_of(function)
        if taken is not None and taken.op not in ("", op):
            msg = f"the function {function!r} belongs to the op {taken.op!r} already, not {op!r}."
            raise ValueError(msg)
    CANONICAL.update({f: canonical for f, canonical in found.items() if not _is_wrapper(f)})
    wrappers = {f: canonical for f, canonical in found.items() if _is_wrapper(f)}
    WRAPPERS[:] = [(f, canonical) for f, canonical in WRAPPERS if f not in wrappers]
    WRAPPERS.extend(wrappers.items())


def canonical_of(function: TorchFunction) -> Canonical | None:
    """Return what a function means, None for one that nobody has named."""
    found = CANONICAL.get(function)
    if found is None:
        for wrapper, canonical in WRAPPERS:
            if function is wrapper:
                return canonical
    return found


def forget_functions(op: str) -> None:
    """Let no function mean an op any more."""
    for function in [f for f, canonical in CANONICAL.items() if canonical.op == op]:
        del CANONICAL[function]
    WRAPPERS[:] = [(f, canonical) for f, canonical in WRAPPERS if canonical.op != op]


def operator(function: Callable[P, R]) -> Callable[P, R]:
    """Make a Python function one op, instead of the torch functions that it calls.

    Decorate the function and register an op for the decorated one
    (``register(MyOp("squash"), functions=[squash])``). Where no op is registered for it, or no
    stage is on, it runs as it was written.

    Args:
        function: Takes tensors among its arguments, directly or in lists and tuples.
    """

    @functools.wraps(function)
    def visible(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = tuple(_tensors_among((*args, *kwargs.values())))
        if has_torch_function(tensors):
            found: R = handle_torch_function(visible, tensors, *args, **kwargs)
            return found
        return function(*args, **kwargs)

    return visible


def _tensors_among(values: Iterable[object]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_among(value)


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


def _is_wrapper(function: TorchFunction) -> bool:
    """Whether it is one of the few methods (``__pow__``, ``__rsub__``) that torch wraps in Python.

    ``torch.compile`` does not find these in a dictionary, though they are there.
    """
    inside = getattr(function, "__wrapped__", None) is not None
    return inside and getattr(function, "__module__", None) == torch._tensor.__name__


# A dictionary, because a graph capture looks functions up in dictionaries but not in sets.
CANONICAL: dict[TorchFunction, Canonical] = {
    **{function: Canonical("", inplace=True) for function in _mutating()},
    **{function: Canonical("", query=True) for function in _queries()},
}
# The functions that have to be compared one by one; see `_is_wrapper`.
WRAPPERS: list[tuple[TorchFunction, Canonical]] = [
    (function, CANONICAL.pop(function)) for function in list(CANONICAL) if _is_wrapper(function)
]
