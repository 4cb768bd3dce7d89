"""The meaning of each op, one file per family. Importing the package fills the op table."""

from lightning_linger.ops import (
    activation,
    conv,
    elementwise,
    linear,
    movement,
    norm,
    pool,
)

__all__ = ["activation", "conv", "elementwise", "linear", "movement", "norm", "pool"]
