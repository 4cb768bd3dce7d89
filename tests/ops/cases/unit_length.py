"""Vectors of length one."""

from torch.nn import functional as F

from tests.ops.cases import Case, on_convs, on_linears

NO_KERNEL = {"linger": "the engine has no kernel for it"}

CASES = [
    Case("normalize", "features", on_linears(lambda a: F.normalize(a)), refused=NO_KERNEL),
    Case("normalize", "channels", on_convs(lambda a: F.normalize(a, dim=1)), refused=NO_KERNEL),
    Case(
        "normalize",
        "eps",
        on_linears(lambda a: F.normalize(a, p=2, dim=-2, eps=3.0), shape=(2, 3, 6)),
        refused=NO_KERNEL,
    ),
]
