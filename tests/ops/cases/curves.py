"""Functions of one number, and gated units."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ops.cases import Case, layer, on_convs, on_linears

_NO_OP = "the engine has no such op"
_NARROW = {"linger/16": "8-bit codes only"}


def table(
    kind: str, function: Callable[..., Any], name: str = "table", operands: int = 1, **fields: Any
) -> Case:
    """A function that no engine has."""
    fields = {"refused": {"linger": _NO_OP}, **fields}
    return Case(kind, name, on_linears(function, operands, (7, 6)), **fields)


def positive(a: Tensor) -> Tensor:
    """Values above zero at every width, so that a float result is a number."""
    return F.hardsigmoid(a) + 0.25


CASES = [
    Case("sigmoid", "convs", on_convs(torch.sigmoid), refused=_NARROW),
    Case("sigmoid", "relu", on_convs(lambda a: torch.sigmoid(a).relu()), refused=_NARROW),
    Case("sigmoid", "wide", on_linears(lambda a: torch.sigmoid(a * 7.7)), refused=_NARROW),
    Case("tanh", "convs", on_convs(torch.tanh), refused=_NARROW),
    Case("tanh", "relu", on_linears(lambda a: torch.tanh(a).relu()), refused=_NARROW),
    Case("glu", "channels", on_convs(lambda a: F.glu(a, 1))),
    Case("glu", "last", on_linears(F.glu, shape=(2, 3, 6))),
    Case("gelu", "exact", on_linears(F.gelu), refused={"arcs": _NO_OP, "venus": _NO_OP}),
    table("gelu", lambda a: F.gelu(a, approximate="tanh"), "approximate"),
    Case("silu", "convs", on_convs(F.silu), refused={"arcs": _NO_OP, "venus": _NO_OP}),
    *(
        table(kind, getattr(F, kind))
        for kind in (
            *("mish", "hardswish", "hardsigmoid", "elu", "selu", "celu"),
            *("softplus", "softsign", "logsigmoid", "tanhshrink", "softshrink", "hardshrink"),
        )
    ),
    Case("leaky_relu", "default", on_linears(F.leaky_relu)),
    Case("leaky_relu", "steep", on_convs(lambda a: F.leaky_relu(a, -3.0))),
    Case("leaky_relu", "in-place", on_convs(lambda a: F.leaky_relu(a, 0.3, inplace=True).relu())),
    table("elu", lambda a: F.elu(a, alpha=0.4), "alpha"),
    table("threshold", lambda a: F.threshold(a, 0.25, -0.5)),
    table("exp", lambda a: torch.exp(a * 0.1)),
    *(table(kind, getattr(torch, kind)) for kind in ("exp2", "expm1", "erf", "sin", "cos")),
    *(
        table(kind, lambda a, kind=kind: getattr(torch, kind)(positive(a)))
        for kind in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal")
    ),
    Case("square", "linear", on_linears(torch.square)),
    Case("pow", "square", on_convs(lambda a: a**2)),
    table("pow", lambda a: a**3, "cube"),
    table("pow", lambda a: torch.pow(positive(a), 0.5), "root"),
    table("pow", lambda a: positive(a) ** -1.5, "negative"),
    table("pow", lambda a: 2.0**a, "base"),
    Case("neg", "convs", on_convs(lambda a: -a)),
    Case("abs", "convs", on_convs(lambda a: a.abs())),
    Case(
        "prelu",
        "one",
        layer(lambda: nn.Sequential(nn.Linear(6, 5), nn.PReLU()), (4, 6)),
        gradient="finite",
    ),
    Case(
        "prelu",
        "channels",
        layer(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4, 0.3)), (2, 3, 6, 6)),
        gradient="finite",
    ),
]
