"""Addition, subtraction, multiplication, division and concatenation."""

import torch

from tests.ops.cases import Case, on_convs, on_linears

_OTHER_SHAPES = {"linger": "tensors of different shapes"}


def _divided(name, function, operands=2, **fields):
    return Case("div", name, on_convs(function, operands), finite=False, **fields)


CASES = [
    Case("add", "two", on_convs(lambda a, b: a + b * 0.1, 2)),
    Case("add", "number", on_convs(lambda a: a + 0.37)),
    Case("add", "in-place", on_convs(lambda a, b: a.add_(b), 2), gradient="none"),
    Case(
        "add",
        "broadcast",
        on_convs(lambda a, b: a + b.mean((2, 3), keepdim=True), 2),
        refused=_OTHER_SHAPES,
    ),
    Case("sub", "two", on_convs(lambda a, b: a - b, 2)),
    Case("sub", "from-number", on_convs(lambda a: 0.6 - a)),
    Case("mul", "two", on_convs(lambda a, b: a * b, 2)),
    Case("mul", "square", on_convs(lambda a: a * a)),
    Case("mul", "number", on_convs(lambda a: a * 0.37), gradient="finite"),
    Case("mul", "negative", on_convs(lambda a: -3.3 * a), gradient="finite"),
    _divided("two", lambda a, b: a / (b.abs() + 1)),
    _divided("near-zero", lambda a, b: a.clamp(-1, 1) / (b.relu() + 0.05), largest=8.0),
    _divided("number", lambda a: a / 3, 1, gradient="finite"),
    _divided("power-of-two", lambda a: a / -4.0, 1),
    _divided("from-number", lambda a: 0.7 / (a * a + 0.5), 1),
    _divided("broadcast", lambda a, b: a / (b.abs().mean((2, 3), keepdim=True) + 0.3)),
    _divided("in-place", lambda a, b: (a * 2).div_(b * b + 0.5), gradient="none"),
    Case("cat", "three", on_convs(lambda a, b: torch.cat([a, b * 0.2, a], 1), 2)),
    Case("stack", "front", on_convs(lambda a, b: torch.stack([a, b * 0.3]), 2)),
    Case("stack", "last", on_linears(lambda a, b: torch.stack((b, a, b), -1), 2)),
    Case("hstack", "images", on_convs(lambda a, b: torch.hstack([a, b]), 2)),
    Case("vstack", "rows", on_linears(lambda a, b: torch.vstack([a, b]), 2)),
    Case("dstack", "rows", on_linears(lambda a, b: torch.dstack([a, b * 2]), 2)),
    Case("column_stack", "rows", on_linears(lambda a, b: torch.column_stack([a, b]), 2)),
]
