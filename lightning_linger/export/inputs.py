"""The arguments of a forward as a flat list of named tensors."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from lightning_linger.core.errors import ConfigError

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Inputs:
    """What a model's forward is called with; everything but its tensors stays as it is.

    Args:
        model: The model.
        args: Positional inputs.
        kwargs: Keyword inputs.

    Attributes:
        tensors: The tensors in the order of the parameters of ``forward``.
        names: A name for each: that of the parameter, with what leads to the tensor inside it.

    Raises:
        ConfigError: If the arguments do not fit ``forward``.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._signature = inspect.signature(model.forward)
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            msg = f"`args` and `kwargs` do not fit {type(model).__name__}.forward: {error}."
            raise ConfigError(msg) from error
        paths, self._spec = tree_flatten_with_path(dict(bound.arguments))
        self._leaves = [leaf for _, leaf in paths]
        self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        # What `*args` and `**kwargs` collect needs no common prefix.
        variadic = {p.name for p in self._signature.parameters.values() if p.kind in _VARIADIC}
        tensor_paths = [path for path, leaf in paths if isinstance(leaf, Tensor)]
        named = [path[1:] if _part(path[0]) in variadic else path for path in tensor_paths]
        self.names = unique_names([path_name(path, "input") for path in named])

    def bind(self, tensors: Sequence[Tensor]) -> inspect.BoundArguments:
        """Return the arguments with other tensors in the place of the given ones."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        arguments: dict[str, Any] = tree_unflatten(leaves, self._spec)
        return inspect.BoundArguments(self._signature, OrderedDict(arguments))


def path_name(path: Sequence[Any], what: str) -> str:
    """Return a name for what stands at a path of keys, indices and attributes."""
    parts = [_part(key) for key in path]
    if not parts or parts[0].isdigit():
        parts.insert(0, what)
    return "_".join(parts)


def unique_names(names: Iterable[str]) -> list[str]:
    """Number names that occur more than once."""
    seen: set[str] = set()
    result = []
    for name in names:
        candidate, count = name, 1
        while candidate in seen:
            candidate, count = f"{name}_{count}", count + 1
        seen.add(candidate)
        result.append(candidate)
    return result


def _part(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
