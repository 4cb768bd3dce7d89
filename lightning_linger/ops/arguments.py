"""Small helpers to normalise the arguments of torch functions."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def to_tuple(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    """Expand an int, or a sequence of one, to ``length`` entries."""
    if isinstance(value, int):
        return (value,) * length
    values = tuple(int(v) for v in value)
    return values * length if len(values) == 1 else values


def pool_tuple(value: int | Sequence[int] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """Like :func:`to_tuple`, with torch's default of pools: an empty or missing stride."""
    if value is None or (not isinstance(value, int) and len(value) == 0):
        return default
    return to_tuple(value, len(default))


def reduced_dims(input: Tensor, dim: Any) -> tuple[int, ...]:
    """Return the dimensions of a reduction; none given means all."""
    rank = max(len(input.shape), 1)
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return tuple(range(len(input.shape)))
    return tuple(d % rank for d in to_tuple(dim, 1))


def reduced_count(shape: Sequence[int], dim: Sequence[int]) -> int:
    """Return how many values a reduction takes together."""
    count = 1
    for d in dim:  # a generator would stop a graph capture
        count *= shape[d]
    return count


def refused_arguments(kwargs: dict[str, Any]) -> str | None:
    """Return why arguments beyond those that a call binds have no integer form, if any is given."""
    given = sorted(name for name, value in kwargs.items() if value is not None)
    return f"`{given[0]}=` has no integer form" if given else None
