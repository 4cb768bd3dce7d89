"""Pure data movement: the tag goes where the values go."""

from typing import Any

import torch
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
    if torch.compiler.is_dynamo_compiling():
        # Dynamo lets attributes be set on the result of a call, but not on a part of one.
        result = tuple(part.view_as(part) for part in result)
    for part in result:
        with_tag(part, tag)
    return result
