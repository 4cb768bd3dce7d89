"""The meaning of each op, one file per family. Importing the package fills the op table."""

from lightning_linger.core.integer import code_limits, integer_op, payload_dtype
from lightning_linger.core.registry import Op, Part, register, unregister
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import Tag, tag_of, with_tag
from lightning_linger.ops import (
    activation,
    conv,
    elementwise,
    linear,
    movement,
    norm,
    pool,
)
from lightning_linger.ops.kernel import KernelOp, Target

__all__ = [
    "KernelOp",
    "Op",
    "Part",
    "Site",
    "Tag",
    "Target",
    "activation",
    "code_limits",
    "conv",
    "elementwise",
    "integer_op",
    "linear",
    "movement",
    "norm",
    "payload_dtype",
    "pool",
    "register",
    "tag_of",
    "unregister",
    "with_tag",
]
