"""Small helpers to normalise the arguments of torch functions."""

from collections.abc import Sequence


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
