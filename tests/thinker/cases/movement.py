"""Ops that move values."""

from __future__ import annotations

import torch
from torch import nn

from tests.thinker.cases.case import PackCase, conv, everywhere, image, on_conv, on_linear, rows

MOVEMENT = [
    PackCase(
        "flatten",
        "flatten",
        on_conv(lambda m, x: m.fc(m.conv(x).flatten(1)), fc=lambda: nn.Linear(144, 5)),
        image(),
        ("flatten",),
    ),
    PackCase(
        "reshape",
        "reshape",
        on_conv(lambda m, x: m.fc(m.conv(x).reshape(1, 4, 36)), fc=lambda: nn.Linear(36, 5)),
        image(),
        ("reshape",),
    ),
    PackCase(
        "squeeze",
        "squeeze, unsqueeze",
        on_linear(
            lambda m, x: m.c(m.fc(x).unsqueeze(1)).squeeze(3), c=conv(1, 2, (3, 5), stride=1)
        ),
        rows(6, 16),
    ),
    PackCase(
        "transpose",
        "transposes by (0, 2, 3, 1), (0, 3, 1, 2), (0, 1, 3, 2)",
        on_conv(
            lambda m, x: (
                m.fc(m.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
                m.other(x).transpose(2, 3),
            ),
            fc=lambda: nn.Linear(4, 5),
        ),
        image(),
        ("transpose_0132", "transpose_0312"),
    ),
    PackCase(
        "transpose_inner",
        "by (0, 2, 1, 3), (0, 3, 2, 1)",
        on_conv(lambda m, x: (m.conv(x).transpose(1, 2), m.other(x).transpose(1, 3))),
        image(),
        ("transpose_0213", "transpose_0321"),
    ),
    PackCase(
        "transpose_rows",
        "by (0, 2, 1)",
        on_linear(lambda m, x: m.fc(x).transpose(1, 2)),
        rows(5, 16),
        ("transpose_021",),
    ),
    PackCase("slice", "slices", on_conv(lambda m, x: m.conv(x)[:, 1:3]), image(), ("slice_c",)),
    PackCase(
        "chunk",
        "chunk, split",
        on_conv(lambda m, x: torch.cat(m.conv(x).chunk(2, 1)[::-1], 1)),
        image(),
    ),
    PackCase(
        "returned_twice",
        "one value returned twice",
        on_conv(lambda m, x: (lambda y: (y, y))(m.conv(x))),
        image(),
        refused=everywhere("packer", "set_input", "no Identity: return it once"),
    ),
]
