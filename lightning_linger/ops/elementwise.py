"""Addition, multiplication and concatenation, by their former place."""

from lightning_linger.ops.add import AddOp, integer_add, round_sum
from lightning_linger.ops.cat import integer_cat
from lightning_linger.ops.mul import MulOp, integer_mul

__all__ = ["AddOp", "MulOp", "integer_add", "integer_cat", "integer_mul", "round_sum"]
