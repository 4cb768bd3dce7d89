"""Sums, variances, extremes and order."""

import torch

from tests.ops.cases import Case, on_convs, on_linears

SUM = {"linger": "the engine's own one adds up the first row only"}
VAR = {"linger": "the engine's own one does not square the values it sums"}
NO_KERNEL = {"linger": "the engine has no kernel for it"}
TWO = {**NO_KERNEL, "linger/16": "the engine changes the step of 8-bit codes only"}
LAST_AXIS = {"linger": "the engine searches the last one"}
EIGHT_BITS = {"linger/16": "the engine reads 8 bits"}

CASES = [
    Case("sum", "maps", on_convs(lambda a: a.sum((2, 3))), refused=SUM),
    Case("sum", "last", on_convs(lambda a: torch.sum(a, -1, keepdim=True)), refused=SUM),
    Case("cumsum", "last", on_linears(lambda a: a.cumsum(-1)), refused=NO_KERNEL),
    Case("cumsum", "first", on_linears(lambda a: torch.cumsum(a, dim=0)), refused=NO_KERNEL),
    Case("var", "last", on_linears(lambda a: a.var(-1)), refused=VAR),
    Case("var", "maps", on_convs(lambda a: torch.var(a, (2, 3), unbiased=False)), refused=VAR),
    Case("std", "kept", on_convs(lambda a: a.std(1, keepdim=True)), refused=VAR),
    Case("std", "correction", on_linears(lambda a: torch.std(a, 1, correction=0)), refused=VAR),
    Case("amax", "maps", on_convs(lambda a: a.amax((2, 3)))),
    Case("amax", "channels", on_convs(lambda a: torch.amax(a, 1, keepdim=True))),
    Case("amin", "last", on_linears(lambda a: a.amin(-1)), refused=NO_KERNEL),
    Case("max", "all", on_convs(lambda a: a.max())),
    Case("min", "all", on_convs(lambda a: a.min()), refused=NO_KERNEL),
    Case("max", "values", on_convs(lambda a: a.max(1).values)),
    Case("max", "both", on_linears(lambda a: tuple(a.max(-1, keepdim=True))), refused=EIGHT_BITS),
    Case("max", "indices", on_convs(lambda a: tuple(torch.max(a, 1))), refused=LAST_AXIS),
    Case("min", "both", on_linears(lambda a: tuple(a.min(dim=1))), refused=NO_KERNEL),
    # Operands are rounded to one step before they are compared, which makes and breaks ties.
    Case(
        "max",
        "two",
        on_convs(lambda a, b: torch.max(a, b * 0.3), 2),
        refused=TWO,
        gradient="finite",
    ),
    Case(
        "maximum",
        "two",
        on_convs(lambda a, b: torch.maximum(a, b), 2),
        refused=TWO,
        gradient="finite",
    ),
    Case(
        "minimum",
        "broadcast",
        on_convs(lambda a, b: a.minimum(b[:, :1]), 2),
        refused=TWO,
        gradient="finite",
    ),
    Case(
        "maximum",
        "constant",
        on_convs(lambda a: torch.maximum(a, torch.zeros(()))),
        refused=TWO,
        gradient="finite",
    ),
    Case(
        "argmax",
        "last",
        on_linears(lambda a: (a, a.argmax(-1))),
        refused=EIGHT_BITS,
        gradient="none",
    ),
    Case(
        "argmax",
        "channels",
        on_convs(lambda a: (a, a.argmax(1, keepdim=True))),
        refused=LAST_AXIS,
        gradient="none",
    ),
    Case(
        "argmin",
        "all",
        on_linears(lambda a: (a, torch.argmin(a))),
        refused=NO_KERNEL,
        gradient="none",
    ),
    # Of equal values torch may choose others.
    Case(
        "topk",
        "last",
        on_linears(lambda a: tuple(a.topk(3))),
        refused=NO_KERNEL,
        gradient="finite",
    ),
    Case(
        "topk",
        "smallest",
        on_convs(lambda a: tuple(torch.topk(a, 2, dim=1, largest=False))),
        refused=NO_KERNEL,
        gradient="finite",
    ),
    Case("sort", "rows", on_linears(lambda a: tuple(a.sort(0))), refused=NO_KERNEL),
    Case(
        "sort",
        "descending",
        on_linears(lambda a: torch.sort(a, descending=True).values),
        refused=NO_KERNEL,
    ),
]
