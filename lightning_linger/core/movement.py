"""Pure data movement: the tag goes where the values go."""

from typing import Any

from torch import Tensor

from lightning_linger.core.tags import tag_of, with_tag


def move(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function that rearranges values and carry the tag of its first operand along."""
    source = args[0] if args else kwargs.get("input")
    tag = tag_of(source)
    result = func(*args, **kwargs)
    if tag is None:
        return result
    if isinstance(result, Tensor):
        return with_tag(result, tag)
    for part in result:
        with_tag(part, tag)
    return result
