"""Functions without an integer form, which the summary explains."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.models import Lambda
from tests.ops.cases import Case, on_convs, on_linears


def _float(kind, function, why, operands=1, **fields):
    build = on_linears(lambda *x: function(*x).relu(), operands)
    return Case(kind, "float", build, why_float=why, **fields)


def _bag(rng):
    model = Lambda(
        lambda self, x: self.fc(F.embedding_bag(x, self.table)),
        table=nn.Parameter(torch.randn(9, 6)),
        fc=nn.Linear(6, 4),
    )
    return model, (torch.randint(0, 9, (5, 3)),)


def _bilinear(rng):
    model = Lambda(
        lambda self, x: self.pairs(self.left(x), self.right(x)).relu(),
        left=nn.Linear(6, 3),
        right=nn.Linear(6, 5),
        pairs=nn.Bilinear(3, 5, 4),
    )
    return model, (torch.randn(7, 6),)


CASES = [
    _float("floor_divide", lambda a, b: a // (b.abs() + 1), "whole numbers", 2),
    _float("remainder", lambda a: a % 0.5, "jumps"),
    _float("fmod", lambda a: torch.fmod(a, 0.5), "jumps"),
    _float("addcmul", lambda a, b: torch.addcmul(a, a, b), "`x + a * b`", 2),
    _float(
        "addcdiv",
        lambda a, b: torch.addcdiv(a, a, b.abs() + 1),
        "`x + a / b`",
        operands=2,
        finite=False,
    ),
    _float("lerp", lambda a, b: torch.lerp(a, b, 0.3), "write", 2),
    Case(
        "baddbmm",
        "float",
        on_convs(lambda a, b: torch.baddbmm(a[:, 0], a[:, 1], b[:, 1]), 2),
        why_float="torch.bmm",
    ),
    Case("embedding_bag", "float", _bag, why_float="use `embedding`"),
    Case("bilinear", "float", _bilinear, why_float="`(linear(x).unflatten"),
]
