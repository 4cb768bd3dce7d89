"""Softmax and its logarithms."""

import torch
from torch.nn import functional as F

from tests.ops.cases import Case, on_convs, on_linears

EIGHT_BITS = {"linger/16": "the engine's kernel takes and gives 8 bits"}
NO_KERNEL = {"linger": "the engine has no kernel for it"}
LOG = {
    "linger": "computes it as far as is known",
    "venus": None,
    "venus/16": "the engine's kernel takes and gives 8 bits",
}

CASES = [
    Case("softmax", "last", on_linears(lambda a: a.softmax(-1)), refused=EIGHT_BITS),
    Case("softmax", "channels", on_convs(lambda a: F.softmax(a, dim=1)), refused=EIGHT_BITS),
    Case("softmax", "middle", on_convs(lambda a: torch.softmax(a, 2)), refused=EIGHT_BITS),
    Case(
        "softmax",
        "dtype",
        on_linears(lambda a: F.softmax(a, -1, dtype=torch.float32), shape=(2, 3, 40)),
        refused=EIGHT_BITS,
    ),
    Case("softmax", "one", on_linears(lambda a: a[:, :1].softmax(1)), refused=EIGHT_BITS),
    Case("softmax", "relu", on_linears(lambda a: F.relu(a.softmax(1))), refused=EIGHT_BITS),
    Case("softmin", "channels", on_convs(lambda a: F.softmin(a, dim=1)), refused=NO_KERNEL),
    Case("log_softmax", "last", on_linears(lambda a: a.log_softmax(-1)), refused=LOG),
    Case("log_softmax", "channels", on_convs(lambda a: F.log_softmax(a, dim=1)), refused=LOG),
    Case("logsumexp", "last", on_linears(lambda a: a.logsumexp(-1)), refused=NO_KERNEL),
    Case(
        "logsumexp",
        "maps",
        on_convs(lambda a: torch.logsumexp(a, (2, 3), keepdim=True)),
        refused=NO_KERNEL,
    ),
]
